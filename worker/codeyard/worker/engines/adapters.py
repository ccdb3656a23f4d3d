"""The LoRA adapters an engine has loaded: on demand, a bounded number, the least recently used one goes.

Promise: an adapter is loaded once however many jobs ask for it at a time, is never unloaded while a job
holds it, and has a number that no other adapter of this process ever had. Where every place is held,
jobs wait for one in the order they came.
Called by: the engines that serve adapters; how one is loaded and unloaded is theirs. One owner, the
event loop.
"""

import asyncio
import contextlib
import itertools
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from codeyard.shared.errors import EngineUnavailable
from codeyard.worker.engines.port import Adapter

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"  # as peft writes them
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")

_numbers = itertools.count(1)  # vLLM: unique for the life of the process, which it does not check


@dataclass(slots=True, eq=False)
class _Place:
    number: int
    ready: asyncio.Future[None]
    loading: asyncio.Task[None] | None = None
    num_jobs: int = 0


@dataclass(slots=True, eq=False)
class _Waiter:
    adapter: Adapter
    turn: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class AdapterSlots:
    """At most `capacity` adapters loaded at a time.

    Args:
        load: makes the adapter usable under a number. What it raises reaches every job that waited for it;
            the next job tries again.
        unload: forgets a number; called only when no job holds it.
    """

    def __init__(
        self,
        capacity: int,
        load: Callable[[Adapter, int], Awaitable[None]],
        unload: Callable[[int], Awaitable[None]],
    ) -> None:
        self._capacity = capacity
        self._load = load
        self._unload = unload
        self._places: OrderedDict[Adapter, _Place] = OrderedDict()  # least recently used first
        self._waiting: list[_Waiter] = []
        self._closed: Exception | None = None

    @property
    def loaded(self) -> tuple[Adapter, ...]:
        """The least recently used one first."""
        return tuple(one for one, place in self._places.items() if place.ready.done())

    @contextlib.asynccontextmanager
    async def hold(self, adapter: Adapter) -> AsyncIterator[int]:
        """Its number, for one job. Loads it first if need be."""
        place = await self._place(adapter)
        place.num_jobs += 1
        try:
            await asyncio.shield(place.ready)  # of all who wait for it: one that gives up must not end it
            yield place.number
        finally:
            place.num_jobs -= 1
            self._look()

    async def close(self, error: Exception) -> None:
        """Whoever waits for an adapter gets this error, now and later. Unloads nothing."""
        self._closed = error
        while self._waiting:
            self._call(self._waiting[0])
        loading = [place.loading for place in self._places.values() if place.loading is not None]
        for place in self._places.values():
            _fail(place.ready, error)
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        self._places.clear()

    async def _place(self, adapter: Adapter) -> _Place:
        waiter: _Waiter | None = None
        while True:
            if self._closed is not None:
                raise self._closed
            if (place := self._places.get(adapter)) is not None:
                self._places.move_to_end(adapter)
                self._look()  # if it was this one's turn, it is now another's
                return place
            if self._has_room() and (waiter is not None or not self._waiting):
                return self._begin(adapter)
            again, waiter = waiter is not None, _Waiter(adapter)
            self._waiting.insert(0 if again else len(self._waiting), waiter)
            try:
                await waiter.turn
            except asyncio.CancelledError:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
                self._look()  # it may have been this one's turn
                raise

    def _has_room(self) -> bool:
        return len(self._places) < self._capacity or self._idle() is not None

    def _idle(self) -> Adapter | None:
        return next((one for one, at in self._places.items() if not at.num_jobs and at.ready.done()), None)

    def _begin(self, adapter: Adapter) -> _Place:
        gone = None
        if len(self._places) >= self._capacity and (idle := self._idle()) is not None:
            gone = self._places.pop(idle).number
        place = self._places[adapter] = _Place(next(_numbers), asyncio.get_running_loop().create_future())
        place.loading = asyncio.create_task(self._fill(place, adapter, gone), name=f"load adapter {adapter.name}")
        for waiter in [one for one in self._waiting if one.adapter == adapter]:
            self._call(waiter)
        return place

    async def _fill(self, place: _Place, adapter: Adapter, gone: int | None) -> None:
        try:
            if gone is not None:
                await self._unload(gone)
            await self._load(adapter, place.number)
        except Exception as error:
            # Whatever the engine said, it is told to the jobs that wait.
            _fail(place.ready, error)
            if self._places.get(adapter) is place:
                del self._places[adapter]
        else:
            if not place.ready.done():
                place.ready.set_result(None)
            log.info("adapter_loaded", extra={"adapter": adapter.name, "loaded": len(self._places)})
        finally:
            place.loading = None
            self._look()

    def _look(self) -> None:
        """Let the job that waits longest look, if there is room. Calling it too often does no harm."""
        if self._waiting and self._has_room():
            self._call(self._waiting[0])

    def _call(self, waiter: _Waiter) -> None:
        self._waiting.remove(waiter)
        if not waiter.turn.done():
            waiter.turn.set_result(None)


def _fail(ready: asyncio.Future[None], error: Exception) -> None:
    if not ready.done():
        ready.set_exception(error)
        ready.exception()  # seen: there may be nobody left who waits


def check_adapter(adapter: Adapter, *, max_rank: int) -> None:
    """Before an engine is asked. Raises EngineUnavailable with the way out."""
    folder = Path(adapter.path)
    try:
        config = json.loads((folder / CONFIG).read_text())
        rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineUnavailable(f"{folder / CONFIG} is not the config of a LoRA adapter: {error}") from None
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise EngineUnavailable(f"{folder} has no adapter weights ({', '.join(WEIGHTS)})")
    if rank > max_rank:
        raise EngineUnavailable(
            f"adapter {adapter.name} has rank {rank}, the engine takes {max_rank}: set CODEYARD_ENGINE_MAX_LORA_RANK"
        )
