"""`codeyard gateway`, `codeyard worker`, `codeyard up`: until SIGTERM or Ctrl-C."""

import asyncio
from typing import Any

import click

from codeyard.cli.options import connection, one_line_errors, serving, settings_of, until_stopped
from codeyard.shared.settings import Settings

ENGINES = click.Choice(["auto", "vllm", "torch", "simulated"])


def engine_options(command: Any) -> Any:
    for option in (
        click.option("--set-alias", is_flag=True, default=None, help="Point the alias at this worker's revision."),
        click.option("--max-running", type=click.IntRange(min=1), help="Jobs in the engine at once. [default: 64]"),
        click.option("--engine", type=ENGINES, help="auto takes vllm, then torch; never simulated. [default: auto]"),
        click.option("--model", help="ALIAS or ALIAS=DIRECTORY_OR_HUGGING_FACE_ID. [default: starter]"),
    ):
        command = option(command)
    return command


@click.command()
@connection
@serving
@click.option("--host", help="Address to listen on. [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65_535), help="0: any free one, printed. [default: 8080]")
@click.option("--grpc-port", type=click.IntRange(0, 65_535), help="Serve gRPC too. 0: any free one, printed.")
@one_line_errors
def gateway(
    host: str | None,
    port: int | None,
    grpc_port: int | None,
    log_level: str | None,
    log_format: str | None,
    **where: Any,
) -> None:
    """Serve the HTTP API, and gRPC where it is asked for.

    \b
    codeyard gateway --port 8080
    curl -i localhost:8080/v1/jobs -H 'Content-Type: application/json' -d '{"model":"starter","prompt":"def f(x):"}'
    """
    _check_gateway()
    from codeyard.producer.gateway.serve import run_gateway

    settings = settings_of(
        **where,
        gateway={"host": host, "port": port, "grpc_port": grpc_port},
        log_level=log_level,
        log_format=log_format,
    )
    until_stopped(settings, lambda stop: run_gateway(settings, stop, on_ready=_say_gateway, on_grpc=_say_grpc))


@click.command()
@connection
@serving
@engine_options
@click.option("--metrics-port", type=click.IntRange(0, 65_535), help="Serve Prometheus metrics on this port.")
@click.option("--memory-profile", is_flag=True, default=None, help="Report what grows with the jobs. Slow.")
@one_line_errors
def worker(
    model: str | None,
    engine: str | None,
    max_running: int | None,
    set_alias: bool | None,
    metrics_port: int | None,
    memory_profile: bool | None,
    log_level: str | None,
    log_format: str | None,
    **where: Any,
) -> None:
    """Consume jobs of one model and generate.

    \b
    codeyard worker                                   the packaged starter model
    codeyard worker --model coder=/models/qwen-7b     a Hugging Face directory, served as "coder"
    """
    from codeyard.worker.service import Ready, run_worker

    settings = settings_of(
        **where,
        worker={
            "model": model,
            "engine": engine,
            "set_alias": set_alias,
            "metrics_port": metrics_port,
            "memory_profile": memory_profile,
        },
        engine={"max_running": max_running},
        log_level=log_level,
        log_format=log_format,
    )

    def say(ready: Ready) -> None:
        click.echo(f"worker {ready.owner} serves {', '.join(ready.aliases)} with {ready.engine.version}")

    until_stopped(settings, lambda stop: run_worker(settings, stop, on_ready=say))


@click.command()
@connection
@serving
@engine_options
@click.option("--host", help="Address to listen on. [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65_535), help="0: any free one, printed. [default: 8080]")
@click.option("--grpc-port", type=click.IntRange(0, 65_535), help="Serve gRPC too. 0: any free one, printed.")
@one_line_errors
def up(
    host: str | None,
    port: int | None,
    grpc_port: int | None,
    model: str | None,
    engine: str | None,
    max_running: int | None,
    set_alias: bool | None,
    log_level: str | None,
    log_format: str | None,
    **where: Any,
) -> None:
    """Gateway and worker on this machine: embedded, unless URLs are given.

    \b
    codeyard up
    codeyard submit 'def add(a, b):' --wait
    """
    _check_gateway()
    settings = settings_of(
        **where,
        gateway={"host": host, "port": port, "grpc_port": grpc_port},
        worker={"model": model, "engine": engine, "set_alias": set_alias},
        engine={"max_running": max_running},
        log_level=log_level,
        log_format=log_format,
    )
    until_stopped(settings, lambda stop: _both(settings, stop))


async def _both(settings: Settings, stop: asyncio.Event) -> None:
    from codeyard.producer.gateway.serve import run_gateway
    from codeyard.worker.service import Ready, run_worker

    def say(ready: Ready) -> None:
        click.echo(f"worker {ready.owner} serves {', '.join(ready.aliases)} with {ready.engine.version}")

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run_worker(settings, stop, on_ready=say), name="worker")
        serving = run_gateway(settings, stop, on_ready=_say_gateway, on_grpc=_say_grpc)
        tasks.create_task(serving, name="gateway")


def _say_gateway(url: str) -> None:
    click.echo(f"gateway {url}")


def _say_grpc(address: str) -> None:
    click.echo(f"grpc {address}")


def _check_gateway() -> None:
    import importlib.util

    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        raise click.ClickException("the gateway is not installed: pip install 'codeyard[gateway]'")
