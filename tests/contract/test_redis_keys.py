"""What the store leaves in Redis: names, fields, ends. Other languages read these keys."""

import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.redis_server import OwnRedis, running_redis
from support.store_calls import claim_of, commit_of, make_job, reservation_of, run_jobs, tokens

from codeyard.shared.alias import Alias
from codeyard.shared.errors import MalformedMessage
from codeyard.shared.record import Event, EventKind, Record, State
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.port import Append, CancelVerdict, RecoverVerdict, Recovery
from codeyard.shared.store.redis import RedisStore
from codeyard.shared.store.redis_codec import FIELDS, NUM_RECENT
from codeyard.shared.topology import Topology, store_shard

pytestmark = pytest.mark.services

TOPOLOGY = Topology("keys")


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[OwnRedis]:
    async with running_redis(tmp_path / "redis") as server:
        yield server


@pytest.fixture
async def store(server: OwnRedis) -> AsyncIterator[RedisStore]:
    store = await RedisStore.open(StoreSettings(url=server.url), TOPOLOGY)
    yield store
    await store.close()


async def test_every_key_of_a_job_ends_with_its_record_and_lies_in_its_shard(
    store: RedisStore, server: OwnRedis
) -> None:
    """A key without an end fills the server; one in another slot cannot be in the same script on a cluster."""
    reserved, streaming, done, cancelled, from_message = jobs = [make_job() for _ in range(5)]
    await store.reserve([reservation_of(reserved)])
    claims = await run_jobs(store, streaming, done, cancelled)
    await store.append([Append(streaming.id, claims[0].fence, [tokens(1), tokens(2)])])
    await store.commit([commit_of(done, claims[1])])
    await store.cancel([reserved.id])
    await store.claim([claim_of(from_message)])

    found = {}
    for job in jobs:
        (record,) = await store.read([job.id])
        assert record is not None
        for key in await server.command("KEYS", f"*{job.id}*"):
            found[key] = (job, await server.command("PEXPIRETIME", key), record.expires_at)

    assert {key.rsplit(":", 1)[1] for key in found} == {"record", "events"}
    assert len(found) == 8  # five records; the streams of those that have events
    for key, (job, ends_ms, expires_at) in found.items():
        assert key.startswith(f"keys:{{s{store_shard(job.id):02d}}}:{job.id}:")
        assert ends_ms == pytest.approx(expires_at * 1000, abs=1.0)


async def test_nothing_but_jobs_indexes_and_aliases_is_kept(store: RedisStore, server: OwnRedis) -> None:
    """The wire contract lists every key there is."""
    (claimed,) = await run_jobs(store, job := make_job())
    await store.commit([commit_of(job, claimed)])
    await store.swap_alias(None, Alias("m", "m-1"))

    shard = f"keys:{{s{store_shard(job.id):02d}}}"
    assert set(await server.command("KEYS", "*")) == {
        f"{shard}:{job.id}:record",
        f"{shard}:{job.id}:events",
        f"{shard}:recent",
        "keys:aliases",
    }


async def test_a_record_is_a_hash_with_one_readable_field_per_record_field(store: RedisStore, server: OwnRedis) -> None:
    """Other languages read it field by field, without our library."""
    (claimed,) = await run_jobs(store, job := make_job(prompt='say "hé/llo"\n\t\x7f'))
    await store.append([Append(job.id, claimed.fence, [tokens(1, "é/\n")])])
    commit = commit_of(job, claimed, text='"é"/\n')
    await store.commit([commit])

    fields = await server.command("HGETALL", TOPOLOGY.job_key(job.id, "record"))
    entries = await server.command("XRANGE", TOPOLOGY.job_key(job.id, "events"), "-", "+")

    assert set(fields) == set(Record.model_fields) - {"callback", "callback_at", "callback_attempts"}
    assert set(Record.model_fields) == set(FIELDS)
    assert fields["job"].encode() == job.encode()
    assert fields["result"] == commit.result.encode()
    assert fields["state"] == "succeeded"
    assert fields["attempt"] == "1"
    assert fields["cancel_requested"] == "0"
    assert float(fields["deadline_at"]) - float(fields["created_at"]) == pytest.approx(job.timeout_s, abs=1e-5)
    assert [entry for entry, _ in entries] == ["1-0", "2-0"]
    end = Event(seq=2, kind=EventKind.END, state=State.SUCCEEDED)
    assert [event["event"] for _, event in entries] == [tokens(1, "é/\n").encode(), end.encode()]


async def test_a_result_the_store_makes_reads_like_one_of_ours(store: RedisStore, server: OwnRedis) -> None:
    """The script builds its JSON by hand; a repeat of the text would otherwise not be recognised as the same."""
    await store.reserve([reservation_of(job := make_job())])

    assert await store.cancel([job.id]) == [CancelVerdict.CANCELLED]

    (record,) = await store.read([job.id])
    assert record is not None
    assert record.result is not None
    text = await server.command("HGET", TOPOLOGY.job_key(job.id, "record"), "result")
    assert json.loads(text) == json.loads(record.result.encode())


async def test_a_job_whose_keys_have_ended_leaves_the_due_index_when_it_is_looked_at(
    store: RedisStore, server: OwnRedis
) -> None:
    """Otherwise every reconciler would be given it for ever."""
    await store.reserve([reservation_of(job := make_job())])
    await server.command("DEL", TOPOLOGY.job_key(job.id, "record"))
    await server.command("ZADD", TOPOLOGY.shard_key(store_shard(job.id), "due"), 1, job.id)
    assert await store.due(10) == [job.id]

    (outcome,) = await store.recover([Recovery(job.id, "p2")])

    assert outcome.verdict is RecoverVerdict.NOT_DUE
    assert await store.due(10) == []


async def test_the_index_of_recent_jobs_is_bounded(store: RedisStore, server: OwnRedis) -> None:
    """It has no TTL of its own: jobs come for years."""
    in_one_shard = (job for job in (make_job() for _ in itertools.count()) if store_shard(job.id) == 7)
    jobs = list(itertools.islice(in_one_shard, NUM_RECENT + 5))
    for job in jobs:  # one group each: within a group all are made at the same moment
        await store.reserve([reservation_of(job)])

    assert await server.command("ZCARD", TOPOLOGY.shard_key(7, "recent")) == NUM_RECENT
    assert [record.id for record in await store.recent(3)] == [job.id for job in reversed(jobs[-3:])]


async def test_a_hash_that_is_not_ours_is_malformed_and_not_a_crash(store: RedisStore, server: OwnRedis) -> None:
    """A caller can settle MalformedMessage; a library's exception would stop a worker."""
    job = make_job()
    await server.command("HSET", TOPOLOGY.job_key(job.id, "record"), "id", job.id, "state", "??", "job", "{}")

    with pytest.raises(MalformedMessage):
        await store.read([job.id])
