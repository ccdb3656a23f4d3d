"""A first answer from a freshly loaded engine: so that no job pays for it, and as the proof that it works.

Called by: worker.service (as the model cache's warm-up; a rollout's revision is ready when it passed).
"""

import asyncio
from pathlib import Path

from codeyard.shared.errors import EngineDead, EngineUnavailable, JobFailed, JobRejected
from codeyard.shared.job import Lane, Sampling, new_job_id
from codeyard.worker.cache.model_cache import ModelSpec
from codeyard.worker.engines.models import WEIGHTS
from codeyard.worker.engines.port import Engine, EngineJob

PROMPT = "def add(a, b):"
MAX_TOKENS = 8
WITHIN_S = 300.0  # the first prompt may compile kernels
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


def expected_bytes(spec: ModelSpec) -> int:
    """Device memory of a model that was never loaded here: its weights on disk and a margin, and its KV cache."""
    settings = spec.settings
    if settings.simulated_bytes:
        return settings.simulated_bytes
    weights = [path for path in Path(spec.source.location).glob("*") if path.suffix in WEIGHTS]
    return int(sum(path.stat().st_size for path in weights) * OVERHEAD) + (settings.kv_cache_memory_bytes or 0)
