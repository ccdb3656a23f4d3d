"""Start an engine by name. `auto` takes vllm, then torch; it never falls to `simulated`.

Engine libraries are imported here, when one is started, and nowhere before.
"""

import importlib.util
import logging
from typing import Literal

from codeyard.shared.errors import EngineUnavailable
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import Engine

log = logging.getLogger(__name__)

EngineName = Literal["auto", "vllm", "torch", "simulated"]


async def start_engine(name: EngineName, source: ModelSource, settings: EngineSettings) -> Engine:
    """A loaded, warm engine. Raises EngineUnavailable with the way out."""
    chosen = _automatic() if name == "auto" else name
    log.info("engine_starting", extra={"engine": chosen, "model": source.location})
    if chosen == "simulated":
        from codeyard.worker.engines.simulated import SimulatedEngine

        return SimulatedEngine(source, settings)
    if importlib.util.find_spec(chosen) is None:
        raise EngineUnavailable(f"engine {chosen} is not installed: pip install 'codeyard[{chosen}]'")
    if chosen == "torch":
        from codeyard.worker.engines.torch_engine import TorchEngine

        return await TorchEngine.start(source, settings)
    from codeyard.worker.engines.vllm_engine import VllmEngine

    return await VllmEngine.start(source, settings)


def _automatic() -> Literal["vllm", "torch"]:
    if importlib.util.find_spec("vllm") is not None:
        return "vllm"
    if importlib.util.find_spec("torch") is not None and importlib.util.find_spec("transformers") is not None:
        return "torch"
    raise EngineUnavailable(
        "no engine is installed: pip install 'codeyard[vllm]' on a GPU machine, 'codeyard[torch]' anywhere "
        "(or, for load tests without a model, --engine simulated)"
    )
