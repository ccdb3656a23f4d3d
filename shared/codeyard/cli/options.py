"""What the commands share: options that become settings, errors in one line, Ctrl-C and SIGTERM."""

import asyncio
import functools
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from codeyard.shared.errors import FleetError
from codeyard.shared.settings import Settings, load
from codeyard.shared.telemetry import configure_logging

F = TypeVar("F", bound=Callable[..., Any])

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def connection(command: F) -> F:
    """--config, --broker, --store, --namespace: which fleet this is about."""
    for option in (
        click.option("--namespace", help="Prefix of all names at broker and store. [default: codeyard]"),
        click.option("--store", "store_url", metavar="URL", help="redis://... or sqlite:///file."),
        click.option("--broker", "broker_url", metavar="URL", help="amqp://... or sqlite:///file."),
        click.option("--config", type=click.Path(path_type=Path), help="Settings file. [default: ./codeyard.yaml]"),
    ):
        command = option(command)
    return command


def serving(command: F) -> F:
    """--log-level, --log-format: for commands that run until they are told to stop."""
    for option in (
        click.option("--log-format", type=click.Choice(["text", "json"])),
        click.option("--log-level", type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"])),
    ):
        command = option(command)
    return command


def settings_of(
    config: Path | None,
    broker_url: str | None,
    store_url: str | None,
    namespace: str | None,
    **groups: dict[str, Any] | str | None,
) -> Settings:
    """Settings with what the command line gave on top. Options left out (None) change nothing."""
    given: dict[str, Any] = {
        "namespace": namespace,
        "broker": {"url": broker_url},
        "store": {"url": store_url},
        **groups,
    }
    return load(config, _without_none(given))


def one_line_errors(command: F) -> F:
    """Our errors end the command with one line that says the way out, and status 1."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except BaseExceptionGroup as group:
            known, unknown = group.split(FleetError)
            if unknown is not None or known is None:
                raise
            fail(str(_first(known)))
        except FleetError as error:
            fail(str(error))
        except KeyboardInterrupt:
            sys.exit(EXIT_INTERRUPTED)

    return wrapped  # type: ignore[return-value]  # the same callable, wrapped


def fail(message: str) -> None:
    click.echo(f"codeyard: {message}", err=True)
    sys.exit(EXIT_FAILED)


def until_stopped(settings: Settings, serve: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `serve` until SIGTERM or SIGINT sets its event; a second signal ends it at once."""
    configure_logging(settings.log_level, settings.log_format)

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        serving_task = asyncio.ensure_future(serve(stop))

        def on_signal() -> None:
            if stop.is_set():
                serving_task.cancel()
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        try:
            await serving_task
        except asyncio.CancelledError:
            sys.exit(EXIT_INTERRUPTED)

    asyncio.run(main())


def _without_none(given: dict[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in given.items():
        if isinstance(value, dict):
            value = _without_none(value)
            if not value:
                continue
        if value is not None:
            kept[name] = value
    return kept


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
