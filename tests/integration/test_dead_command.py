"""`codeyard dead`: from a job that failed for good, back to one that succeeds, through every crash between."""

import asyncio
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from support.fleet import Backend, worker_task

from codeyard.cli import dead_letters
from codeyard.cli.dead import Age
from codeyard.cli.dead_letters import in_hand
from codeyard.cli.main import main
from codeyard.producer import AsyncClient
from codeyard.shared.broker.port import Message
from codeyard.shared.connect import open_broker, open_store
from codeyard.shared.errors import BrokerUnavailable, StoreUnavailable
from codeyard.shared.job import Lane
from codeyard.shared.record import State
from codeyard.worker.engines.simulated import simulated_completion

pytestmark = pytest.mark.timeout(90)

ONE_TRY: dict[str, Any] = {"worker": {"max_attempts": 1}}
MENDED: dict[str, Any] = {"engine": {"latency_table": None}}  # the same engine without the fault


async def dead(backend: Backend, *arguments: str) -> Result:
    """The command as a person would run it, in a thread because it brings its own event loop."""
    place = ("--broker", backend.broker_url, "--store", backend.store_url, "--namespace", backend.namespace)
    runner = CliRunner()
    return await asyncio.to_thread(runner.invoke, main, ["dead", arguments[0], *place, *arguments[1:]])


async def as_json(backend: Backend, *arguments: str) -> Any:
    return json.loads((await dead(backend, *arguments, "--json")).stdout)


async def fail_jobs(backend: Backend, client: AsyncClient, *prompts: str, **fields: Any) -> list[str]:
    """Their ids; each failed in the engine and has a letter."""
    async with worker_task(backend.settings(**ONE_TRY)):
        jobs = [await client.submit(prompt, **fields) for prompt in prompts]
        results = [await job.result(timeout=20) for job in jobs]
    assert {result.state for result in results} == {State.FAILED}
    return [job.id for job in jobs]


async def test_a_dead_job_is_listed_shown_redriven_and_succeeds_under_its_old_id(backend: Backend) -> None:
    """The whole way: what a person on call does after the cause is gone."""
    async with backend.client() as client:
        [job_id] = await fail_jobs(backend, client, "!fail 1", tenant="search", idempotency_key="k1")

        [listed] = await as_json(backend, "list")
        shown = await as_json(backend, "show", job_id)
        redriven = await dead(backend, "redrive", job_id)
        async with worker_task(backend.settings(**MENDED)):
            result = (await client.wait(job_id, 20)).result
        afterwards = await as_json(backend, "show", job_id)
        left = await as_json(backend, "list")

    assert (listed["id"], listed["reason"], listed["tenant"], listed["model"]) == (
        job_id,
        "engine_error",
        "search",
        "starter",
    )
    assert listed["history"][0]["attempt"] == 1
    assert {"publication", "incarnation", "tenant", "deadline", "attempt"} <= set(listed["headers"])
    [letter] = shown["letters"]
    assert letter["body"]["prompt"] == "!fail 1"
    assert shown["record"]["state"] == "failed"
    assert (redriven.exit_code, left) == (0, [])
    assert f"{job_id}  accepted again" in redriven.stdout
    assert result is not None
    assert (result.state, result.text) == (State.SUCCEEDED, simulated_completion("!fail 1", 128)[0])
    assert afterwards["letters"] == []
    [past] = afterwards["record"]["history"]
    assert past["result"]["error"]["code"] == "engine_error"
    assert past["incarnation"] == listed["headers"]["incarnation"]


@dataclass
class Dying:
    """A port whose named call fails once, before or after its effect."""

    port: Any
    call: str
    after: bool
    error: Callable[[str], Exception]
    armed: bool = True

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.port, name)
        if name != self.call or not self.armed:
            return real

        async def dying(*arguments: Any, **named: Any) -> Any:
            self.armed = False
            if self.after:
                await real(*arguments, **named)
            raise self.error("died here")

        return dying


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", ["redrive", "publish", "mark_queued", "ack"])
async def test_a_redrive_that_died_at_any_step_is_repeated_and_the_job_runs_once(
    backend: Backend, step: str, after: bool
) -> None:
    """Nothing lost, nothing twice: neither the letter before its job is safe, nor a second result."""
    settings = backend.settings()
    async with backend.client() as client:
        [job_id] = await fail_jobs(backend, client, "!fail 1")
        broker: Any = await open_broker(settings.broker, client.topology)
        store: Any = await open_store(settings.store, client.topology)
        if step in ("redrive", "mark_queued"):
            store = Dying(store, step, after, StoreUnavailable)
        elif step == "publish":
            broker = Dying(broker, step, after, BrokerUnavailable)

        async def redrive_and_die() -> None:
            async with in_hand(broker, client.topology) as hand:
                if step == "ack":
                    hand.consumer = Dying(hand.consumer, "ack", after, BrokerUnavailable)
                await dead_letters.redrive(hand, hand.letters, broker, store, client.topology, timeout_s=10)

        with pytest.raises((BrokerUnavailable, StoreUnavailable)):
            await redrive_and_die()
        await broker.close()
        await store.close()
        again = await as_json(backend, "redrive", "--all")
        async with worker_task(backend.settings(**MENDED)):
            result = (await client.wait(job_id, 20)).result
        [record] = await client.store.read([job_id])
        left = await as_json(backend, "list")

    assert result is not None
    assert result.state is State.SUCCEEDED
    assert left == []
    gone_before = step == "ack" and after
    assert [letter["gone"] for letter in again["letters"]] == ([] if gone_before else [True])
    assert record is not None
    assert (record.attempt, len(record.history)) == (1, 1)


