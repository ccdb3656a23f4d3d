"""What becomes a claim, and what stays the same when it does."""

import pytest

from codeyard.shared.chat import Chat, Message
from codeyard.shared.claims import set_aside
from codeyard.shared.errors import InvalidJob, JobTooLarge
from codeyard.shared.job import (
    CLAIM_OVER_BYTES,
    Claim,
    Job,
    Prompt,
    Sampling,
    canonical_prompt,
    estimate_tokens,
    new_job_id,
    shared_key,
)

LIMIT = 16_777_216
CHAT = Chat(messages=(Message(role="system", content="Be brief."), Message(role="user", content="ä" * 20_000)))


def job_of(prompt: Prompt, **fields: object) -> Job:
    job_id = new_job_id()
    return Job.build(id=job_id, key=job_id, model="starter", revision="starter-1", prompt=prompt, **fields)


@pytest.mark.parametrize("prompt", ["x" * 70_000, "\u20ac" * 12_000, tuple(range(20_000)), CHAT])
def test_the_same_body_is_the_same_claimed_or_not(prompt: Prompt) -> None:
    """A repeat may come from a program that publishes it whole."""
    job = job_of(prompt)

    aside = set_aside(job, max_prompt_bytes=LIMIT)

    assert aside is not None
    claim = aside.job.prompt
    assert isinstance(claim, Claim)
    assert aside.job.digest() == job.digest()
    assert b"".join(aside.pieces).decode() == canonical_prompt(prompt)
    assert claim.size_bytes == len(canonical_prompt(prompt))
    assert estimate_tokens(claim) == estimate_tokens(prompt)
    assert len(aside.job.encode()) < 2_000


def test_another_prompt_is_another_body() -> None:
    """Long ones that differ in their last letter too."""
    long = job_of("x" * 70_000).digest()

    assert long != job_of("x" * 69_999 + "y").digest()
    assert long != job_of("x" * 70_000, sampling=Sampling(max_tokens=1)).digest()


@pytest.mark.parametrize("num_chars", [1, 5_461, 5_462, CLAIM_OVER_BYTES - 2])
def test_short_prompts_travel_in_their_jobs(num_chars: int) -> None:
    """To the last byte: two of JSON's quotes are part of it."""
    assert set_aside(job_of("x" * num_chars), max_prompt_bytes=LIMIT) is None
    assert set_aside(job_of("x" * (CLAIM_OVER_BYTES - 1)), max_prompt_bytes=LIMIT) is not None


def test_a_claimed_job_crosses_the_wire_unchanged() -> None:
    """Workers decode what producers encode."""
    aside = set_aside(job_of("x" * 3_000_000), max_prompt_bytes=LIMIT)
    assert aside is not None

    assert Job.decode(aside.job.encode()) == aside.job
    assert [len(piece) for piece in aside.pieces] == [1_048_576, 1_048_576, 902_850]


def test_a_prompt_over_the_limit_is_too_large() -> None:
    """Whatever the store would hold."""
    with pytest.raises(JobTooLarge, match="limit is 100000") as refused:
        set_aside(job_of("x" * 100_000), max_prompt_bytes=100_000)
    assert refused.value.field == "prompt"


def test_equal_deterministic_jobs_have_one_shared_key() -> None:
    """That is what makes them one job; other words, other sampling, another model make another."""
    key = shared_key("starter", "def f(", Sampling())

    assert key == shared_key("starter", "def f(", Sampling()) == f"shared:{job_of('def f(').digest()}"
    assert len({key, *(shared_key(*other) for other in OTHERS)}) == 1 + len(OTHERS)


OTHERS: list[tuple[str, str, Sampling]] = [
    ("starter", "def g(", Sampling()),
    ("other", "def f(", Sampling()),
    ("starter", "def f(", Sampling(max_tokens=5)),
    ("starter", "def f(", Sampling(temperature=0.7, seed=3)),
]


def test_jobs_whose_answers_differ_cannot_share_one() -> None:
    """Everyone would silently get the first one's draw."""
    with pytest.raises(InvalidJob, match="temperature 0 or a seed") as refused:
        shared_key("starter", "def f(", Sampling(temperature=0.7))
    assert refused.value.field == "share"
