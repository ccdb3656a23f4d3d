"""`codeyard models`: what is served where; and rollouts: `rollout`, `status`, `rollback`."""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import click

from codeyard.cli.options import EXIT_FAILED, connection, one_line_errors, settings_of
from codeyard.shared.alias import Alias, Phase, Rollout
from codeyard.shared.connect import open_store
from codeyard.shared.envelope import new_nonce
from codeyard.shared.model_view import model_view
from codeyard.shared.notice import Notice, fleet, reports_of
from codeyard.shared.rollout import begin, change, promote, roll_back, waits_for
from codeyard.shared.settings import Settings
from codeyard.shared.store.port import Store
from codeyard.shared.topology import Topology

POLL_S = 0.5

as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document, for scripts.")
wait_option = click.option(
    "--wait/--no-wait", default=True, show_default=True, help="Show what happens until new jobs go where they should."
)


@click.group(invoke_without_command=True)
@click.pass_context
@connection
@as_json
@one_line_errors
def models(ctx: click.Context, /, as_json: bool, **where: Any) -> None:
    """What is served, by whom; and rollouts of new revisions.

    \b
    codeyard models                                     aliases, revisions, workers
    codeyard models rollout coder --to /models/coder-v2           load it everywhere, try it, switch
    codeyard models rollout coder --to /models/coder-v2 --percent 10
    codeyard models rollout coder --percent 100         give it the rest
    codeyard models status coder
    codeyard models rollback coder                      all new jobs to the old revision, at once

    No job is lost or mixed: each runs on the revision that was live when it was accepted, and its result
    says which. The location must be readable on every worker that serves the model.
    """
    if ctx.invoked_subcommand is not None:
        return

    async def show(settings: Settings, store: Store) -> None:
        aliases, notices = await store.aliases(), await fleet(store)
        if as_json:
            click.echo(json.dumps([model_view(alias, notices) for _, alias in sorted(aliases.items())]))
        elif not aliases:
            click.echo("no models yet: start a worker, e.g. codeyard worker --model coder=/models/coder")
        else:
            _print_table(aliases, notices)

    _with_store(where, show)


@models.command()
@click.argument("alias")
@connection
@click.option("--to", "location", help="Directory or Hugging Face id of the new revision, as the workers see it.")
@click.option("--percent", type=click.IntRange(1, 100), default=100, show_default=True, help="Of new jobs it takes.")
@wait_option
@one_line_errors
def rollout(alias: str, location: str | None, percent: int, wait: bool, **where: Any) -> None:
    """Bring a new revision of ALIAS, or give the one on its way another share of the jobs.

    Every worker of the alias loads it (beside the old one, or in its place as memory allows) and has an
    answer from it; only then does it take jobs. If one cannot, nothing changes. Status 1 if it failed.
    """

    async def run(settings: Settings, store: Store) -> None:
        if location is None:
            decide: Callable[[Alias], Alias] = partial(promote, percent=percent)
        else:
            decide = partial(begin, location=location, rollout_id=new_nonce(), percent=percent, now=time.time())
        changed = await change(store, alias, decide)
        if wait:
            await _follow(store, changed)
        else:
            click.echo(_sentence(changed))

    _with_store(where, run)


@models.command()
@click.argument("alias")
@connection
@as_json
@one_line_errors
def status(alias: str, as_json: bool, **where: Any) -> None:
    """Where the rollout of ALIAS is, and whom it waits for."""

    async def run(settings: Settings, store: Store) -> None:
        found, notices = await change(store, alias, lambda now: now), await fleet(store)
        if as_json:
            click.echo(json.dumps(model_view(found, notices)))
            return
        click.echo(_sentence(found))
        reports = reports_of(notices, alias)
        for name in waits_for(found, reports):
            click.echo(f"  waits for {name}")
        if not reports:
            click.echo("  no worker serves it now")

    _with_store(where, run)


@models.command()
@click.argument("alias")
@connection
@click.option("--reason", default="on request", show_default=True, help="Kept with the rollout.")
@one_line_errors
def rollback(alias: str, reason: str, **where: Any) -> None:
    """All new jobs of ALIAS to the revision before, at once; also when the rollout is done."""

    async def run(settings: Settings, store: Store) -> None:
        click.echo(_sentence(await change(store, alias, partial(roll_back, reason=reason))))

    _with_store(where, run)


def _with_store(where: Mapping[str, Any], run: Callable[[Settings, Store], Awaitable[None]]) -> None:
    async def main() -> None:
        settings = settings_of(**where)
        store = await open_store(settings.store, Topology(settings.namespace))
        try:
            await run(settings, store)
        finally:
            await store.close()

    asyncio.run(main())


async def _follow(store: Store, alias: Alias) -> None:
    """Say each change until new jobs go where they were asked to."""
    said, waiting_said = "", ""
    while True:
        if (sentence := _sentence(alias)) != said:
            click.echo(sentence)
            said = sentence
        rollout = alias.rollout
        if rollout is None or rollout.phase is not Phase.PREPARE:
            break
        reports = reports_of(await fleet(store), alias.name)
        waiting = ", ".join(waits_for(alias, reports)) or ("" if reports else "a worker that serves it")
        if waiting and waiting != waiting_said:
            click.echo(f"  waits for {waiting}")
            waiting_said = waiting
        await asyncio.sleep(POLL_S)
        alias = await change(store, alias.name, lambda now: now)
    if rollout is not None and rollout.phase is Phase.FAILED:
        sys.exit(EXIT_FAILED)


def _sentence(alias: Alias) -> str:
    rollout = alias.rollout
    if rollout is None:
        return f"{alias.name}: {alias.revision}"
    new = rollout.new.revision if rollout.new else rollout.location
    return f"{alias.name}: " + _told(rollout, new)


def _told(rollout: Rollout, new: str) -> str:
    old = rollout.old.revision
    match rollout.phase:
        case Phase.PREPARE:
            return f"preparing {new}; all jobs go to {old}"
        case Phase.CANARY:
            return f"{rollout.percent} % of new jobs go to {new}, the rest to {old}"
        case Phase.DRAIN:
            return f"new jobs go to {new}; {old} finishes those it was given"
        case Phase.DONE:
            return f"new jobs go to {new}; nothing is left for {old}"
        case Phase.FAILED:
            return f"failed, all jobs go to {old}: {rollout.reason}"
        case Phase.ROLLED_BACK:
            return f"rolled back ({rollout.reason}); new jobs go to {old}"


def _print_table(aliases: Mapping[str, Alias], notices: list[Notice]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("alias", "revision", "context", "workers", "loaded", "rollout"):
        table.add_column(heading, justify="right" if heading in ("context", "workers", "loaded") else "left")
    for _, alias in sorted(aliases.items()):
        base = alias.revision.partition("@")[0]
        here = [one for notice in notices for one in notice.models if one.revision == base]
        rollout = alias.rollout
        table.add_row(
            alias.name,
            alias.revision,
            str(alias.context_tokens or ""),
            str(len(here)),
            str(sum(one.tier == "awake" for one in here)),
            _told(rollout, rollout.new.revision if rollout.new else rollout.location) if rollout else "",
        )
    Console().print(table)
