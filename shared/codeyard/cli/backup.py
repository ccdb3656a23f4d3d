"""`codeyard backup`: a whole copy of the embedded file, while everything goes on."""

import json
from pathlib import Path
from typing import Any

import click

from codeyard.cli.jobs import as_json
from codeyard.cli.options import connection, one_line_errors, settings_of
from codeyard.shared.embedded.backup import back_up
from codeyard.shared.embedded.place import embedded_path
from codeyard.shared.errors import SettingsError


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@connection
@as_json
@one_line_errors
def backup(file: Path, as_json: bool, **where: Any) -> None:
    """Copy the embedded file to FILE, while gateways and workers go on.

    The copy is of one moment, holds every job that was confirmed before the command began, and was looked
    through to its last page. FILE must not exist.

    \b
    codeyard backup /backups/yard-$(date +%F).db

    To restore: end every process, move the old file away with its -wal and -shm, put the backup in its
    place, start again:

    \b
    mv ~/.local/state/codeyard/yard.db* /elsewhere/
    cp /backups/yard-2026-11-21.db ~/.local/state/codeyard/yard.db

    Do not use cp on a file in use: its log lies in another file. codeyard refuses such a copy.
    """
    settings = settings_of(**where)
    urls = {settings.store.url, settings.broker.url}
    if not all(url.startswith("sqlite:") for url in urls):
        raise SettingsError("backup is for the embedded file; RabbitMQ and Redis have their own ways")
    if len({embedded_path(url) for url in urls}) > 1:
        raise SettingsError(
            "broker and store lie in two files: back up each, naming it for both: --broker sqlite:///A --store sqlite:///A"
        )
    made = back_up(settings.store.url, file)
    if as_json:
        shown = {"file": str(made.path), "bytes": made.num_bytes, "jobs": made.num_jobs, "messages": made.num_messages}
        click.echo(json.dumps(shown))
    else:
        click.echo(
            f"{made.path}: {made.num_bytes / 2**20:.1f} MiB, {made.num_jobs} jobs, "
            f"{made.num_messages} messages, looked through"
        )
