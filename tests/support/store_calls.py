"""Short hands for the store's requests, as the contract tests write them."""

from codeyard.shared.envelope import new_nonce
from codeyard.shared.job import Job, job_id_for_key
from codeyard.shared.record import Event, EventKind, Result, State, Usage
from codeyard.shared.store.port import Claim, Claimed, ClaimVerdict, Commit, Queued, Reservation, Store

OWNER = "worker-1"


def make_job(
    key: str | None = None,
    *,
    prompt: str = "def add(a, b):",
    timeout_s: float = 3_600.0,
    callback_url: str | None = None,
) -> Job:
    key = key or new_nonce()
    return Job.build(
        id=job_id_for_key("tests", key),
        tenant="tests",
        key=key,
        model="m",
        revision="m-1",
        prompt=prompt,
        timeout_s=timeout_s,
        callback_url=callback_url,
    )


def reservation_of(job: Job, publication: str = "p1") -> Reservation:
    return Reservation(job, job.digest(), publication, f"i-{job.key[:8]}")


def claim_of(job: Job, publication: str = "p1", *, owner: str = OWNER) -> Claim:
    return Claim(job, job.digest(), publication, owner, f"i-{job.key[:8]}")


def commit_of(job: Job, claimed: Claimed, text: str = "return a + b", publication: str = "p1") -> Commit:
    return Commit(job.id, claimed.fence, publication, success(text))


def success(text: str = "return a + b") -> Result:
    usage = Usage(prompt_tokens=7, completion_tokens=5)
    return Result(state=State.SUCCEEDED, text=text, finish_reason="stop", usage=usage)


def tokens(seq: int, text: str = "x") -> Event:
    return Event(seq=seq, kind=EventKind.TOKENS, text=text, token_ids=(seq,))


async def run_jobs(store: Store, *jobs: Job) -> list[Claimed]:
    """Reserved, queued and claimed: they run under the fences returned."""
    await store.reserve([reservation_of(job) for job in jobs])
    await store.mark_queued([Queued(job.id, "p1") for job in jobs])
    claims = await store.claim([claim_of(job) for job in jobs])
    assert {claimed.verdict for claimed in claims} == {ClaimVerdict.RUN}
    return claims
