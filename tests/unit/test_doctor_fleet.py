"""Is somebody there for every model that callers may name?"""

from pathlib import Path

import pytest
from support.doctor import healthy, only, place, worst

from codeyard.cli.checks.check import Place, Status
from codeyard.cli.checks.fleet import check_workers, fleet_findings, known_revisions, pointing_findings
from codeyard.shared.alias import Alias
from codeyard.shared.notice import ModelNotice, Notice
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.sqlite import SqliteStore
from codeyard.shared.topology import Topology
from codeyard.worker.engines.models import parse_model


def worker(*models: tuple[str, str]) -> Notice:
    return Notice("host:1:abc", models=tuple(ModelNotice(alias, revision, "awake") for alias, revision in models))


def aliases(**revisions: str) -> dict[str, Alias]:
    return {name: Alias(name, revision) for name, revision in revisions.items()}


def test_a_fleet_that_serves_all_it_names_is_healthy() -> None:
    """Adapters are served by whoever serves their base."""
    named = {**aliases(coder="coder-1"), "coder@sql": Alias("coder@sql", "coder-1@sql-9")}
    assert healthy(list(fleet_findings(named, [worker(("coder", "coder-1"))])))


def test_an_alias_that_nobody_serves_is_told_with_what_they_serve_instead() -> None:
    """Its jobs are accepted and wait for ever: nothing else says so."""
    finding = worst(list(fleet_findings(aliases(coder="coder-2"), [worker(("coder", "coder-1"))])))
    assert finding.status is Status.WARN  # never a failure: a doctor may run before the worker that would mend it
    assert "coder points to coder-2" in finding.text
    assert "workers of coder have coder-1" in finding.text
    assert "--set-alias" in finding.way_out


def test_without_any_worker_one_line_is_enough() -> None:
    """Not one for each model."""
    assert "jobs for a, b wait" in worst(list(fleet_findings(aliases(a="a-1", b="b-1"), []))).text
    assert healthy(list(fleet_findings({}, [])))


def test_a_worker_that_would_start_here_for_nothing_is_told() -> None:
    """Its revision gets no new jobs until the alias is moved; a rollout moves it by itself."""
    mine = parse_model("starter")
    assert not list(pointing_findings(aliases(starter=mine.revision), [mine]))
    assert (
        "codeyard models rollout starter"
        in worst(list(pointing_findings(aliases(starter="starter-0"), [mine]))).way_out
    )
    rolled = {"starter": Alias("starter", "starter-0", location="/models/starter-0")}
    assert not list(pointing_findings(rolled, [mine]))


@pytest.fixture
def there(tmp_path: Path) -> Place:
    return place(namespace="t", store={"url": f"sqlite:///{tmp_path / 'yard.db'}"})


async def test_the_store_is_asked_and_not_made(there: Place) -> None:
    """With the real one: aliases, and notices that live workers keep there."""
    assert only(await check_workers(there), Status.SKIPPED)
    assert await known_revisions(there) == [parse_model("starter").revision]

    store = await SqliteStore.open(StoreSettings(url=there.settings.store.url), Topology("t"))
    await store.swap_alias(None, Alias("coder", "coder-1@sql-2"))
    assert "no worker is alive" in worst(await check_workers(there)).text
    notice = worker(("coder", "coder-1"))
    await store.announce(notice.owner, notice.encode(), ttl_s=60)
    findings = await check_workers(there)
    await store.close()

    assert healthy(findings)
    assert findings[0].text == "1 alive, serving coder"
    assert await known_revisions(there) == [parse_model("starter").revision, "coder-1"]
