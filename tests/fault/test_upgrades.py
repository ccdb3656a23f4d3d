"""Two releases at once on one RabbitMQ and one Redis, and what the previous one left behind: docs/upgrades.md."""

import asyncio
import json
import signal
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis.asyncio import Redis
from support.fleet import Backend, latency_table, worker_task
from support.releases import PRESENT, REPOSITORY, client, following, previous, worker

from codeyard.producer.gateway.serve import DRAIN_MARGIN_S
from codeyard.shared import job as job_module
from codeyard.shared.alias import Alias
from codeyard.shared.broker.port import Delivery, Message, PublishOutcome
from codeyard.shared.connect import open_broker
from codeyard.shared.envelope import PASSED_ON, open_delivery
from codeyard.shared.errors import LaterVersion, MalformedMessage
from codeyard.shared.job import Job, Lane, new_job_id
from codeyard.shared.notice import Notice
from codeyard.shared.record import Event, EventKind, Record, State
from codeyard.shared.settings import GatewaySettings, StoreSettings, WorkerSettings
from codeyard.shared.store import redis_codec
from codeyard.shared.store.port import Claim, ClaimVerdict, Commit, CommitVerdict
from codeyard.shared.store.redis import RedisStore
from codeyard.shared.topology import Topology
from codeyard.worker.engines.simulated import simulated_completion
from codeyard.worker.intake import MAX_PASSES
from codeyard.worker.line import SHUTDOWN_S

pytestmark = pytest.mark.timeout(120)

MAX_TOKENS = 48
LONG = 160
CORPUS = Path(__file__).with_name("corpus") / "v1.json"  # made by release_corpus.py of the previous release
PATIENCE_S = 30.0


@pytest.fixture
def servers(tmp_path: Path, rabbitmq_url: str, redis_url: str, namespace: str) -> Backend:
    return Backend(tmp_path, rabbitmq_url, redis_url, namespace)


def config(backend: Backend, name: str, *, time_scale: float) -> Path:
    """Settings that both releases know; those of the present may have more. JSON is YAML."""
    path = backend.folder / f"{name}.yaml"
    settings = {
        "namespace": backend.namespace,
        "broker": {"url": backend.broker_url},
        "store": {"url": backend.store_url, "lease_s": 1.0, "renew_s": 0.2, "grace_s": 0.2},
        "worker": {"engine": "simulated", "stall_s": 5, "drain_s": 10},
        "engine": {"latency_table": str(latency_table(backend.folder)), "time_scale": time_scale, "max_running": 4},
    }
    path.write_text(json.dumps(settings))
    return path


def submission(key: str, *, max_tokens: int = MAX_TOKENS, stream: bool = False) -> dict[str, Any]:
    return {"submit": f"def {key}(", "key": key, "max_tokens": max_tokens, "stream": stream}


@pytest.fixture(params=["embedded", pytest.param("servers", marks=pytest.mark.services)])
def backend(request: pytest.FixtureRequest, tmp_path: Path, namespace: str) -> Backend:
    """SQLite for both ports, then RabbitMQ and Redis."""
    if request.param == "embedded":
        url = f"sqlite:///{tmp_path / 'yard.db'}"
        return Backend(tmp_path, url, url, namespace)
    return Backend(tmp_path, request.getfixturevalue("rabbitmq_url"), request.getfixturevalue("redis_url"), namespace)


# Two releases at once ------------------------------------------------------------------------------


@pytest.mark.services
@pytest.mark.process
async def test_the_previous_release_and_this_one_share_the_queues_and_every_job_ends_once(servers: Backend) -> None:
    """Both releases submit, work and read: each job is run by one of them, and both read the same of it. A key
    names the same job for both."""
    old = previous(servers.folder)
    settings = config(servers, "yard", time_scale=1.0)
    of_old = [submission(f"old_{n}", stream=n % 2 == 0) for n in range(24)]
    of_new = [submission(f"new_{n}", stream=n % 2 == 0) for n in range(24)]
    async with worker(old, settings, "old") as older, worker(PRESENT, settings, "new") as newer:
        told = await asyncio.gather(client(old, settings, of_old), client(PRESENT, settings, of_new))
        crossed = await asyncio.gather(client(old, settings, of_new), client(PRESENT, settings, of_old))
        prompts = {one["id"]: asked["submit"] for one, asked in zip(told[0] + told[1], of_old + of_new, strict=True)}
        readings = [{"read": job_id} for job_id in prompts]
        read_by_old, read_by_new = await asyncio.gather(
            client(old, settings, readings), client(PRESENT, settings, readings)
        )
        ends = [await each.end(signal.SIGTERM) for each in (older, newer)]

    assert [one["id"] for one in crossed[0] + crossed[1]] == [one["id"] for one in told[1] + told[0]]
    assert all(one["attached"] for one in crossed[0] + crossed[1])
    assert read_by_old == read_by_new
    for one in read_by_new:
        text, token_ids, _ = simulated_completion(prompts[one["id"]], MAX_TOKENS)
        assert (one["state"], one["text"], one["streamed"]) == ("succeeded", text, text)
        assert one["usage"]["completion_tokens"] == len(token_ids)
        assert one["seqs"] == list(range(1, len(one["seqs"]) + 1))
    committed = Counter(line["job"] for each in (older, newer) for line in each.ended())
    assert committed == dict.fromkeys(prompts, 1)
    assert min(len(older.ended()), len(newer.ended())) > 0, "one of them did all the work"
    assert ends == [0, 0]