async def test_redriving_twice_is_redriving_once(embedded: Backend) -> None:
    """The second finds nothing to do, and the job has one new life."""
    async with embedded.client() as client:
        [job_id] = await fail_jobs(embedded, client, "!fail 1")

        first = await as_json(embedded, "redrive", "--all")
        second = await as_json(embedded, "redrive", "--all")
        [record] = await client.store.read([job_id])

    assert [letter["outcome"] for letter in first["letters"]] == ["redriven"]
    assert second["letters"] == []
    assert record is not None
    assert (record.state, len(record.history)) == (State.QUEUED, 1)


async def test_filters_choose_and_a_dry_run_changes_nothing(embedded: Backend) -> None:
    """A person must be able to see what a command would do before it does."""
    async with embedded.client() as client:
        [mine] = await fail_jobs(embedded, client, "!fail 1", tenant="mine")
        [other] = await fail_jobs(embedded, client, "!fail 2", tenant="other")

        none = [
            await as_json(embedded, "list", *narrowed)
            for narrowed in (["--reason", "poison"], ["--model", "nobody"], ["--older-than", "1h"])
        ]
        some = [
            [one["id"] for one in await as_json(embedded, "list", *narrowed)]
            for narrowed in (["--tenant", "mine"], ["--reason", "engine_error", "--newer-than", "1h"])
        ]
        foretold = await as_json(embedded, "redrive", "--tenant", "mine", "--dry-run")
        untouched = await as_json(embedded, "list")
        unnarrowed = await dead(embedded, "redrive")
        done = await dead(embedded, "redrive", "--tenant", "mine")
        left = await as_json(embedded, "list")

    assert none == [[], [], []]
    assert some == [[mine], [mine, other]]
    assert foretold == {
        "dry_run": True,
        "letters": [{"id": mine, "outcome": "redriven", "gone": False}],
        "missing": [],
    }
    assert [one["id"] for one in untouched] == [mine, other]
    assert unnarrowed.exit_code == 1
    assert "--all" in unnarrowed.stderr
    assert done.exit_code == 0
    assert [one["id"] for one in left] == [other]


async def test_what_cannot_run_is_named_kept_and_purged_only_with_a_yes(backend: Backend) -> None:
    """A malformed message has no way back; it leaves when a person says so."""
    settings = backend.settings()
    async with worker_task(settings), backend.client() as client:
        job = await client.submit("def good():")
        queue = client.topology.job_queue(job.accepted_status.revision, Lane.STANDARD)
        await client.publisher.publish([Message(queue, "bad-1", b"not json", {})], timeout_s=10)
        await job.result(timeout=20)
        while not (listed := await as_json(backend, "list")):
            pass  # each look is a round trip; the worker is about to bury it

        kept = await as_json(backend, "redrive", "bad-1")
        refused = await dead(backend, "purge", "--all")
        would = await dead(backend, "purge", "--all", "--dry-run")
        still = await as_json(backend, "list")
        purged = await as_json(backend, "purge", "bad-1", "--yes")
        left = await as_json(backend, "list")
        missing = await dead(backend, "show", "bad-1")

    assert (listed[0]["reason"], listed[0]["model"]) == ("malformed", None)
    assert kept["letters"] == [{"id": "bad-1", "outcome": "malformed", "gone": False}]
    assert (refused.exit_code, "--yes" in refused.stderr) == (1, True)
    assert "would purge 1" in would.stdout
    assert len(still) == 1
    assert purged == {"purged": ["bad-1"], "missing": []}
    assert left == []
    assert missing.exit_code == 1


async def test_a_job_whose_revision_nobody_serves_any_more_says_so_and_keeps_its_letter(backend: Backend) -> None:
    """Accepted again in the store, and nowhere to go: both must be told, and repeating must stay possible."""
    async with backend.client() as client:
        async with worker_task(backend.settings()):
            live = await client.submit("def good():")
            await live.result(timeout=20)
        [record] = await client.store.read([live.id])
        assert record is not None
        orphan = record.job.model_copy(update={"id": "6f1ad9f4-6f7f-5c39-9f0e-5d0f6f5e9a11", "revision": "gone-1"})
        letter = Message("no-queue", orphan.id, orphan.encode(), {"reason": "engine_error", "publication": "p1"})
        broker = await open_broker(backend.settings().broker, client.topology)
        await broker.dead_letter([letter], timeout_s=10)
        await broker.close()

        told = await dead(backend, "redrive", orphan.id)
        left = await as_json(backend, "list")
        [waiting] = await client.store.read([orphan.id])

    assert told.exit_code == 1
    assert "no worker ever served its revision" in told.stdout
    assert [one["id"] for one in left] == [orphan.id]
    assert waiting is not None
    assert waiting.state is State.QUEUED


async def test_the_table_fits_and_says_why(embedded: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a person sees first."""
    monkeypatch.setitem(os.environ, "COLUMNS", "140")
    async with embedded.client() as client:
        [job_id] = await fail_jobs(embedded, client, "!fail 1")

        table = (await dead(embedded, "list")).stdout
        shown = (await dead(embedded, "show", job_id)).stdout

    assert [word in table for word in (job_id, "engine_error", "starter", "default")] == [True] * 4
    assert [word in shown for word in ("publication", "!fail 1", "failed, attempt 1")] == [True] * 3


@pytest.mark.parametrize("text, seconds", [("90", 90.0), ("90s", 90.0), ("1.5m", 90.0), ("2h", 7_200.0)])
def test_an_age_is_written_as_people_write_it(text: str, seconds: float) -> None:
    """And anything else is refused, below."""
    assert Age().convert(text, None, None) == seconds


def test_an_age_without_a_number_is_refused() -> None:
    """With an example of what was expected."""
    with pytest.raises(click.BadParameter, match="15m"):
        Age().convert("soon", None, None)
