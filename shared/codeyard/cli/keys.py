"""`codeyard keys make`, `list`, `revoke`: API keys for the gateway. Straight to the store, so for operators."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from typing import Any

import click

from codeyard.cli.jobs import as_json
from codeyard.cli.options import connection, one_line_errors, settings_of
from codeyard.shared.access.keys import ApiKey, Scope, make_key
from codeyard.shared.access.port import KeyStore
from codeyard.shared.connect import open_keys
from codeyard.shared.errors import FleetError
from codeyard.shared.topology import Topology

DAY_S = 86_400.0
DEFAULT_SCOPES = (Scope.SUBMIT, Scope.READ, Scope.CANCEL)


@click.group()
def keys() -> None:
    """Make, list and revoke the gateway's API keys.

    \b
    codeyard keys make laptop --tenant search
    curl localhost:8080/v1/jobs -H "Authorization: Bearer cy_..."
    """


@keys.command()
@click.argument("name")
@connection
@click.option("--tenant", default="default", show_default=True, help="Whose jobs it submits and sees.")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([scope.value for scope in Scope]),
    help="What it may do; again for more. [default: submit, read, cancel]",
)
@click.option("--days", type=click.FloatRange(min=0, min_open=True), help="Expires after so many. [default: never]")
@as_json
@one_line_errors
def make(name: str, tenant: str, scopes: tuple[str, ...], days: float | None, as_json: bool, **where: Any) -> None:
    """Make a key and print it, once: only its hash is kept. NAME is for people."""
    made = make_key(
        name,
        tenant=tenant,
        scopes=[Scope(scope) for scope in scopes] or DEFAULT_SCOPES,
        now=time.time(),
        expires_in_s=None if days is None else days * DAY_S,
    )

    async def put(store: KeyStore) -> bool:
        first = not await store.every()
        await store.put([made.key])
        return first

    first = _with_keys(where, put)
    if as_json:
        click.echo(json.dumps({**_shown(made.key), "key": made.text}))
        return
    click.echo(made.text)
    if first:
        click.echo(
            "codeyard: the first key; restart gateways that run in development mode, to have it asked for", err=True
        )


@keys.command("list")
@connection
@as_json
@one_line_errors
def list_keys(as_json: bool, **where: Any) -> None:
    """List all keys, oldest first, revoked and expired ones too."""
    found = _with_keys(where, lambda store: store.every())
    if as_json:
        click.echo(json.dumps([_shown(key) for key in found]))
    elif not found:
        click.echo("no keys yet: codeyard keys make NAME")
    else:
        _print_table(found)


@keys.command()
@click.argument("key_id", metavar="ID")
@connection
@one_line_errors
def revoke(key_id: str, **where: Any) -> None:
    """Revoke the key with this id: gateways refuse it within CODEYARD_AUTH_KEY_CACHE_S (5 s)."""

    async def put(store: KeyStore) -> None:
        [key] = await store.read([_id_of(key_id)])
        if key is None:
            raise FleetError(f"no key {_id_of(key_id)[:12]}; see `codeyard keys list`")
        if key.revoked_at is None:
            await store.put([key.model_copy(update={"revoked_at": time.time()})])

    _with_keys(where, put)
    click.echo(f"revoked {_id_of(key_id)}")


def _id_of(given: str) -> str:
    """Also of a whole key, so that a leaked one can be revoked as it was found; its secret is not repeated."""
    return given.split("_")[1] if given.startswith("cy_") and given.count("_") == 2 else given


def _with_keys(where: dict[str, Any], call: Callable[[KeyStore], Awaitable[Any]]) -> Any:
    async def main() -> Any:
        settings = settings_of(**where)
        store = await open_keys(settings.store, Topology(settings.namespace))
        try:
            return await call(store)
        finally:
            await store.close()

    return asyncio.run(main())


def _shown(key: ApiKey) -> dict[str, Any]:
    shown = key.model_dump(mode="json", exclude={"v", "digest"}, exclude_none=True)
    return {**shown, "scopes": sorted(shown["scopes"]), "state": key.state(time.time())}


def _print_table(found: list[ApiKey]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("id", "name", "tenant", "scopes", "made", "state"):
        table.add_column(heading, no_wrap=True)
    for key in found:
        made = time.strftime("%Y-%m-%d", time.localtime(key.created_at))
        scopes = " ".join(scope for scope in Scope if scope in key.scopes)
        table.add_row(key.id, escape(key.name), key.tenant, scopes, made, key.state(time.time()))
    Console().print(table)