@pytest.mark.services
@pytest.mark.process
@pytest.mark.long
@pytest.mark.parametrize("dies", ["the previous release", "this one"])
async def test_either_release_goes_on_with_what_the_other_had_begun(servers: Backend, dies: str) -> None:
    """A worker is killed in the middle of its streams during an upgrade, or a rollback: the other one goes on from
    the tokens in the store, without gap or repeat."""
    old = previous(servers.folder)
    first, then = (old, PRESENT) if dies == "the previous release" else (PRESENT, old)
    slow, fast = config(servers, "slow", time_scale=10.0), config(servers, "fast", time_scale=0.3)
    asked = [submission(f"long_{n}", max_tokens=LONG, stream=True) for n in range(4)]
    async with worker(first, slow, "first") as dying:
        jobs = [one["id"] for one in await client(then, fast, asked)]
        await begun(servers, jobs)
        await dying.end(signal.SIGKILL)
    async with worker(then, fast, "then") as heir:
        read = await client(first, fast, [{"read": job_id} for job_id in jobs])

    assert dying.ended() == []
    assert sorted(line["job"] for line in heir.ended()) == sorted(jobs)
    for one, submitted in zip(read, asked, strict=True):
        text, token_ids, _ = simulated_completion(submitted["submit"], LONG)
        assert (one["state"], one["attempt"], one["streamed"]) == ("succeeded", 2, text)
        assert one["usage"]["completion_tokens"] == len(token_ids)
        assert one["seqs"] == list(range(1, len(one["seqs"]) + 1))


async def begun(backend: Backend, jobs: list[str]) -> None:
    """Return when each of these has shown a token."""
    async with backend.client() as reader:
        for job_id in jobs:
            stream = reader.stream(job_id)
            await anext(stream)
            await stream.aclose()


@pytest.mark.services
@pytest.mark.process
async def test_jobs_of_a_later_version_wait_for_a_worker_that_reads_them(servers: Backend) -> None:
    """The present release is the old one here. Producers were upgraded first, which is the wrong way round: the old
    worker passes on what it cannot read and goes on with what it can; nothing is dead-lettered, no attempt charged,
    and neither the worker nor its reconciler stops at records it does not understand."""
    new = following(servers.folder)
    settings = config(servers, "yard", time_scale=0.5)
    of_old, of_new = [submission(f"v1_{n}") for n in range(6)], [submission(f"v2_{n}", stream=True) for n in range(6)]
    async with worker(PRESENT, settings, "old") as older:
        later = [one["id"] for one in await client(new, settings, of_new)]
        readable = [one["id"] for one in await client(PRESENT, settings, of_old)]
        await older.says("messages_of_a_later_version")
        await older.says("job_ended", times=len(readable))
        async with worker(new, settings, "new") as newer:
            ended = await older.end(signal.SIGTERM)
            read = await client(new, settings, [{"read": job_id} for job_id in [*later, *readable]])
            by_old, by_new = (Counter(line["job"] for line in each.ended()) for each in (older, newer))
    dead = await depth(servers, Topology(servers.namespace).dead_queue)

    assert (ended, by_old, by_new) == (0, dict.fromkeys(readable, 1), dict.fromkeys(later, 1))
    assert [(one["state"], one["attempt"]) for one in read] == [("succeeded", 1)] * 12
    for one, asked in zip(read, [*of_new, *of_old], strict=True):
        assert one["text"] == simulated_completion(asked["submit"], MAX_TOKENS)[0]
    assert dead == 0


