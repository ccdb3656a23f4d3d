"""A first answer from a freshly loaded engine, so that no job pays for it, and as the proof that it works; and
what its steps take, so that the scheduler does not begin with the idea of another machine.

Called by: worker.service (as the model cache's warm-up; a rollout's revision is ready when it passed),
worker.line (`step_cost`).
"""

import asyncio
from dataclasses import dataclass
from pathlib import Path

from codeyard.shared.errors import EngineDead, EngineUnavailable, JobFailed, JobRejected
from codeyard.shared.job import Lane, Sampling, new_job_id
from codeyard.worker.cache.model_cache import ModelSpec
from codeyard.worker.engines.models import WEIGHTS
from codeyard.worker.engines.port import Engine, EngineJob
from codeyard.worker.scheduling.step_time import PRIOR, StepCost

PROMPT = "def add(a, b):"
MAX_TOKENS = 8
WITHIN_S = 300.0  # the first prompt may compile kernels
LONGER_TOKENS, CHARS_PER_TOKEN = 400, 3
TIMED_S = 30.0  # for both prompts; an engine that is slower is not waited for
TIMED = Sampling(max_tokens=24)
LEAST_PER_JOB, LEAST_PER_PROMPT_TOKEN = 0.01, 0.001  # of a step alone, where noise would give less
OVERHEAD = 1.2  # of the weights' size on disk: what an engine holds beside them, before it was measured


async def warm_up(engine: Engine) -> None:
    """Raises EngineUnavailable if it loads but does not answer."""
    job = EngineJob(new_job_id(), PROMPT, Sampling(max_tokens=MAX_TOKENS), Lane.INTERACTIVE, stream=False)
    finish_reason = None
    try:
        async with asyncio.timeout(WITHIN_S):
            async for delta in engine.generate(job):
                finish_reason = delta.finish_reason or finish_reason
    except TimeoutError:
        raise EngineUnavailable(f"{engine.info.model} was loaded, but gave no answer within {WITHIN_S:g} s") from None
    except (JobRejected, JobFailed, EngineDead) as error:
        raise EngineUnavailable(f"{engine.info.model} was loaded, but its first prompt failed: {error}") from error
    if finish_reason not in ("stop", "length"):
        raise EngineUnavailable(f"{engine.info.model} was loaded, but its first prompt ended as {finish_reason}")


async def step_cost(engine: Engine) -> StepCost:
    """Measured on the idle engine with a short and a longer prompt: seconds per token alone, and what the longer
    prompt's first token took more, per token of it. A start for the fit (scheduling/step_time.py), which knows
    better within seconds; without it a CPU's first burst is admitted as if it were a GPU's, and everybody waits
    while it is prefilled. `PRIOR` where the engine gives no answer.
    """
    longer = max(1, min(LONGER_TOKENS, engine.info.context_tokens // 4)) * CHARS_PER_TOKEN
    try:
        async with asyncio.timeout(TIMED_S):
            short = await _timed(engine, PROMPT)
            long = await _timed(engine, (PROMPT + " pass\n") * (longer // len(PROMPT)))
    except (TimeoutError, JobRejected, JobFailed, EngineDead):
        return PRIOR
    more_tokens, more_s = long.prompt_tokens - short.prompt_tokens, long.first_s - short.first_s
    if more_tokens < 1 or short.per_token_s <= 0.0:
        return PRIOR
    return StepCost(
        base_s=short.per_token_s,
        per_job_s=max(LEAST_PER_JOB * short.per_token_s, PRIOR.per_job_s),
        per_prompt_token_s=max(LEAST_PER_PROMPT_TOKEN * short.per_token_s, more_s / more_tokens),
    )


@dataclass(frozen=True, slots=True)
class _Timed:
    prompt_tokens: int
    first_s: float  # to the first token
    per_token_s: float  # after it


async def _timed(engine: Engine, prompt: str) -> _Timed:
    """The prompt begins differently each time, so that no prefix of it is cached."""
    clock = asyncio.get_running_loop().time
    told = EngineJob(new_job_id(), f"# {new_job_id()}\n{prompt}", TIMED, Lane.INTERACTIVE, stream=True)
    began_s, first_s, last_s, num_tokens, prompt_tokens = clock(), None, 0.0, 0, 0
    async for delta in engine.generate(told):
        last_s = clock()
        first_s = last_s if first_s is None and delta.token_ids else first_s
        num_tokens += len(delta.token_ids)
        prompt_tokens = delta.prompt_tokens or prompt_tokens
    if first_s is None or num_tokens < 2:
        return _Timed(prompt_tokens, 0.0, 0.0)
    return _Timed(prompt_tokens, first_s - began_s, (last_s - first_s) / (num_tokens - 1))


def expected_bytes(spec: ModelSpec) -> int:
    """Device memory of a model that was never loaded here: its weights on disk and a margin, and its KV cache."""
    settings = spec.settings
    if settings.simulated_bytes:
        return settings.simulated_bytes
    weights = [path for path in Path(spec.source.location).glob("*") if path.suffix in WEIGHTS]
    return int(sum(path.stat().st_size for path in weights) * OVERHEAD) + (settings.kv_cache_memory_bytes or 0)
