"""Loads and closes vLLM engines in turn and tells after each what is left, one JSON line a cycle.

    python -m support.engine_cycles NUM_CYCLES MODEL...

A process of its own, so that nothing else's memory is counted. With gc off while an engine lives: what
holds a closed one must show, and not be collected by chance.
"""

import asyncio
import gc
import json
import os
import sys
import threading
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path

from codeyard.worker.engines import remains
from codeyard.worker.engines.models import parse_model
from codeyard.worker.engines.vllm_engine import VllmEngine
from support import engines


@dataclass(frozen=True, slots=True)
class Cycle:
    loaded_bytes: int  # RSS of this process and all below it, with the engine loaded and used
    closed_bytes: int  # the same once it was closed
    engine_alive: bool  # something still holds the closed engine
    processes: int  # left below this one
    descriptors: int
    threads: int
    files: int  # sockets' folders, and segments of shared memory that were the engine's


async def main(num_cycles: int, models: list[str]) -> None:
    for number in range(num_cycles):
        print(json.dumps(asdict(await cycle(models[number % len(models)]))), flush=True)


async def cycle(model: str) -> Cycle:
    gc.disable()
    engine = await VllmEngine.start(parse_model(model), engines.SETTINGS)
    await asyncio.gather(*(engines.run(engine, engines.job(str(n), stream=n % 2 == 0)) for n in range(8)))
    loaded_bytes = tree_bytes()
    segments = {path for pid in engine.pids() for path in remains._segments_of(str(pid))}
    assert segments, "vLLM's processes share memory: nothing was looked at"
    folder = engine._remains.folder
    assert os.listdir(folder), "vLLM's sockets are not where they were told to be"
    watched = weakref.ref(engine)
    await engine.close()
    del engine
    alive = watched() is not None
    gc.enable()
    gc.collect()
    return Cycle(
        loaded_bytes=loaded_bytes,
        closed_bytes=tree_bytes(),
        engine_alive=alive,
        processes=len(engines.left(set())),
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=threading.active_count(),
        files=there(*segments, Path(folder)),
    )


def there(*paths: Path) -> int:
    return sum(path.exists() for path in paths)


def tree_bytes() -> int:
    """Resident pages, those shared among the processes counted for each: what others map changes nothing."""
    pids = [os.getpid(), *engines.processes()]
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2:]))
