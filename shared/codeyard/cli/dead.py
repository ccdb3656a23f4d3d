"""`codeyard dead list`, `show`, `redrive`, `purge`: the jobs that failed for good, and the way back.

Straight to the broker and the store, so for operators. What is done to a letter: dead_letters.py.
"""

import asyncio
import json
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from codeyard.cli.dead_letters import MAX_HELD, Hand, Letter, Treated, Wanted, foretold, in_hand, redrive
from codeyard.cli.jobs import as_json
from codeyard.cli.options import EXIT_FAILED, connection, fail, one_line_errors, settings_of
from codeyard.shared.blobs.port import BlobStore
from codeyard.shared.broker.port import Broker
from codeyard.shared.claims import hold_on
from codeyard.shared.connect import open_blobs, open_broker, open_store
from codeyard.shared.job import JobId
from codeyard.shared.record import Record
from codeyard.shared.store.port import Store
from codeyard.shared.topology import Topology

F = TypeVar("F", bound=Callable[..., Any])

UNITS_S = {"s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
SHOWN_CHARS = 400  # of a prompt or a body, for people; --json has all of it


class Age(click.ParamType[float]):
    """`90`, `90s`, `15m`, `2h`, `7d`: seconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", str(value))
        if found is None:
            self.fail(f"{value!r} is no age; write 90s, 15m, 2h or 7d", param, ctx)
        return float(found[1]) * UNITS_S[found[2] or "s"]


def selection(command: F) -> F:
    """--reason, --model, --tenant, --older-than, --newer-than: which letters."""
    for option in (
        click.option("--newer-than", "newer_s", type=Age(), metavar="AGE", help="Dead for less than this."),
        click.option("--older-than", "older_s", type=Age(), metavar="AGE", help="Dead for this long: 15m, 2h, 7d."),
        click.option("--tenant", help="Of this tenant."),
        click.option("--model", help="For this alias."),
        click.option("--reason", "reasons", multiple=True, help="With this reason; again for more."),
    ):
        command = option(command)
    return command


every = click.option("--all", "everything", is_flag=True, help="All of them, where nothing else narrows it.")


@click.group()
def dead() -> None:
    """Look at dead letters, run their jobs once more, or throw them away.

    A job is dead when it failed and trying again would not help, or not any more: its message lies in the
    queue NAMESPACE.dead with the reason, its history and its original headers, and its record says failed.
    Nothing takes letters out but these commands.

    \b
    codeyard dead list                               what is there, and why
    codeyard dead show ID                            one of them, with everything
    codeyard dead redrive --reason engine_error --dry-run
    codeyard dead redrive --reason engine_error      run them once more, under their old ids
    codeyard dead purge --older-than 7d --yes        throw away

    \b
    reasons you may meet
      engine_error       every attempt failed in the engine: redrive once the cause is gone
      poison             ran alone and took the engine down, three times: look first, then redrive or purge
      prompt_too_long    this model can never run it: submit it to another one, then purge
      malformed          the message is no job; whoever published it has to mend it: purge
      conflict           its id belongs to a job with another body: purge, and mend the publisher
      record_missing     it came too late, after its deadline: redrive gives it a new one
      dropped_by_broker  the broker gave it up (a policy, a foreign consumer's reject): redrive
    """


@dead.command("list")
@connection
@selection
@click.option("--limit", type=click.IntRange(1, MAX_HELD), default=50, show_default=True)
@as_json
@one_line_errors
def list_letters(limit: int, as_json: bool, **rest: Any) -> None:
    """List dead letters, oldest first.

    Looking takes them in hand for a moment; a second look at the same time finds fewer. They all go back.
    """
    wanted, where = _split(rest)

    async def run(yard: Yard) -> None:
        hand = yard.hand
        found = hand.select(wanted)
        if as_json:
            click.echo(json.dumps([_summary(letter, hand.now) for letter in found[:limit]]))
        elif not found:
            click.echo("no dead letters" if not hand.letters else f"none of {len(hand.letters)} dead letters fits")
        else:
            _print_table(found[:limit], hand.now)
            if len(found) > limit:
                click.echo(f"and {len(found) - limit} more: --limit {len(found)}")

    _with_letters(where, run)


@dead.command()
@click.argument("letter_id", metavar="ID")
@connection
@as_json
@one_line_errors
def show(letter_id: str, as_json: bool, **where: Any) -> None:
    """Show one letter: why it died, its attempts, headers and body, and what its job's record says now.

    Also of a job whose letter is gone, because it was redriven: how its earlier lives ended.
    """

    async def run(yard: Yard) -> None:
        found = yard.hand.select(Wanted(ids=frozenset({letter_id})))
        [record] = await yard.store.read([letter_id])
        if not found and not (record and record.history):
            fail(f"no dead letter {letter_id}; see `codeyard dead list`, and `codeyard result {letter_id}`")
        if as_json:
            letters = [_details(letter, yard.hand.now) for letter in found]
            click.echo(json.dumps({"id": letter_id, "letters": letters, "record": _kept(record)}))
        else:
            for letter in found:
                _print_details(_details(letter, yard.hand.now))
            _print_record(_kept(record))

    _with_letters(where, run)


@dead.command("redrive")
@click.argument("ids", metavar="[ID]...", nargs=-1)
@connection
@selection
@every
@click.option("--dry-run", is_flag=True, help="Only say what would happen.")
@as_json
@one_line_errors
def redrive_letters(ids: tuple[str, ...], everything: bool, dry_run: bool, as_json: bool, **rest: Any) -> None:
    """Run dead jobs once more.

    A job keeps its id and key: whoever polls for it sees it queued again. It begins a new life with a full
    deadline and no attempts; how the old one ended stays in its record's history (`codeyard dead show ID`).
    Twice is once, and Ctrl-C at any moment loses nothing: run it again. Status 1 if a letter that was meant
    is still there.

    \b
    codeyard dead redrive 4bcd2a8e-...        these
    codeyard dead redrive --tenant search     all of a tenant's
    codeyard dead redrive --all --dry-run     what would happen to each
    """
    wanted, where = _split(rest, ids)
    _must_be_narrowed(wanted, everything)

    async def run(yard: Yard) -> None:
        chosen = yard.hand.select(wanted)
        if dry_run:
            treated = await foretold(chosen, yard.store)
        else:
            await hold_on(yard.blobs, [one.envelope.job for one in chosen if one.envelope], yard.store.timing)
            places = (yard.hand, chosen, yard.broker, yard.store, yard.topology)
            treated = await redrive(*places, timeout_s=yard.publish_timeout_s)
        _report(treated, _missing(wanted, chosen), as_json, dry_run)

    _with_letters(where, run)


@dead.command()
@click.argument("ids", metavar="[ID]...", nargs=-1)
@connection
@selection
@every
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--dry-run", is_flag=True, help="Only say which.")
@as_json
@one_line_errors
def purge(ids: tuple[str, ...], everything: bool, yes: bool, dry_run: bool, as_json: bool, **rest: Any) -> None:
    """Throw letters away, for good. Their jobs stay failed; their records end with their lifetime.

    \b
    codeyard dead purge --older-than 30d --yes
    """
    wanted, where = _split(rest, ids)
    _must_be_narrowed(wanted, everything)
    if not yes and not dry_run and not sys.stdin.isatty():
        fail("purging is for good and nobody can be asked here: add --yes")

    async def run(yard: Yard) -> None:
        chosen = yard.hand.select(wanted)
        gone = bool(chosen) and not dry_run and (yes or await _agreed(f"throw away {len(chosen)} dead letters?"))
        if gone:
            await yard.hand.ack(chosen)
        if as_json:
            purged = [letter.id for letter in chosen]
            click.echo(json.dumps({"purged" if gone else "kept": purged, "missing": _missing(wanted, chosen)}))
        else:
            click.echo(f"{'purged' if gone else 'would purge' if dry_run else 'kept'} {len(chosen)}")
        if _missing(wanted, chosen):
            fail(f"no dead letter {', '.join(_missing(wanted, chosen))}")

    _with_letters(where, run)


# What the commands share ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Yard:
    """Where a command works, and the letters it has in hand."""

    hand: Hand
    broker: Broker
    store: Store
    blobs: BlobStore
    topology: Topology
    publish_timeout_s: float


def _with_letters(where: dict[str, Any], work: Callable[[Yard], Awaitable[None]]) -> None:
    async def main() -> None:
        settings = settings_of(**where)
        topology = Topology(settings.namespace)
        broker = await open_broker(settings.broker, topology)
        try:
            store = await open_store(settings.store, topology)
            try:
                blobs = await open_blobs(settings.store, topology)
                try:
                    async with in_hand(broker, topology) as hand:
                        await work(Yard(hand, broker, store, blobs, topology, settings.broker.publish_timeout_s))
                finally:
                    await blobs.close()
            finally:
                await store.close()
        finally:
            await broker.close()

    asyncio.run(main())


async def _agreed(question: str) -> bool:
    """In a thread, so that the letters' connection stays alive while somebody thinks."""
    return await asyncio.to_thread(click.confirm, question)


def _split(rest: dict[str, Any], ids: Sequence[str] = ()) -> tuple[Wanted, dict[str, Any]]:
    """What the selection's options say, and what is left for the settings."""
    wanted = Wanted(
        ids=frozenset(ids),
        reasons=frozenset(rest.pop("reasons")),
        **{name: rest.pop(name) for name in ("model", "tenant", "older_s", "newer_s")},
    )
    return wanted, rest


def _must_be_narrowed(wanted: Wanted, everything: bool) -> None:
    if wanted.everything and not everything:
        fail("say which: ids, --reason, --model, --tenant, --older-than, --newer-than, or --all")


def _missing(wanted: Wanted, chosen: Sequence[Letter]) -> list[str]:
    return sorted(wanted.ids - {letter.id for letter in chosen})


def _report(treated: Sequence[Treated], missing: Sequence[JobId], as_json: bool, dry_run: bool) -> None:
    if as_json:
        each = [{"id": one.letter.id, "outcome": str(one.outcome), "gone": one.gone} for one in treated]
        click.echo(json.dumps({"dry_run": dry_run, "letters": each, "missing": list(missing)}))
    else:
        for one in treated:
            click.echo(f"{one.letter.id}  {one.text}")
        would = "would be " if dry_run else ""
        accepted = sum(one.outcome == "redriven" for one in treated)
        click.echo(f"{accepted} of {len(treated)} {would}accepted again")
    for job_id in missing:
        click.echo(f"codeyard: no dead letter {job_id}", err=True)
    if missing or (not dry_run and not all(one.gone for one in treated)):
        sys.exit(EXIT_FAILED)


def _summary(letter: Letter, now: float) -> dict[str, Any]:
    job, age_s = letter.job, letter.age_s(now)
    return {
        "id": letter.id,
        "reason": letter.reason,
        "error": letter.error,
        "queue": letter.queue,
        "tenant": letter.tenant,
        "model": job.model if job else None,
        "revision": job.revision if job else None,
        "lane": job.lane if job else None,
        "age_s": None if age_s is None else round(age_s, 1),
        "history": letter.history,
        "headers": letter.headers,
    }


def _details(letter: Letter, now: float) -> dict[str, Any]:
    body: Any = letter.delivery.body.decode(errors="replace")
    if letter.job is not None:
        body = letter.job.model_dump(mode="json", exclude_none=True)
    return {**_summary(letter, now), "body": body}


def _kept(record: Record | None) -> dict[str, Any] | None:
    return record.model_dump(mode="json", exclude={"job"}, exclude_none=True) if record else None


def _print_details(details: dict[str, Any]) -> None:
    body = details.pop("body")
    for name, value in details.items():
        click.echo(f"{name:10} {json.dumps(value) if isinstance(value, dict | list) else value}")
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
    more = len(text) - SHOWN_CHARS
    click.echo(f"{'body':10} {text[:SHOWN_CHARS]}{f' ... {more} more characters: --json' if more > 0 else ''}")


def _print_record(record: dict[str, Any] | None) -> None:
    if record is None:
        click.echo(f"{'record':10} none: its lifetime is over, or it never had one")
        return
    click.echo(f"{'record':10} {record['state']}, attempt {record['attempt']}, incarnation {record['incarnation']}")
    for past in record["history"]:
        error = past["result"].get("error", {})
        click.echo(f"{'before':10} {past['result']['state']}: {error.get('code', '')}: {error.get('message', '')}")


def _print_table(found: Sequence[Letter], now: float) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("id", "reason", "model", "tenant", "age"):
        table.add_column(heading, no_wrap=True, justify="right" if heading == "age" else "left")
    table.add_column("error", overflow="ellipsis", no_wrap=True)
    for letter in found:
        model = letter.job.model if letter.job else ""
        cells = (letter.id, letter.reason, model, letter.tenant, _age_text(letter.age_s(now)), letter.error)
        table.add_row(*(escape(cell) for cell in cells))
    Console().print(table)


def _age_text(age_s: float | None) -> str:
    if age_s is None:
        return ""
    unit = next((unit for unit in ("d", "h", "m") if age_s >= UNITS_S[unit]), "s")
    return f"{age_s / UNITS_S[unit]:.0f} {unit}"
