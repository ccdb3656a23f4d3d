"""`codeyard submit`, `result`, `cancel`, `jobs`: a job from the command line."""

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click

from codeyard.cli.options import EXIT_FAILED, connection, one_line_errors, settings_of
from codeyard.producer.async_client import AsyncClient
from codeyard.shared.record import EventKind, JobStatus, State

T = TypeVar("T")

LANES = click.Choice(["interactive", "standard", "bulk"])
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document, for scripts.")


@click.command()
@click.argument("prompt")
@connection
@click.option("--model", default="starter", show_default=True, help="Alias of a model that a worker serves.")
@click.option("--lane", type=LANES, default="standard", show_default=True)
@click.option("--key", help="Idempotency key: the same key and prompt attach to the job there.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 2), help="[default: the engine's]")
@click.option("--timeout", "timeout_s", type=float, default=86_400.0, help="The job's deadline in seconds from now.")
@click.option("--wait", is_flag=True, help="Wait for the result and print it.")
@click.option("--stream", is_flag=True, help="Print tokens as they come.")
@as_json
@one_line_errors
def submit(
    prompt: str,
    model: str,
    lane: str,
    key: str | None,
    max_tokens: int,
    temperature: float | None,
    timeout_s: float,
    wait: bool,
    stream: bool,
    as_json: bool,
    **where: Any,
) -> None:
    """Submit PROMPT (`-` reads standard input) and print the job's id.

    \b
    codeyard submit 'def add(a, b):' --key add-1
    codeyard submit - --stream < prompt.py
    """
    text = sys.stdin.read() if prompt == "-" else prompt

    async def run(client: AsyncClient) -> None:
        job = await client.submit(
            text,
            model=model,
            lane=lane,
            idempotency_key=key,
            sampling={"max_tokens": max_tokens, **({} if temperature is None else {"temperature": temperature})},
            stream=stream,
            timeout_s=timeout_s,
        )
        if stream:
            await _print_stream(client, job.id)
        elif wait:
            _print_status(await client.wait(job.id, timeout_s), as_json)
        elif as_json:
            estimate = {} if job.estimated_start_s is None else {"estimated_start_s": round(job.estimated_start_s, 3)}
            click.echo(json.dumps({"id": job.id, "attached": job.attached, **estimate}))
        else:
            click.echo(job.id)
            if job.estimated_start_s is not None and job.estimated_start_s >= 1:
                click.echo(f"starts in about {job.estimated_start_s:.0f} s", err=True)

    _with_client(where, run)


@click.command()
@click.argument("job_id")
@connection
@click.option("--wait", "wait_s", type=float, default=0.0, help="Seconds to wait for it to be final.")
@click.option("--stream", is_flag=True, help="Follow its tokens instead.")
@as_json
@one_line_errors
def result(job_id: str, wait_s: float, stream: bool, as_json: bool, **where: Any) -> None:
    """Print a job's completion, or its state if it is not final. Status 1 unless it succeeded."""

    async def run(client: AsyncClient) -> None:
        if stream:
            await _print_stream(client, job_id)
            return
        status = await (client.wait(job_id, wait_s) if wait_s > 0 else client.status(job_id))
        _print_status(status, as_json)

    _with_client(where, run)


@click.command()
@click.argument("job_id")
@connection
@as_json
@one_line_errors
def cancel(job_id: str, as_json: bool, **where: Any) -> None:
    """Ask for a job's end: at once if it waits, within about a second if it runs."""

    async def run(client: AsyncClient) -> None:
        verdict = await client.cancel(job_id)
        click.echo(json.dumps({"id": job_id, "outcome": str(verdict)}) if as_json else str(verdict))

    _with_client(where, run)


@click.command()
@connection
@click.option("--limit", type=click.IntRange(1, 1_000), default=20, show_default=True)
@as_json
@one_line_errors
def jobs(limit: int, as_json: bool, **where: Any) -> None:
    """List the newest jobs."""

    async def run(client: AsyncClient) -> None:
        found = await client.recent(limit)
        if as_json:
            click.echo(json.dumps([one.model_dump(mode="json", exclude_none=True) for one in found]))
        elif not found:
            click.echo("no jobs yet: codeyard submit 'def add(a, b):'")
        else:
            _print_table(found)

    _with_client(where, run)


def _with_client(where: dict[str, Any], run: Callable[[AsyncClient], Awaitable[None]]) -> None:
    async def main() -> None:
        async with AsyncClient(settings=settings_of(**where)) as client:
            await run(client)

    asyncio.run(main())


async def _print_stream(client: AsyncClient, job_id: str) -> None:
    async for event in client.stream(job_id):
        if event.kind is EventKind.RESTARTED:
            click.echo("\n-- generated anew --", err=True)
        click.echo(event.text, nl=False)
        if event.kind is EventKind.END:
            click.echo()
            if event.state is not State.SUCCEEDED:
                click.echo(f"codeyard: job {job_id} {event.state}", err=True)
                sys.exit(EXIT_FAILED)


def _print_status(status: JobStatus, as_json: bool) -> None:
    if as_json:
        click.echo(status.model_dump_json(exclude_none=True))
    elif status.result is not None and status.state is State.SUCCEEDED:
        click.echo(status.result.text)
    else:
        error = status.result.error if status.result else None
        click.echo(f"{status.state}{f': {error.message}' if error else ''}", err=status.state.final)
    if status.state is not State.SUCCEEDED:
        sys.exit(EXIT_FAILED)


def _print_table(found: list[JobStatus]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("id", "state", "lane", "model", "age", "tokens"):
        table.add_column(heading, justify="right" if heading in ("age", "tokens") else "left", no_wrap=True)
    now = time.time()
    for one in found:
        tokens = str(one.result.usage.completion_tokens) if one.result else ""
        table.add_row(one.id, one.state, one.lane, one.model, f"{max(0.0, now - one.created_at):.0f} s", tokens)
    Console().print(table)
