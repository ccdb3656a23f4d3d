"""Every error this project raises on purpose.

Named for what the caller should do next; the message is written for the person on call.
Library exceptions (aio-pika, pika, redis, sqlite3, httpx) are translated where the library is
called, so nothing above the adapters ever sees one.
"""

from codeyard.shared.limits.standing import Standing


class FleetError(Exception):
    """Root of every error raised on purpose in this project."""


# What a caller of the clients sees -----------------------------------------------------------------


class InvalidJob(FleetError):
    """The job can never be accepted as written. `field` names what to mend. HTTP 400/422."""

    def __init__(self, reason: str, *, field: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class JobTooLarge(InvalidJob):
    """The encoded job is over the size limit. HTTP 413."""


class IdempotencyConflict(FleetError):
    """The key was used for another body. Use a new key, or send the first body again. HTTP 409."""

    def __init__(self, job_id: str) -> None:
        super().__init__(
            f"idempotency key already used for a job with another body (job {job_id}); "
            "send the same body to attach to it, or choose a new key"
        )
        self.job_id = job_id


class QueueFull(FleetError):
    """The broker refused the job for lack of room. Try again after `retry_after_s`. HTTP 429."""

    def __init__(self, queue: str, *, retry_after_s: float) -> None:
        super().__init__(f"queue {queue} is full; try again in {retry_after_s:g} s")
        self.queue = queue
        self.retry_after_s = retry_after_s


class DeadlineTooSoon(FleetError):
    """The job would not start before its deadline, so it was not accepted. Try again after `retry_after_s`,
    allow more time, or use another lane. HTTP 429."""

    def __init__(self, *, estimated_start_s: float, timeout_s: float) -> None:
        super().__init__(
            f"it would start in about {estimated_start_s:.3g} s, after its timeout of {timeout_s:.3g} s; "
            "try again later, or allow more time"
        )
        self.estimated_start_s = estimated_start_s
        self.retry_after_s = max(1.0, estimated_start_s - timeout_s)


class UnknownModel(FleetError):
    """No worker ever declared this model. Check the name, or start a worker that serves it. HTTP 404."""

    def __init__(self, model: str) -> None:
        super().__init__(f"no worker serves model {model!r}; start one with `codeyard worker --model {model}=PATH`")
        self.model = model


class JobNotFound(FleetError):
    """No such job: never accepted, or its record's TTL is over. HTTP 404."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no job {job_id}: it was never accepted here, or its record has expired")
        self.job_id = job_id


class ResultTimeout(FleetError):
    """The job was not final in time. It goes on; ask again with the same id. HTTP 202 with `Prefer: wait`."""

    def __init__(self, job_id: str, *, waited_s: float) -> None:
        super().__init__(f"job {job_id} is not final after {waited_s:g} s; it goes on, ask again with its id")
        self.job_id = job_id


class BrokerUnavailable(FleetError):
    """The broker did not answer within the deadline. HTTP 503.

    With `maybe_accepted`, the job may be queued all the same: submit again with the same
    idempotency key, which attaches to it if it is there; without a key, ask for the status of `job_id`.
    With `retry_after_s`, it was not asked, and will not be before then.
    """

    def __init__(
        self,
        reason: str,
        *,
        job_id: str | None = None,
        maybe_accepted: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        hint = (
            f"; job {job_id} may have been accepted: submit again with the same key, or ask for its status"
            if maybe_accepted
            else ""
        )
        super().__init__(f"broker unavailable: {reason}{hint}")
        self.job_id = job_id
        self.maybe_accepted = maybe_accepted
        self.retry_after_s = retry_after_s


class StoreUnavailable(FleetError):
    """The result store did not answer. The call may have taken effect and can be repeated. HTTP 503.

    With `maybe_accepted`, a submission got as far as the broker: submit again with the same key.
    With `retry_after_s`, it was not asked, and will not be before then.
    """

    def __init__(
        self,
        reason: str,
        *,
        job_id: str | None = None,
        maybe_accepted: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        hint = (
            f"; job {job_id} may have been accepted: submit again with the same key, or ask for its status"
            if maybe_accepted
            else ""
        )
        super().__init__(f"store unavailable: {reason}{hint}")
        self.job_id = job_id
        self.maybe_accepted = maybe_accepted
        self.retry_after_s = retry_after_s


class ModelUnavailable(FleetError):
    """The model's workers fail, or there are none, and nothing stands in for it. Try again after
    `retry_after_s`, or name another model. HTTP 503."""

    def __init__(self, model: str, reason: str, *, retry_after_s: float) -> None:
        super().__init__(f"model {model!r} is unavailable: {reason}; try again in {retry_after_s:.2g} s")
        self.model = model
        self.retry_after_s = retry_after_s


class Unauthorized(FleetError):
    """No valid credentials. HTTP 401."""


class Forbidden(FleetError):
    """Valid credentials without the right for this. HTTP 403."""


class AuthUnavailable(FleetError):
    """Credentials cannot be checked now, so nobody is let in. Try again. HTTP 503."""


class LimitReached(FleetError):
    """The tenant has used up what it may. Try again after `retry_after_s`. HTTP 429.

    `limit`: requests, tokens, jobs or enqueued; `standing`: what is left of its rates.
    """

    def __init__(self, reason: str, *, limit: str, retry_after_s: float, standing: Standing) -> None:
        super().__init__(f"{reason}; try again in {retry_after_s:.3g} s")
        self.limit = limit
        self.retry_after_s = retry_after_s
        self.standing = standing


class RateLimited(LimitReached):
    """Too much in too short a time: the bucket fills again by itself."""


class QuotaExceeded(LimitReached):
    """Too much under way: there is room again when jobs have ended."""


class StorageQuotaExceeded(FleetError):
    """The tenant's long prompts and files fill what it may store. Delete files, or wait until some end. HTTP 413."""

    def __init__(self, tenant: str) -> None:
        super().__init__(f"the stored prompts and files of tenant {tenant} fill its quota; delete some files")


class BlobMissing(FleetError):
    """Stored bytes are not there, or no longer what they were: their time was over, or the store lost them."""

    def __init__(self, digest: str) -> None:
        super().__init__(f"the stored bytes {digest[:12]}... are not there any more")


class RolloutRefused(FleetError):
    """The model's rollout is not where this could be done. HTTP 409."""


class SettingsError(FleetError):
    """A setting cannot be used. The message names the variable, the value and what was expected."""


# What the worker's own parts tell each other -------------------------------------------------------


class MalformedMessage(FleetError):
    """A message or stored value does not decode. Dead-letter it; retrying cannot help."""


class LaterVersion(MalformedMessage):
    """A message of a later version: a newer worker reads it. Hand it back; redrive what was dead-lettered for it."""


class JobRejected(FleetError):
    """This job can never succeed on this engine. Commit it as failed; do not retry."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class JobFailed(FleetError):
    """The engine failed on this job alone. It may be tried again."""


class EngineDead(FleetError):
    """The engine is gone. Start another; every job it had may be offered again."""


class EngineUnavailable(FleetError):
    """The engine cannot be started here. The message says what to install or change."""


class NoRoom(EngineUnavailable):
    """The models in use leave no memory for this one. The message says who holds what."""
