"""What a release writes, as JSON: messages, records, streams, aliases, notices. Run by the release itself.

    python tests/support/release_corpus.py redis://... > tests/fault/corpus/<version>.json

Records are the hashes as they lie in Redis, streams their entries, messages body and headers as published. Nothing
here is newer than the oldest release it is run with.
"""

import asyncio
import json
import sys
from typing import Any

from redis.asyncio import Redis

from codeyard.shared.alias import Alias, Phase, Rollout, Target
from codeyard.shared.claims import set_aside
from codeyard.shared.envelope import seal
from codeyard.shared.job import Job, Lane, job_id_for_key
from codeyard.shared.notice import ModelNotice, Notice
from codeyard.shared.record import Event, EventKind, Failure, Result, State, Usage
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.port import Append, Claim, Commit, Queued, Redrive, Reservation
from codeyard.shared.store.redis import RedisStore
from codeyard.shared.topology import Topology

NAMESPACE = "corpus"
TOOL = {"name": "look", "description": "Looks.", "parameters": {"type": "object", "properties": {}}}


def jobs() -> dict[str, Job]:
    chat = {
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "größer?"}],
        "tools": [TOOL],
    }
    made: dict[str, dict[str, Any]] = {
        "text": {"prompt": "def add(a, b):", "lane": "interactive", "stream": True, "metadata": {"team": "ä"}},
        "tokens": {"prompt": [1, 2, 3], "sampling": {"max_tokens": 7, "seed": 5, "logprobs": 2}},
        "chat": {"prompt": chat, "sampling": {"temperature": 0.3, "stop": ["\n\n"]}},
        "claimed": {"prompt": "x = 1\n" * 20_000, "lane": "bulk"},
        "format": {"prompt": "{", "sampling": {"output_format": {"type": "regex", "regex": "[a-z]+"}}},
        "stood_in": {"prompt": "def f():", "asked_model": "coder-large", "shard": 3},
        "told": {"prompt": "def g():", "callback_url": "https://example.com/hook"},
        "cancelled": {"prompt": "def h():"},
        "redriven": {"prompt": "def i():"},
        "running": {"prompt": "def j():", "stream": True},
    }
    common = {"tenant": "corpus", "model": "coder", "revision": "coder-1"}
    whole = {
        name: Job.build(id=job_id_for_key("corpus", name), key=name, **common, **fields)
        for name, fields in made.items()
    }
    aside = {name: set_aside(job, max_prompt_bytes=1_000_000) for name, job in whole.items()}
    return {name: part.job if (part := aside[name]) is not None else job for name, job in whole.items()}


async def live(store: RedisStore, made: dict[str, Job]) -> None:
    """Each to the state it is named for; the others succeed."""
    everyone = list(made.values())
    await store.reserve([Reservation(job, job.digest(), f"p-{job.key}", f"i-{job.key}") for job in everyone])
    await store.mark_queued([Queued(job.id, f"p-{job.key}") for job in everyone])
    await store.cancel([made["cancelled"].id])
    working = [job for job in everyone if job.key != "cancelled"]
    claims = [Claim(job, job.digest(), f"p-{job.key}", "worker-1", f"i-{job.key}") for job in working]
    fences = {job.key: one.fence for job, one in zip(working, await store.claim(claims), strict=True)}
    for job in working:
        said = [
            Event(seq=1, kind=EventKind.TOKENS, text="    ret", token_ids=(9, 8), revision="coder-1"),
            Event(seq=2, kind=EventKind.RESTARTED),
            Event(seq=3, kind=EventKind.TOKENS, text="    return größer", token_ids=(7, 6, 5)),
        ]
        await store.append([Append(job.id, fences[job.key], said)])
    failure = Failure(code="engine_error", message="it failed")
    failed = Result(state=State.FAILED, error=failure, revision="coder-1")
    good = Result(
        state=State.SUCCEEDED,
        text="    return größer",
        finish_reason="stop",
        usage=Usage(prompt_tokens=5, completion_tokens=3),
        engine="simulated 1",
        revision="coder-1",
        batch_size=4,
        first_token_s=0.25,
        generate_s=1.5,
    )
    ends = [job for job in working if job.key != "running"]
    await store.commit(
        [Commit(job.id, fences[job.key], f"p-{job.key}", failed if job.key == "redriven" else good) for job in ends]
    )
    dead = made["redriven"]
    await store.redrive([Redrive(dead, dead.digest(), f"i-{dead.key}", failed, "i-again", "p-again")])


async def main() -> None:
    topology, made = Topology(NAMESPACE), jobs()
    redis = Redis.from_url(sys.argv[1], decode_responses=True)
    store = await RedisStore.open(StoreSettings(url=sys.argv[1]), topology)
    try:
        await live(store, made)
        new = Target("coder-2", "/models/coder-2", 32_768)
        rollout = Rollout(id="r-1", phase=Phase.CANARY, old=Target("coder-1"), location="x", percent=10, new=new)
        await store.swap_alias(None, Alias("coder", "coder-1", context_tokens=8_192, shards=4, rollout=rollout))
        model = ModelNotice("coder", "coder-1", "awake", serving=True, slots=8, running=3, backlog={Lane.BULK: (1, 2)})
        found = {
            "messages": {name: message(job, topology) for name, job in made.items()},
            "digests": {name: job.digest() for name, job in made.items()},
            "records": {n: await redis.hgetall(topology.job_key(job.id, "record")) for n, job in made.items()},
            "streams": {
                n: [fields["event"] for _, fields in await redis.xrange(topology.job_key(job.id, "events"))]  # type: ignore[index, union-attr]  # texts
                for n, job in made.items()
            },
            "aliases": await redis.hgetall(topology.key("aliases")),
            "notices": {"worker-1": Notice("worker-1", "simulated 1", (model,)).encode()},
        }
        json.dump(found, sys.stdout, indent=1, ensure_ascii=False, sort_keys=True)
        sys.stdout.write("\n")
    finally:
        await store.close()
        for key in [key async for key in redis.scan_iter(f"{NAMESPACE}:*")]:
            await redis.delete(key)
        await redis.aclose()


def message(job: Job, topology: Topology) -> dict[str, Any]:
    sent = seal(job, topology, publication=f"p-{job.key}", incarnation=f"i-{job.key}", deadline_at=4_000_000_000.0)
    return {"queue": sent.queue, "message_id": sent.message_id, "body": sent.body.decode(), "headers": sent.headers}


if __name__ == "__main__":
    asyncio.run(main())