async def depth(backend: Backend, queue: str) -> int:
    broker = await open_broker(backend.settings().broker, Topology(backend.namespace))
    try:
        [ready] = await broker.depth([queue])
        return ready
    finally:
        await broker.close()


# A message of a later version ----------------------------------------------------------------------


def body_of(version: int, **fields: object) -> bytes:
    job_id = new_job_id()
    job = {"id": job_id, "key": job_id, "model": "starter", "revision": "r", "prompt": "def f(", **fields}
    return json.dumps({**job, "v": version}).encode()


def test_a_body_of_another_version_is_told_from_a_broken_one() -> None:
    """What a newer release reads must be handed on; what nobody reads must not."""
    with pytest.raises(LaterVersion, match="version 2"):
        Job.decode(body_of(2, prompt={"of": "another shape"}))
    for nonsense in (b"{}", body_of(0), body_of(1, prompt=""), b'{"v": true}', b'{"v": "2"}', b"[2]"):
        with pytest.raises(MalformedMessage) as refused:
            Job.decode(nonsense)
        assert not isinstance(refused.value, LaterVersion)


def test_a_release_reads_the_version_before_its_own_and_says_so_of_older_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it will be with version 3: 2 is translated in one place, 1 is refused, 4 is left to a newer release."""

    def from_2(fields: dict[str, Any]) -> dict[str, Any]:
        return {**{name: value for name, value in fields.items() if name != "input"}, "prompt": fields["input"]}

    monkeypatch.setattr(job_module, "WIRE_VERSION", 3)
    monkeypatch.setattr(job_module, "FROM_BEFORE", {2: from_2})
    before = json.loads(body_of(2, input="def g("))
    del before["prompt"]

    read = Job.decode(json.dumps(before).encode())

    assert (read.v, read.prompt) == (3, "def g(")
    assert Job.decode(body_of(3)).v == 3
    with pytest.raises(MalformedMessage, match="version 1; this release does not read it any more"):
        Job.decode(body_of(1))
    with pytest.raises(LaterVersion):
        Job.decode(body_of(4))


async def test_a_message_that_no_worker_could_read_for_long_is_dead_lettered_with_that_reason(
    backend: Backend,
) -> None:
    """A version that nobody ever brings must not go round for ever; and one that may still come is not given up."""
    settings, topology = backend.settings(), Topology(backend.namespace)
    broker = await open_broker(settings.broker, topology)
    try:
        async with worker_task(settings), backend.client() as submitter:
            good = await submitter.submit("def good(")
            queue = topology.job_queue(good.accepted_status.revision, Lane.STANDARD)
            times = {"given-up": MAX_PASSES, "in-time": MAX_PASSES - 1}
            sent = [Message(queue, name, body_of(2), {PASSED_ON: count}) for name, count in times.items()]
            assert set(await broker.publish(sent, timeout_s=10)) == {PublishOutcome.CONFIRMED}
            letters = await broker.consume({topology.dead_queue: 10})
            async with asyncio.timeout(PATIENCE_S):
                dead = await letters.receive(10)
            succeeded = await good.result(timeout=PATIENCE_S)
            await letters.close()
    finally:
        await broker.close()

    assert [(one.message_id, one.headers["reason"]) for one in dead] == [("given-up", "later_version")]
    assert (dead[0].body, dead[0].headers["error"]) == (
        sent[0].body,
        "a job of version 2; this release reads up to 1",
    )
    assert succeeded.state is State.SUCCEEDED


# What the platform must give -----------------------------------------------------------------------


def test_the_grace_periods_of_compose_are_longer_than_a_stop_takes() -> None:
    """Else every upgrade would end in kill -9: nothing is lost then, but answers are cut off."""
    services = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]
    grace_s = {name: float(services[name]["stop_grace_period"].removesuffix("s")) for name in services}
    gateway, drain_s = GatewaySettings(), WorkerSettings().drain_s

    ending_s = max(gateway.submit_timeout_s, gateway.drain_s) + DRAIN_MARGIN_S
    assert grace_s["gateway"] > gateway.leave_s + ending_s
    assert min(grace_s["worker"], grace_s["worker-gpu"]) > drain_s + SHUTDOWN_S


# What the previous release left behind -------------------------------------------------------------


@cache
def corpus() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(CORPUS.read_text())
    return found


def record_of(name: str) -> Record:
    stored = corpus()["records"][name]
    return redis_codec.record([stored.get(field, False) for field in redis_codec.FIELDS])


NAMES = sorted(corpus()["messages"])


@pytest.mark.parametrize("name", NAMES)
def test_a_message_that_the_previous_release_published_is_the_same_job_here(name: str) -> None:
    """Its digest too: a key that was used before an upgrade must find its job after it."""
    sent = corpus()["messages"][name]

    opened = open_delivery(
        Delivery(sent["queue"], sent["message_id"], sent["body"].encode(), sent["headers"], False, 1.0, 1)
    )

    assert (opened.job.id, opened.job.key, opened.publication) == (sent["message_id"], name, f"p-{name}")
    assert opened.digest == corpus()["digests"][name]
    assert json.loads(opened.job.encode()).items() >= json.loads(sent["body"]).items()


@pytest.mark.parametrize("name", NAMES)
def test_a_record_and_its_stream_of_the_previous_release_are_read_here(name: str) -> None:
    """Who polls, streams, cancels or redrives after an upgrade finds what was there before."""
    record = record_of(name)
    events = [Event.decode(text) for text in corpus()["streams"][name]]
    expected = {"cancelled": State.CANCELLED, "redriven": State.QUEUED, "running": State.RUNNING}

    assert record.state is expected.get(name, State.SUCCEEDED)
    assert record.digest == record.job.digest()
    assert (record.result is not None) == record.state.final
    assert [event.seq for event in events] == list(range(1, record.last_seq + 1))
    if record.state is State.SUCCEEDED:
        assert record.result is not None
        kept = events[[event.kind for event in events].index(EventKind.RESTARTED) :]
        assert "".join(event.text for event in kept) == record.result.text == "    return größer"
        assert (record.result.usage.completion_tokens, record.result.engine) == (3, "simulated 1")
    if name == "redriven":
        assert [past.result.error.code for past in record.history if past.result.error] == ["engine_error"]
    assert (record.callback != "") == (name == "told")


def test_aliases_and_notices_of_the_previous_release_are_read_here() -> None:
    """A rollout goes on over an upgrade, and estimates count workers of both releases."""
    alias = Alias.decode("coder", corpus()["aliases"]["coder"])
    notice = Notice.decode("worker-1", corpus()["notices"]["worker-1"])

    assert (alias.revision, alias.shards, alias.context_tokens) == ("coder-1", 4, 8_192)
    assert alias.rollout is not None
    assert alias.rollout.new is not None
    assert (alias.rollout.phase, alias.rollout.percent, alias.rollout.new.revision) == ("canary", 10, "coder-2")
    assert (notice.models[0].slots, notice.models[0].backlog[Lane.BULK]) == (8, (1, 2))


@pytest.mark.services
async def test_a_job_that_ran_in_the_previous_release_is_claimed_and_ended_here(redis_url: str, namespace: str) -> None:
    """Its hash and its stream, as they lay in Redis when the whole fleet was stopped for an upgrade."""
    topology, then = Topology(namespace), record_of("running")
    stored = {**corpus()["records"]["running"], "deadline_at": "4000000000", "expires_at": "4000000000"}
    redis = Redis.from_url(redis_url, decode_responses=True)
    store = await RedisStore.open(StoreSettings(url=redis_url), topology)
    try:
        await redis.hset(topology.job_key(then.id, "record"), mapping=stored)
        for seq, event in enumerate(corpus()["streams"]["running"], start=1):
            await redis.xadd(topology.job_key(then.id, "events"), {"event": event}, id=f"{seq}-0")

        claim = Claim(then.job, then.digest, then.publication, "worker-2", then.incarnation)
        [claimed] = await store.claim([claim])
        [unfinished] = await store.read([then.id])
        assert unfinished is not None
        result = record_of("text").result
        assert result is not None
        [committed] = await store.commit([Commit(then.id, claimed.fence, then.publication, result)])
        [after] = await store.read([then.id])
        events = await store.events(then.id, after=0)
    finally:
        await store.close()
        await redis.delete(*[topology.job_key(then.id, part) for part in ("record", "events")])
        await redis.aclose()

    assert (claimed.verdict, claimed.last_seq, claimed.attempt) == (ClaimVerdict.RUN, then.last_seq, then.attempt + 1)
    assert (unfinished.owner, committed.verdict) == ("worker-2", CommitVerdict.COMMITTED)
    assert after is not None
    assert (after.state, after.result) == (State.SUCCEEDED, result)
    assert [event.seq for event in events] == list(range(1, after.last_seq + 1))
