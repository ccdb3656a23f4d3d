"""`codeyard doctor`: what is wrong with this machine, these settings and these servers, and the way out of each.

    settings -> every check at once, each within its limit -> a line for each finding, in the order of CHECKS

Promise: it ends, whatever hangs; it changes nothing that lasts; the exit status is 0 if nothing failed (with
--strict: if nothing warned either). A check that breaks is a finding, not the end of the others.
"""

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from codeyard.cli.checks.broker import check_broker, check_queues
from codeyard.cli.checks.check import Check, Finding, Place, Status, fail, skipped
from codeyard.cli.checks.file import INTEGRITY_S, check_file
from codeyard.cli.checks.fleet import check_workers
from codeyard.cli.checks.gpu import check_gpu
from codeyard.cli.checks.install import IMPORT_S, check_engine, check_python
from codeyard.cli.checks.memory import check_memory
from codeyard.cli.checks.models import check_models
from codeyard.cli.checks.ports import check_ports
from codeyard.cli.checks.settings import (
    Effective,
    check_settings,
    effective,
    explain_refusal,
    unknown_variables,
    without_secrets,
)
from codeyard.cli.checks.store import check_store
from codeyard.cli.options import EXIT_FAILED, connection, one_line_errors, settings_of
from codeyard.shared.errors import SettingsError
from codeyard.shared.settings import Settings

LIMIT_S = 45.0  # of a check
ANSWERS = 9  # of a server, each bounded by --timeout, that one check waits for at most

CHECKS = (
    Check("python", "Python and the packages codeyard needs", check_python, LIMIT_S, needs_settings=False),
    Check("settings", "where settings come from; variables that mean nothing", check_settings, LIMIT_S),
    Check("engine", "the engine imports, and finds the GPU that is there (a minute, cold)", check_engine, IMPORT_S),
    Check("gpu", "GPUs, driver, memory for the models", check_gpu, LIMIT_S),
    Check("models", "the models' files are there and whole", check_models, LIMIT_S),
    Check("memory", "host memory for the models, limits of the container", check_memory, LIMIT_S),
    Check("ports", "gateway's and worker's ports are free, or who has them", check_ports, LIMIT_S),
    Check("file", "the embedded file: writable, local, whole, with room", check_file, LIMIT_S + INTEGRITY_S),
    Check("broker", "RabbitMQ: reachable, recent, lets us in, takes messages", check_broker, LIMIT_S),
    Check("queues", "the fleet's queues are the ones we would make", check_queues, 2 * LIMIT_S),
    Check("store", "Redis: reachable, recent, lets us in, keeps what it was given", check_store, LIMIT_S),
    Check("workers", "who works, and who serves each model", check_workers, LIMIT_S),
)
NAMES = tuple(check.name for check in CHECKS)

WORDS = {Status.OK: "ok", Status.WARN: "warn", Status.FAIL: "FAIL", Status.SKIPPED: "-"}
NARROW = 20  # columns left for a text: then it is not worth keeping it together
COLOURS = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red", Status.SKIPPED: "dim"}


@dataclass(frozen=True, slots=True)
class Report:
    """What one check found."""

    name: str
    findings: list[Finding]
    took_s: float


@click.command()
@connection
@click.option(
    "--only", multiple=True, type=click.Choice(NAMES), metavar="NAME", help="This check alone; may be repeated."
)
@click.option(
    "--timeout",
    "answer_s",
    type=click.FloatRange(0.1, 300),
    default=5.0,
    show_default=True,
    help="Seconds a server has for an answer.",
)
@click.option("--strict", is_flag=True, help="Warnings fail too.")
@click.option(
    "--settings",
    "show_settings",
    is_flag=True,
    help="Show the effective settings, secrets masked, and where each is from.",
)
@click.option("--list", "list_checks", is_flag=True, help="Name the checks and end.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document, for scripts.")
@one_line_errors
def doctor(
    only: tuple[str, ...],
    answer_s: float,
    strict: bool,
    show_settings: bool,
    list_checks: bool,
    as_json: bool,
    **where: Any,
) -> None:
    """Look for what is wrong here, and say the way out.

    \b
    codeyard doctor                                    everything that applies to the settings
    codeyard doctor --only broker --only store         in an init container
    codeyard doctor --settings                         what is set, and where it comes from

    Status 0: nothing failed. 1: something did. Warnings count with --strict.
    """  # fmt: skip
    if list_checks:
        _print_list(as_json)
        return
    logging.getLogger().addHandler(logging.NullHandler())  # what libraries log is in the findings, in words
    environment = dict(os.environ)
    try:
        settings = settings_of(**where)
    except SettingsError as error:
        settings, refusal = Settings.model_construct(), str(error)
    else:
        refusal = ""
    given = {
        "namespace": where["namespace"],
        "broker": {"url": where["broker_url"]},
        "store": {"url": where["store_url"]},
    }
    place = Place(settings, environment, where["config"], given, answer_s)
    if show_settings:
        if refusal:
            raise SettingsError(refusal)
        _print_settings(effective(place), as_json)
        return
    started_s = time.monotonic()
    view = _View(place, quiet=as_json, refused=bool(refusal))
    chosen = [check for check in CHECKS if not only or check.name in only]
    reports = asyncio.run(_examine(chosen, place, refusal, view))
    took_s = time.monotonic() - started_s
    if as_json:
        click.echo(json.dumps(_document(reports, took_s), indent=1))
    else:
        view.summary(reports, took_s)
    bad = {Status.FAIL, Status.WARN} if strict else {Status.FAIL}
    if any(finding.status in bad for report in reports for finding in report.findings):
        sys.exit(EXIT_FAILED)


# Examining -----------------------------------------------------------------------------------------


