"""Claim checks: a long prompt lies in the store under its digest, and the job carries a claim in its place.

So messages and records stay small, and equal prompts of one tenant are stored once. The bytes are written before
the job is reserved: a job that anyone can see has its prompt. They stay until the record of the last job that
claims them is over. Long is a prompt of more than CLAIM_OVER_BYTES as canonical JSON, which is also what is stored.
Called by: producer.submission (set_aside, deposit), worker.execution (redeem), `codeyard dead redrive` (hold_on).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from codeyard.shared.blobs import whole
from codeyard.shared.blobs.port import BlobStore, Hold, digest_of
from codeyard.shared.chat import Chat
from codeyard.shared.errors import JobTooLarge, MalformedMessage
from codeyard.shared.job import CLAIM_OVER_BYTES, Claim, Job, Prompt, canonical_prompt, estimate_tokens
from codeyard.shared.store.port import Timing

HOLDER = "claims"  # of all claimed prompts: one name, whose end only moves to later
MARGIN_S = 600.0  # the record's end is counted from its reservation, a moment after this
MOST_PER_CHARACTER = 12  # bytes of canonical JSON: one outside the basic plane is two escapes of six

_PROMPT: TypeAdapter[Prompt] = TypeAdapter(Prompt)


@dataclass(frozen=True, slots=True)
class SetAside:
    """A job whose prompt became a claim, and the pieces to deposit first."""

    job: Job
    pieces: list[bytes]


def set_aside(job: Job, *, max_prompt_bytes: int) -> SetAside | None:
    """None: the prompt is short. Raises JobTooLarge."""
    prompt = job.prompt
    if isinstance(prompt, Claim) or (isinstance(prompt, str) and len(prompt) * MOST_PER_CHARACTER <= CLAIM_OVER_BYTES):
        return None
    text = canonical_prompt(prompt)
    if len(text) > max_prompt_bytes:
        raise JobTooLarge(f"the prompt has {len(text)} bytes as JSON, the limit is {max_prompt_bytes}", field="prompt")
    if len(text) <= CLAIM_OVER_BYTES:
        return None
    stored = text.encode()
    pieces = whole.cut(stored)
    claim = Claim(
        digest=digest_of(stored),
        kind="chat" if isinstance(prompt, Chat) else "text" if isinstance(prompt, str) else "tokens",
        size_bytes=len(stored),
        tokens=estimate_tokens(prompt),
        chunks=tuple(map(digest_of, pieces)),
    )
    return SetAside(job.model_copy(update={"prompt": claim}), pieces)


async def deposit(blobs: BlobStore, aside: SetAside, timing: Timing) -> None:
    """Raises StorageQuotaExceeded, StoreUnavailable."""
    job = aside.job
    await whole.keep(blobs, job.tenant, aside.pieces, holder=HOLDER, ttl_s=_kept_s(job, timing))


async def hold_on(blobs: BlobStore, jobs: Sequence[Job], timing: Timing) -> None:
    """These begin once more, with a new deadline: keep what they claim as long as that takes. What has ended
    already stays gone. Raises StoreUnavailable."""
    for job in jobs:
        if isinstance(job.prompt, Claim):
            ttl_s = _kept_s(job, timing)
            await blobs.hold([Hold(job.tenant, digest, HOLDER, ttl_s) for digest in job.prompt.chunks])


def _kept_s(job: Job, timing: Timing) -> float:
    return timing.unpublished_s + job.timeout_s + timing.longest_run_s + timing.retention_s + MARGIN_S


async def redeem(blobs: BlobStore, tenant: str, claim: Claim) -> Prompt:
    """The prompt. Raises BlobMissing, MalformedMessage for bytes that are no such prompt, StoreUnavailable."""
    stored = await whole.read_whole(blobs, tenant, claim.chunks)
    if digest_of(stored) != claim.digest:
        raise MalformedMessage("the chunks of a claim are not the prompt it names")
    try:
        prompt: Prompt = _PROMPT.validate_json(stored)
    except ValidationError as error:
        raise MalformedMessage(f"the stored prompt: {error.errors(include_url=False)[0]['msg']}") from None
    return prompt
