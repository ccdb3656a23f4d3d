"""A worker's part in rollouts: load and try the new revision, say so, and take the fleet's next step.

Every second, for each alias this worker serves: a rollout at `prepare` is prepared once and reported; what
it brought is served from then on (when to load it is for the station to decide, by what is queued); and if
a step is due, it is written. The steps themselves are in shared/rollout.py.
Called by: worker.service. Does not know about: engines, queues.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from codeyard.shared.alias import Alias, Phase, Rollout, Target
from codeyard.shared.errors import FleetError
from codeyard.shared.rollout import Readiness, Report, advance
from codeyard.shared.store.port import Store
from codeyard.worker.catalogue import Catalogue, Served
from codeyard.worker.patience import persist

log = logging.getLogger(__name__)

PERIOD_S = 1.0


class Rollouts:
    """`reports`, by alias, is this worker's word on each: it goes out with the worker's notice.

    Args:
        prepare: load a revision and have an answer from it. Raises FleetError if that cannot be.
        reports_of: every live worker that serves an alias, and its report, if it made one.
        has_work: whether jobs pinned to a revision may still be anywhere.
    """

    def __init__(
        self,
        store: Store,
        catalogue: Catalogue,
        *,
        prepare: Callable[[Served], Awaitable[None]],
        prepare_s: float,
        reports_of: Callable[[str], Awaitable[Mapping[str, Report | None]]],
        has_work: Callable[[Target], Awaitable[bool]],
    ) -> None:
        self.reports: dict[str, Report] = {}
        self._store = store
        self._catalogue = catalogue
        self._prepare = prepare
        self._prepare_s = prepare_s
        self._reports_of = reports_of
        self._has_work = has_work

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                aliases = await persist(self._store.aliases)
                for alias in aliases.values():
                    if self._catalogue.serves(alias.name):
                        self._take_part(alias, tasks)
                        await self._step(alias)
                await asyncio.sleep(PERIOD_S)

    def _take_part(self, alias: Alias, tasks: asyncio.TaskGroup) -> None:
        rollout = alias.rollout
        if rollout is not None and rollout.phase is Phase.PREPARE:
            report = self.reports.get(alias.name)
            if report is None or report.rollout != rollout.id:
                self.reports[alias.name] = Report(rollout.id, Readiness.LOADING)
                tasks.create_task(self._try(alias.name, rollout), name=f"prepare {rollout.location}")
            return
        self._bring(alias.name, alias.target)
        if rollout is not None and rollout.phase in (Phase.CANARY, Phase.DRAIN) and rollout.new is not None:
            self._bring(alias.name, rollout.new)
            self._bring(alias.name, rollout.old)

    async def _try(self, alias: str, rollout: Rollout) -> None:
        try:
            served = self._catalogue.read(alias, rollout.location)
            async with asyncio.timeout(self._prepare_s):
                await self._prepare(served)
        except TimeoutError:
            report = Report(rollout.id, Readiness.FAILED, error=f"not loaded within {self._prepare_s:g} s")
        except FleetError as error:
            report = Report(rollout.id, Readiness.FAILED, error=str(error))
        else:
            self._catalogue.add(served)
            report = Report(rollout.id, Readiness.READY, served.target)
        log.info(
            "rollout_prepared",
            extra={"alias": alias, "location": rollout.location, "is": report.readiness, "error": report.error},
        )
        self.reports[alias] = report

    def _bring(self, alias: str, target: Target) -> None:
        """Serve what a rollout brought before this worker came."""
        if target.location is None or self._catalogue.has(target.revision):
            return
        try:
            served = self._catalogue.read(alias, target.location)
        except FleetError as error:
            self._catalogue.give_up(target.revision)
            log.error("revision_not_here", extra={"alias": alias, "location": target.location, "error": str(error)})
            return
        if served.revision != target.revision:
            self._catalogue.give_up(target.revision)
            log.error(
                "revision_is_another_here",
                extra={"alias": alias, "location": target.location, "is": served.revision, "wanted": target.revision},
            )
            return
        self._catalogue.add(served)

    async def _step(self, alias: Alias) -> None:
        rollout = alias.rollout
        if rollout is None or rollout.phase not in (Phase.PREPARE, Phase.DRAIN):
            return
        workers: Mapping[str, Report | None] = {}
        old_has_work = True
        if rollout.phase is Phase.PREPARE:
            workers = await self._reports_of(alias.name)
        else:
            old_has_work = await self._has_work(rollout.old)
        wanted = advance(alias, workers, old_has_work=old_has_work)
        if wanted != alias and await persist(lambda: self._store.swap_alias(alias, wanted)) == wanted:
            assert wanted.rollout is not None
            log.info(
                "rollout_moved",
                extra={"alias": alias.name, "phase": wanted.rollout.phase, "revision": wanted.revision},
            )
