"""What a fresh engine is asked before its first job, in virtual time."""

from collections.abc import AsyncGenerator

import pytest

from codeyard.shared.errors import EngineUnavailable, JobFailed, JobRejected
from codeyard.shared.job import estimate_tokens
from codeyard.worker.engines.port import Delta, Engine, EngineInfo, EngineJob
from codeyard.worker.scheduling.step_time import PRIOR, StepCost
from codeyard.worker.simulation.virtual_time import pass_time, run_in_virtual_time
from codeyard.worker.warmup import step_cost, warm_up

STEP_S, PREFILL_S = 0.02, 0.001  # a slow CPU


class Timed:
    """Takes exactly as long as the two say."""

    info = EngineInfo("fake", "fake", "/models/fake", "fake", 4_096, 8, True)

    def __init__(self, error: Exception | None = None, reason: str = "length") -> None:
        self._error = error
        self._reason = reason

    async def generate(self, job: EngineJob) -> AsyncGenerator[Delta, None]:
        if self._error is not None:
            raise self._error
        tokens = estimate_tokens(job.prompt)
        await pass_time(STEP_S + PREFILL_S * tokens)
        yield Delta("a", (1,))
        for _ in range(job.sampling.max_tokens - 2):
            await pass_time(STEP_S)
            yield Delta("a", (1,))
        await pass_time(STEP_S)
        yield Delta("a", (1,), self._reason, tokens)


def asked(engine: Timed) -> StepCost:
    fake: Engine = engine  # type: ignore[assignment]  # as much of an engine as is asked
    return run_in_virtual_time(step_cost(fake))


def test_what_a_step_takes_is_measured_before_the_first_job() -> None:
    """A scheduler that takes a CPU for a GPU admits a first burst that stalls everybody."""
    cost = asked(Timed())

    assert cost.base_s == pytest.approx(STEP_S)
    assert cost.per_prompt_token_s == pytest.approx(PREFILL_S)


@pytest.mark.parametrize("error", [JobFailed("a bad day"), JobRejected("prompt_too_long", "too long")])
def test_an_engine_that_cannot_be_timed_is_taken_for_an_ordinary_one(error: Exception) -> None:
    """The fit knows better within seconds."""
    assert asked(Timed(error)) == PRIOR


@pytest.mark.parametrize("engine", [Timed(JobFailed("a bad day")), Timed(reason="abort")])
def test_a_model_that_loads_and_does_not_answer_is_not_served(engine: Timed) -> None:
    """It is found out before a job does."""
    with pytest.raises(EngineUnavailable, match=r"was loaded, but its first prompt"):
        run_in_virtual_time(warm_up(engine))  # type: ignore[arg-type]  # as much of an engine as is asked
