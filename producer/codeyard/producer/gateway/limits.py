"""A tenant's limits, asked before a job is submitted and given back when it has ended.

Promise: what is granted over all gateways never exceeds the limits; a job that was refused further on, or
attached to one that is there, gives back what it took. Jobs that ended leave the quota when a gateway sees
them end (a wait, a stream, a status), and otherwise when the tenant is about to be refused: then its live jobs
are looked up in the store. So no process has to remember anything, and none can forget it.
Without an answer from the store, `store_down` says whether a job goes on uncounted or is refused.
Called by: gateway.tenancy.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from codeyard.producer.gateway.grouped import Grouped
from codeyard.shared.chat import Chat
from codeyard.shared.errors import JobTooLarge, QuotaExceeded, RateLimited, StoreUnavailable
from codeyard.shared.job import JobId, Sampling, estimate_tokens
from codeyard.shared.limits.port import LimitStore
from codeyard.shared.limits.rules import Allowance, Bucket, GiveBack, Take, Taken, Verdict, never
from codeyard.shared.limits.standing import Meter, Standing
from codeyard.shared.record import State
from codeyard.shared.settings import LimitSettings

log = logging.getLogger(__name__)

LIVE_MARGIN_S = 60.0  # past its deadline: a job is expired by then
QUOTA_RETRY_S = 2  # nobody knows when a job ends
UNSEEN_S = 60.0  # a job without a record for this long was never submitted: its gateway died in between
FORGET_S = 600.0  # of those: ids that ended by themselves meanwhile
LOOK_PAGE = 256  # live jobs looked up in one round trip
LOOK_PAGES = 16  # in one go; the next one goes on behind
LOOK_AGAIN_S = 0.2  # after a look that found nothing
NO_JOB = ""  # gives back tokens alone
MAX_MINE = 100_000  # jobs whose end is watched for here, the oldest forgotten first

States = Callable[[Sequence[JobId]], Awaitable[Sequence[State | None]]]
"""The state of each job; None where there is no record."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What one submission took. None: its tenant has no limits, or it was let in uncounted."""

    take: Take | None = None
    taken: Taken | None = None

    @property
    def standing(self) -> Standing:
        return standing_of(self.take, self.taken) if self.take and self.taken else Standing()


