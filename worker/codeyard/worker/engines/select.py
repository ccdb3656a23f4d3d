"""Start an engine by name. `auto` takes vllm, then torch; it never falls to `simulated`.

Engine libraries are imported here, when one is started, and nowhere before.
"""

import importlib
import importlib.util
import logging
import time
from typing import Literal

from codeyard.shared.errors import EngineUnavailable
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import Engine

log = logging.getLogger(__name__)

EngineName = Literal["auto", "vllm", "torch", "simulated"]
RealEngine = Literal["vllm", "torch"]
NEEDS: dict[RealEngine, tuple[str, ...]] = {"vllm": ("vllm",), "torch": ("torch", "transformers")}


async def start_engine(name: EngineName, source: ModelSource, settings: EngineSettings) -> Engine:
    """A loaded, warm engine. Raises EngineUnavailable with the way out."""
    if name == "simulated":
        from codeyard.worker.engines.simulated import SimulatedEngine

        log.info("engine_started", extra={"engine": name})
        return await SimulatedEngine.start(source, settings)
    source.require_weights()
    if name != "auto":
        if not _installed(name):
            raise EngineUnavailable(f"engine {name} is not installed: pip install 'codeyard[{name}]'")
        return await _start(name, source, settings)
    refusals = []
    for candidate in NEEDS:
        if not _installed(candidate):
            continue
        try:
            return await _start(candidate, source, settings)
        except EngineUnavailable as error:
            log.warning("engine_unavailable", extra={"engine": candidate, "error": str(error)})
            refusals.append(str(error))
    raise EngineUnavailable(
        "; ".join(refusals)
        or "no engine is installed: pip install 'codeyard[vllm]' on a GPU machine, 'codeyard[torch]' anywhere "
        "(for load tests without a model: --engine simulated)"
    )


def _installed(name: RealEngine) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in NEEDS[name])


async def _start(name: RealEngine, source: ModelSource, settings: EngineSettings) -> Engine:
    started_s = time.monotonic()
    engine: Engine
    if name == "torch":
        from codeyard.worker.engines.torch_engine import TorchEngine

        engine = await TorchEngine.start(source, settings)
    else:
        from codeyard.worker.engines.vllm_engine import VllmEngine

        engine = await VllmEngine.start(source, settings)
    load_s = round(time.monotonic() - started_s, 1)
    log.info("engine_started", extra={"engine": engine.info.version, "model": source.location, "load_s": load_s})
    return engine
