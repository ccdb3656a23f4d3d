"""Who works, and is somebody there for every model that callers may name?

Never a failure: a doctor that runs before a worker starts (an init container) must not keep the only one from starting.
Called by: cli.doctor; known_revisions also by checks.broker.
"""

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from codeyard.cli.checks.check import Finding, Place, aside, ok, skipped, warn
from codeyard.cli.checks.file import file_format
from codeyard.cli.checks.models import arguments
from codeyard.cli.checks.reach import unreachable
from codeyard.shared.alias import Alias
from codeyard.shared.connect import open_store
from codeyard.shared.embedded.schema import VERSION
from codeyard.shared.errors import EngineUnavailable, MalformedMessage, SettingsError, StoreUnavailable
from codeyard.shared.notice import Notice, fleet
from codeyard.shared.store.port import Store
from codeyard.shared.topology import Topology
from codeyard.worker.engines.models import ModelSource, parse_model


async def check_workers(place: Place) -> list[Finding]:
    try:
        async with _store(place) as store:
            aliases, notices = await store.aliases(), await fleet(store)
    except (StoreUnavailable, SettingsError, MalformedMessage) as error:
        return [skipped(f"the store cannot be asked ({error})")]
    except FileNotFoundError as error:
        return [skipped(f"{error} is not there yet")]
    here = await aside(lambda: list(_models_here(place)))
    return [*fleet_findings(aliases, notices), *pointing_findings(aliases, here)]


async def known_revisions(place: Place) -> list[str]:
    """Of the models here, and of every alias in the store as far as it can be asked."""
    found = [source.revision for source in await aside(lambda: list(_models_here(place)))]
    try:
        async with _store(place) as store:
            found += [alias.revision.partition("@")[0] for alias in (await store.aliases()).values()]
    except (StoreUnavailable, SettingsError, MalformedMessage, FileNotFoundError):
        pass  # the check of the store says why
    return list(dict.fromkeys(found))


@asynccontextmanager
async def _store(place: Place) -> AsyncIterator[Store]:
    """Raises FileNotFoundError for an embedded file that is not there, StoreUnavailable, SettingsError."""
    settings = place.settings.store
    if settings.url.startswith("sqlite:"):
        await aside(lambda: _as_it_is(settings.url))
    elif await unreachable(settings.url, variable="", start="", within_s=place.answer_s) is not None:
        raise StoreUnavailable("see `store`")
    bounded = settings.model_copy(update={"timeout_s": place.answer_s})
    store = await open_store(bounded, Topology(place.settings.namespace))
    try:
        yield store
    finally:
        await store.close()


def _as_it_is(url: str) -> None:
    """Opening would make the file, or bring it to a newer format under a worker that does not know it."""
    path = Path(url.removeprefix("sqlite:///")).expanduser()
    if not path.is_file():
        raise FileNotFoundError(path)
    if (found := file_format(path)) != VERSION:
        raise StoreUnavailable(f"{path} has format {found}, which this codeyard's first worker makes {VERSION}")


def _models_here(place: Place) -> Iterator[ModelSource]:
    for argument in arguments(place.settings):
        try:
            yield parse_model(argument)
        except (SettingsError, EngineUnavailable):
            continue  # `models` says why


def fleet_findings(aliases: Mapping[str, Alias], notices: Sequence[Notice]) -> Iterator[Finding]:
    """Each alias against what the live workers say they serve."""
    if not notices:
        names = ", ".join(sorted(aliases)) or "no model"
        way_out = "codeyard worker --model ALIAS=DIRECTORY, or codeyard up"
        yield (
            warn(f"no worker is alive; jobs for {names} wait", way_out) if aliases else ok("no worker and no model yet")
        )
        return
    served = {model.revision for notice in notices for model in notice.models}
    for name, alias in sorted(aliases.items()):
        if alias.revision.partition("@")[0] not in served:
            others = sorted({m.revision for n in notices for m in n.models if m.alias == name.partition("@")[0]})
            instead = f"; workers of {name} have {', '.join(others)}" if others else ""
            yield warn(
                f"{name} points to {alias.revision}, which no live worker serves: its jobs wait{instead}",
                f"start a worker for it, or point it elsewhere: codeyard worker --model {name}=DIRECTORY --set-alias",
            )
    models = sorted({model.alias for notice in notices for model in notice.models})
    yield ok(f"{len(notices)} alive, serving {', '.join(models) or 'nothing yet'}")


def pointing_findings(aliases: Mapping[str, Alias], here: Sequence[ModelSource]) -> Iterator[Finding]:
    """A worker started here would serve a revision that gets no new jobs."""
    for source in here:
        alias = aliases.get(source.alias)
        if alias is not None and alias.revision != source.revision and alias.location is None:
            yield warn(
                f"{source.alias} points to {alias.revision}; {source.revision}, the one here, would get no new jobs",
                f"codeyard models rollout {source.alias} --to {source.location}, or codeyard worker --set-alias",
            )