class Limits:
    """Belongs to one event loop; `close` it."""

    def __init__(
        self,
        settings: LimitSettings,
        store: LimitStore,
        states: States,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._store = store
        self._take = Grouped(store.take)
        self._give_back: Grouped[GiveBack, None] = Grouped(self._gave_back)
        self._states = states
        self._clock = clock
        self._allowances: dict[str, Allowance] = {}  # by tenant; only of those that `tenants` names, and ""
        self._mine: dict[JobId, None] = {}  # live jobs that were added here
        self._looks: dict[str, _Look] = {}  # by tenant

    def body_bytes(self, tenant: str, most: int) -> int:
        return min(most, self._settings.of(tenant).body_bytes or most)

    async def admit(self, tenant: str, job_id: JobId, *, tokens: int, timeout_s: float) -> Admission:
        """Raises RateLimited, QuotaExceeded, JobTooLarge; StoreUnavailable if limits are closed without a store."""
        allowance = self._allowance(tenant)
        if allowance.unlimited:
            return Admission()
        take = Take(tenant, job_id, tokens, timeout_s + LIVE_MARGIN_S, allowance)
        if never(take):
            raise JobTooLarge(
                f"prompt and max_tokens make about {tokens} tokens, more than this tenant may use at once",
                field="sampling.max_tokens",
            )
        try:
            taken = await self._take(take)
            if taken.verdict in (Verdict.JOBS, Verdict.ENQUEUED) and await self._room_was_made(tenant):
                taken = await self._take(take)
        except StoreUnavailable as error:
            if self._settings.store_down == "closed":
                raise
            log.warning("limits_not_counted", extra={"error": str(error)})
            return Admission()
        if taken.verdict is not Verdict.GRANTED:
            raise _refusal(take, taken)
        if taken.added:
            self._remember(job_id)
        return Admission(take, taken)

    async def undo(self, admission: Admission, *, live: bool) -> None:
        """It generates nothing: not submitted, or attached to a job that is there. `live`: that one goes on."""
        take, taken = admission.take, admission.taken
        if take is None or taken is None or not (taken.charged or (taken.added and not live)):
            return  # nothing was taken: also of a job that was live before, which stays in the count
        await self._returned(GiveBack(take.tenant, NO_JOB if live else take.job_id, taken.charged))

    async def ended(self, tenant: str, job_id: JobId) -> None:
        """A job was seen to be final. Cheap for those that were not added here."""
        if job_id in self._mine:
            await self._returned(GiveBack(tenant, job_id))

    async def close(self) -> None:
        await self._take.close()
        await self._give_back.close()

    # -------------------------------------------------------------------------------------------------

    def _allowance(self, tenant: str) -> Allowance:
        name = tenant if tenant in self._settings.tenants else ""
        if name not in self._allowances:
            self._allowances[name] = Allowance.of(self._settings.of(tenant))
        return self._allowances[name]

    def _remember(self, job_id: JobId) -> None:
        self._mine[job_id] = None
        while len(self._mine) > MAX_MINE:
            del self._mine[next(iter(self._mine))]

    async def _returned(self, back: GiveBack) -> None:
        """If the store does not answer, the next look finds it."""
        try:
            await self._give_back(back)
        except StoreUnavailable as error:
            log.warning("limits_not_given_back", extra={"error": str(error)})
        else:
            self._mine.pop(back.job_id, None)

    async def _gave_back(self, group: Sequence[GiveBack]) -> Sequence[None]:
        await self._store.give_back(group)
        return [None] * len(group)

    # Looking for jobs that ended -------------------------------------------------------------------

    async def _room_was_made(self, tenant: str) -> bool:
        """Whether it is worth asking again. Not if the store does not say: a refusal stays one."""
        try:
            return await self._look(tenant)
        except StoreUnavailable as error:
            log.warning("live_jobs_not_looked_up", extra={"error": str(error)})
            return False

    async def _look(self, tenant: str) -> bool:
        """Whether jobs were found that had ended. One look at a time for each tenant; who waits for it shares it."""
        look = self._looks.setdefault(tenant, _Look())
        before = look.number
        async with look.lock:
            if look.number == before and self._clock() >= look.not_before_s:
                look.found = await self._look_through(tenant, look)
                look.number += 1
                look.not_before_s = 0.0 if look.found else self._clock() + LOOK_AGAIN_S
            return look.found if look.number != before else False

    async def _look_through(self, tenant: str, look: "_Look") -> bool:
        for _ in range(LOOK_PAGES):
            ids = await self._store.live(tenant, start=look.start, count=LOOK_PAGE)
            ended = self._over(ids, await self._states(ids) if ids else [], look)
            if ended:
                await self._store.give_back([GiveBack(tenant, job_id) for job_id in ended])
            last = len(ids) < LOOK_PAGE
            look.start = 0 if last else look.start + len(ids) - len(ended)
            if ended or last:
                return bool(ended)
        return False

    def _over(self, ids: Sequence[JobId], states: Sequence[State | None], look: "_Look") -> list[JobId]:
        """Those that are final, and those that have had no record for so long that they never will."""
        now_s = self._clock()
        look.unseen = {job_id: since_s for job_id, since_s in look.unseen.items() if now_s - since_s < FORGET_S}
        ended = []
        for job_id, state in zip(ids, states, strict=True):
            if state is not None:
                look.unseen.pop(job_id, None)
                if state.final:
                    ended.append(job_id)
            elif now_s - look.unseen.setdefault(job_id, now_s) >= UNSEEN_S:
                del look.unseen[job_id]
                ended.append(job_id)
        return ended


class _Look:
    """Of one tenant's live jobs."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.number = 0
        self.found = False
        self.not_before_s = 0.0
        self.start = 0  # where the next one goes on
        self.unseen: dict[JobId, float] = {}  # without a record, since when


def estimate(prompt: str | Sequence[int] | Chat, sampling: Sampling) -> int:
    """Tokens that a job may use: its prompt, estimated where it is text, and all it may generate."""
    return estimate_tokens(prompt) + sampling.max_tokens


def standing_of(take: Take, taken: Taken) -> Standing:
    allowance = take.allowance
    return Standing(
        requests=_meter(allowance.requests, taken.requests_left, taken.requests_full_s),
        tokens=_meter(allowance.tokens, taken.tokens_left, taken.tokens_full_s),
    )


def _meter(bucket: Bucket | None, left: float, full_s: float) -> Meter | None:
    return Meter(bucket.burst, left, full_s) if bucket else None


def _refusal(take: Take, taken: Taken) -> RateLimited | QuotaExceeded:
    limit, standing = taken.verdict.value, standing_of(take, taken)
    if taken.verdict is Verdict.REQUESTS:
        return RateLimited("too many submissions", limit=limit, retry_after_s=taken.wait_s, standing=standing)
    if taken.verdict is Verdict.TOKENS:
        reason = f"too many tokens; this job is estimated at {take.tokens}"
        return RateLimited(reason, limit=limit, retry_after_s=taken.wait_s, standing=standing)
    if taken.verdict is Verdict.JOBS:
        reason = f"{take.allowance.concurrent_jobs} jobs are under way, as many as this tenant may have"
    else:
        reason = (
            f"the jobs under way and this one are estimated at more than {take.allowance.enqueued_tokens} tokens, "
            "as many as this tenant may have enqueued"
        )
    return QuotaExceeded(reason, limit=limit, retry_after_s=max(QUOTA_RETRY_S, taken.wait_s), standing=standing)


# Headers -------------------------------------------------------------------------------------------


def openai_headers(standing: Standing) -> dict[str, str]:
    """`x-ratelimit-*` as OpenAI names them; resets are durations like 1m2.5s. Empty without limits."""
    headers = {}
    for name, meter in (("requests", standing.requests), ("tokens", standing.tokens)):
        if meter is not None:
            headers[f"x-ratelimit-limit-{name}"] = str(math.floor(meter.limit))
            headers[f"x-ratelimit-remaining-{name}"] = str(math.floor(meter.remaining))
            headers[f"x-ratelimit-reset-{name}"] = duration(meter.reset_s)
    return headers


def anthropic_headers(standing: Standing, now: float) -> dict[str, str]:
    """`anthropic-ratelimit-*`; resets are moments (RFC 3339). `now`: wall time, seconds since the epoch."""
    headers = {}
    for name, meter in (("requests", standing.requests), ("tokens", standing.tokens)):
        if meter is not None:
            headers[f"anthropic-ratelimit-{name}-limit"] = str(math.floor(meter.limit))
            headers[f"anthropic-ratelimit-{name}-remaining"] = str(math.floor(meter.remaining))
            reset = time.gmtime(math.ceil(now + meter.reset_s))
            headers[f"anthropic-ratelimit-{name}-reset"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", reset)
    return headers


def duration(seconds: float) -> str:
    """As Go writes durations, which OpenAI's headers follow: 250ms, 6.5s, 1m0s, 2h0m5s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1_000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 10) / 10, 60)
    hours, minutes = divmod(int(minutes), 60)
    rest_text = f"{rest:.1f}".removesuffix(".0")
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{rest_text}s"
