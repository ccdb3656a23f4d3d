"""What a worker may serve: the models it was given, their adapters, and the revisions that rollouts bring.

Plain values; nothing is loaded here. A revision stays listed for the life of the process, also when an
alias has moved on: jobs pinned to it may still come back from a delay queue.
Called by: worker.service (what it was given), worker.rollouts (what a rollout brings).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from codeyard.shared.alias import Alias, Target
from codeyard.shared.errors import EngineUnavailable, SettingsError
from codeyard.shared.settings import EngineSettings, Settings
from codeyard.worker.engines.models import ModelSource, context_tokens, fingerprint, parse_model
from codeyard.worker.engines.port import Adapter

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Served:
    """One revision of one model."""

    alias: str
    source: ModelSource
    engine: EngineSettings
    context_tokens: int | None  # where the model's config or the settings say
    adapters: Mapping[str, Adapter] = field(default_factory=dict)  # by the revision that jobs are pinned to

    @property
    def revision(self) -> str:
        return self.source.revision

    @property
    def target(self) -> Target:
        return Target(self.revision, self.source.location, self.context_tokens)

    def aliases(self, *, shards: int, shards_per_tenant: int) -> Iterator[Alias]:
        """What callers may name: the model, and each adapter as `model@adapter`."""
        names = {self.alias: self.revision}
        names |= {f"{self.alias}@{adapter.name}": revision for revision, adapter in self.adapters.items()}
        for name, revision in names.items():
            yield Alias(name, revision, self.context_tokens, shards=shards, shards_per_tenant=shards_per_tenant)


class Catalogue:
    """The revisions a worker may serve, in the order they came."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError, EngineUnavailable."""
        self._settings = settings
        self._served = {one.revision: one for one in served(settings)}
        self._given_up: set[str] = set()

    def __iter__(self) -> Iterator[Served]:
        return iter(list(self._served.values()))

    def serves(self, alias: str) -> bool:
        return any(one.alias == alias for one in self._served.values())

    def has(self, revision: str) -> bool:
        """It is listed, or known not to be here."""
        return revision in self._served or revision in self._given_up

    def add(self, one: Served) -> None:
        self._served.setdefault(one.revision, one)
        self._given_up.discard(one.revision)

    def give_up(self, revision: str) -> None:
        """Its weights are not on this machine; not to be looked for again."""
        self._given_up.add(revision)

    def read(self, alias: str, location: str) -> Served:
        """Another revision of a model. Raises SettingsError, EngineUnavailable."""
        return serve(f"{alias}={location}", self._settings)


def served(settings: Settings) -> list[Served]:
    """What the settings say, in their order. Raises SettingsError, EngineUnavailable."""
    found = [serve(argument.strip(), settings) for argument in settings.worker.model.split(",")]
    names = [one.alias for one in found]
    if len(set(names)) < len(names):
        raise SettingsError(f"two models have one alias: {', '.join(names)}; write ALIAS=DIRECTORY for each")
    return found


def serve(argument: str, settings: Settings) -> Served:
    """One model as `parse_model` reads it. Raises SettingsError, EngineUnavailable."""
    source = parse_model(argument)
    engine = settings.engine_of(source.alias)
    return Served(
        alias=source.alias,
        source=source,
        engine=engine,
        context_tokens=engine.max_model_len or context_tokens(source),
        adapters=_adapters(source, settings),
    )


def _adapters(source: ModelSource, settings: Settings) -> dict[str, Adapter]:
    own = settings.models.get(source.alias)
    found = {}
    for name, directory in (own.adapters if own else {}).items():
        path = Path(directory).expanduser()
        if not path.is_dir():
            raise EngineUnavailable(f"adapter {source.alias}@{name}: there is no directory {path}")
        revision = f"{source.revision}@{name}-{fingerprint(path, config=ADAPTER_CONFIG)}"
        found[revision] = Adapter(name, str(path.resolve()))
    return found
