"""How a rollout goes on: plain functions from an alias to the alias it becomes, and one that writes it.

    begin -> prepare -> canary -> drain -> done
                |  '------^ (percent 100) ^
                '-> failed                |          roll_back, from any of them -> rolled_back

Promise: a revision takes no job before every worker that serves the alias has loaded it and had an answer
from it; all of them mean the same weights; the alias moves in one write, and back in one.
Any worker may take a step: each is written only if the alias is still what the step was decided on
(Store.swap_alias), so two who take the same step take it once. There is no leader and no clock in it: a
worker that cannot load within its own time limit reports that, one that died is not asked.
Called by: worker.rollouts (advance), the gateway and `codeyard models` (begin, promote, roll_back).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from codeyard.shared.alias import Alias, Phase, Rollout, Target
from codeyard.shared.errors import RolloutRefused, UnknownModel
from codeyard.shared.store.port import Store


class Readiness(StrEnum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Report:
    """What one worker says of one rollout."""

    rollout: str  # its id
    readiness: Readiness
    target: Target | None = None  # when ready
    error: str = ""  # when failed


def begin(alias: Alias, location: str, *, rollout_id: str, percent: int, now: float) -> Alias:
    """Ask the workers to prepare `location`; once ready it takes `percent` of the new jobs.

    Raises RolloutRefused while another rollout is under way.
    """
    if not 1 <= percent <= 100:
        raise RolloutRefused(f"percent must be 1 to 100, not {percent}")
    if (present := alias.rollout) is not None and not present.phase.over:
        raise RolloutRefused(
            f"{alias.name} has a rollout to {present.location} at {present.phase}: "
            "let it end, promote it with --percent 100, or roll it back"
        )
    return replace(
        alias,
        rollout=Rollout(
            id=rollout_id, phase=Phase.PREPARE, old=alias.target, location=location, percent=percent, started_at=now
        ),
    )


def promote(alias: Alias, percent: int) -> Alias:
    """Give the new revision another share of the new jobs; 100 moves the alias.

    Raises RolloutRefused unless the rollout is at `prepare` or `canary`.
    """
    rollout = alias.rollout
    if rollout is None or rollout.phase not in (Phase.PREPARE, Phase.CANARY):
        raise RolloutRefused(f"{alias.name} has no rollout that could take another share")
    if not 1 <= percent <= 100:
        raise RolloutRefused(f"percent must be 1 to 100, not {percent}")
    changed = replace(rollout, percent=percent)
    if rollout.phase is Phase.CANARY and percent == 100:
        return _switched(alias, changed)
    return replace(alias, rollout=changed)


def roll_back(alias: Alias, reason: str) -> Alias:
    """All new jobs to the old revision again, in one write, wherever the rollout is; also when it is done.

    Raises RolloutRefused if there is nothing to go back from.
    """
    rollout = alias.rollout
    if rollout is None or rollout.phase in (Phase.FAILED, Phase.ROLLED_BACK):
        raise RolloutRefused(f"{alias.name} has no rollout to go back from")
    over = replace(rollout, phase=Phase.ROLLED_BACK, reason=reason)
    return _pointed(alias, rollout.old, over)


def advance(alias: Alias, workers: Mapping[str, Report | None], *, old_has_work: bool) -> Alias:
    """The next step, or the same alias if there is none to take.

    Args:
        workers: every live worker that serves the alias, and its report on this rollout, if it made one.
        old_has_work: a job pinned to the old revision may still be queued, running or waiting for a retry.
    """
    rollout = alias.rollout
    if rollout is None:
        return alias
    if rollout.phase is Phase.PREPARE:
        return _prepared(alias, rollout, workers)
    if rollout.phase is Phase.DRAIN and not old_has_work:
        return replace(alias, rollout=replace(rollout, phase=Phase.DONE))
    return alias


def waits_for(alias: Alias, workers: Mapping[str, Report | None]) -> list[str]:
    """The workers that a rollout at `prepare` waits for."""
    rollout = alias.rollout
    if rollout is None or rollout.phase is not Phase.PREPARE:
        return []
    return [name for name, report in workers.items() if _on(rollout, report) is None]


def _prepared(alias: Alias, rollout: Rollout, workers: Mapping[str, Report | None]) -> Alias:
    reports = {name: report for name, given in workers.items() if (report := _on(rollout, given)) is not None}
    failed = {name: report for name, report in reports.items() if report.readiness is Readiness.FAILED}
    if failed:
        name, report = min(failed.items())
        return _failed(alias, rollout, f"worker {name}: {report.error}")
    if not workers or len(reports) < len(workers):
        return alias
    revisions = {report.target.revision: report.target for report in reports.values() if report.target is not None}
    if len(revisions) > 1:
        return _failed(alias, rollout, f"workers find different weights there: {', '.join(sorted(revisions))}")
    [new] = revisions.values()
    if new.revision == rollout.old.revision:
        return _failed(alias, rollout, f"{rollout.location} has the weights that are served already: {new.revision}")
    ready = replace(rollout, new=new)
    if rollout.percent == 100:
        return _switched(alias, ready)
    return replace(alias, rollout=replace(ready, phase=Phase.CANARY))


def _on(rollout: Rollout, report: Report | None) -> Report | None:
    """A report that decides something: on this rollout, and no longer loading."""
    if report is None or report.rollout != rollout.id or report.readiness is Readiness.LOADING:
        return None
    return report


def _switched(alias: Alias, rollout: Rollout) -> Alias:
    assert rollout.new is not None
    return _pointed(alias, rollout.new, replace(rollout, phase=Phase.DRAIN))


def _pointed(alias: Alias, target: Target, rollout: Rollout) -> Alias:
    return replace(
        alias,
        revision=target.revision,
        location=target.location,
        context_tokens=target.context_tokens,
        rollout=rollout,
    )


def _failed(alias: Alias, rollout: Rollout, reason: str) -> Alias:
    return replace(alias, rollout=replace(rollout, phase=Phase.FAILED, reason=reason))


async def change(store: Store, name: str, decide: Callable[[Alias], Alias]) -> Alias:
    """Write what `decide` makes of the alias, decided anew if somebody else moved it meanwhile.

    Raises UnknownModel, StoreUnavailable, and what `decide` raises.
    """
    alias = (await store.aliases()).get(name)
    if alias is None:
        raise UnknownModel(name)
    while (wanted := decide(alias)) != alias:
        alias = await store.swap_alias(alias, wanted)
        if alias == wanted:
            break
    return alias