async def _examine(chosen: Sequence[Check], place: Place, refusal: str, view: "_View") -> list[Report]:
    """All at once; told in their order, each as soon as those before it are."""
    reports = []
    async with asyncio.TaskGroup() as tasks:
        running = {check.name: tasks.create_task(_run(check, place, refusal), name=check.name) for check in chosen}
        for name, task in running.items():
            with view.waiting([name for name, one in running.items() if not one.done()]):
                report = await task
            reports.append(report)
            view.show(report)
    return reports


async def _run(check: Check, place: Place, refusal: str) -> Report:
    started_s = time.monotonic()
    if refusal and check.name == "settings":
        findings = [*explain_refusal(refusal, place.environment), *unknown_variables(place.environment)]
    elif refusal and check.needs_settings:
        findings = [skipped("the settings cannot be read")]
    else:
        findings = await _bounded(check, place)
    return Report(check.name, findings, round(time.monotonic() - started_s, 2))


async def _bounded(check: Check, place: Place) -> list[Finding]:
    limit_s = max(check.limit_s, ANSWERS * place.answer_s)
    try:
        async with asyncio.timeout(limit_s):
            return await check.run(place)
    except TimeoutError:
        text = f"no end after {limit_s:g} s: something it looks at hangs"
        return [
            fail(text, f"codeyard doctor --only {check.name}, on a quiet machine; a disk or a server does not answer")
        ]
    except Exception as error:
        # The edge of a check: whatever it met, the others are still worth having.
        return [fail(f"this check broke: {type(error).__name__}: {error}", "please report it, with the settings")]


# Showing -------------------------------------------------------------------------------------------


class _View:
    """For people. Without a terminal: no colour, no spinner, and a finding is one line, however long."""

    def __init__(self, place: Place, *, quiet: bool, refused: bool) -> None:
        self._console = Console(highlight=False)
        self._quiet = quiet
        self._width = max(map(len, NAMES))
        if not quiet and not refused:
            settings = place.settings
            self._print(Text("codeyard doctor: "), Text(f"namespace {settings.namespace}"))
            urls = {"broker": without_secrets(settings.broker.url), "store": without_secrets(settings.store.url)}
            if urls["broker"] == urls["store"]:
                urls = {"broker and store": urls["store"]}
            for what, url in urls.items():
                self._print(Text(f"{what:<6}  "), Text(url, style="dim"))
            self._print(Text(), Text())

    def waiting(self, names: Sequence[str]) -> AbstractContextManager[object]:
        if self._quiet or not names or not self._console.is_terminal:
            return nullcontext()
        return self._console.status(Text(f"looking at {', '.join(names)}", no_wrap=True, overflow="ellipsis"))

    def show(self, report: Report) -> None:
        if self._quiet:
            return
        for number, finding in enumerate(report.findings):
            head = Text()
            head.append(f"{WORDS[finding.status]:<4}  ", style=COLOURS[finding.status])
            head.append(f"{'' if number else report.name:<{self._width}}  ", style="bold")
            body = Text()
            body.append(finding.text, style="dim" if finding.status is Status.SKIPPED else "")
            self._print(head, body)
            if finding.way_out:
                head = Text(" " * len(head))
                head.append("-> ", style="cyan")
                self._print(head, Text(finding.way_out))

    def summary(self, reports: Sequence[Report], took_s: float) -> None:
        counts = _counts(reports)
        failures, warnings = counts[Status.FAIL], counts[Status.WARN]
        words = [
            f"{counts[Status.OK]} ok",
            f"{warnings} {'warning' if warnings == 1 else 'warnings'}",
            f"{failures} {'failure' if failures == 1 else 'failures'}",
            f"{counts[Status.SKIPPED]} skipped",
        ]
        worst = Status.FAIL if failures else Status.WARN if warnings else Status.OK
        self._print(Text(), Text())
        self._print(Text(), Text(f"{', '.join(words)} in {took_s:.1f} s", style=COLOURS[worst]))

    def _print(self, head: Text, body: Text) -> None:
        """What does not fit goes on below where the body began."""
        room = self._console.width - len(head)
        if not self._console.is_terminal or room < NARROW:
            self._console.print(head + body, soft_wrap=True)
            return
        for number, part in enumerate(body.wrap(self._console, room) or [body]):
            part.rstrip()
            self._console.print((Text(" " * len(head)) if number else head) + part)


def _counts(reports: Sequence[Report]) -> Mapping[Status, int]:
    found = [finding.status for report in reports for finding in report.findings]
    return {status: found.count(status) for status in Status}


def _document(reports: Sequence[Report], took_s: float) -> dict[str, Any]:
    return {
        "ok": not _counts(reports)[Status.FAIL],
        "counts": {str(status): count for status, count in _counts(reports).items()},
        "checks": [asdict(report) for report in reports],
        "took_s": round(took_s, 2),
    }


def _print_list(as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({check.name: check.about for check in CHECKS}, indent=1))
        return
    for check in CHECKS:
        click.echo(f"{check.name:<{max(map(len, NAMES))}}  {check.about}")


def _print_settings(shown: Sequence[Effective], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([asdict(one) for one in shown], indent=1))
        return
    console = Console(highlight=False)
    values = [one.value if isinstance(one.value, str) else json.dumps(one.value) for one in shown]
    if not console.is_terminal:
        for one, value in zip(shown, values, strict=True):
            click.echo(f"{one.variable}={value}  # {one.source}")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("setting", "value", "from"):
        table.add_column(heading, overflow="fold")
    for one, value in zip(shown, values, strict=True):
        table.add_row(one.variable, escape(value), one.source, style="dim" if one.source == "default" else "")
    console.print(table)
