"""Names at the broker and in the store. Producers, workers and other languages agree on these.

Documented in docs/wire-contract.md. Raises nothing; every name is derived from plain values.
"""

import zlib
from dataclasses import dataclass
from urllib.parse import quote

from codeyard.shared.job import JobId, Lane

DELAY_STEPS_S = (1, 5, 25, 125)
NUM_STORE_SHARDS = 64
MAX_SLUG_BYTES = 120


@dataclass(frozen=True, slots=True)
class Topology:
    """All names of one fleet; `namespace` keeps fleets (and tests) on one server apart."""

    namespace: str = "codeyard"

    @property
    def jobs_exchange(self) -> str:
        return f"{self.namespace}.jobs"

    @property
    def dead_queue(self) -> str:
        return f"{self.namespace}.dead"

    @property
    def dropped_queue(self) -> str:
        """What the broker itself dead-letters; consumed by workers and committed as failed."""
        return f"{self.namespace}.dropped"

    def delay_queue(self, step_s: int) -> str:
        return f"{self.namespace}.delay.{step_s}"

    def job_queue(self, revision: str, lane: Lane, shard: int = 0) -> str:
        return f"{self.namespace}.jobs.{slug(revision)}.{lane}.{shard}"

    def job_key(self, job_id: JobId, part: str) -> str:
        """A Redis key of one job; `part` is `record` or `events`. The braces are its cluster hash tag."""
        return f"{self.namespace}:{{s{store_shard(job_id):02d}}}:{job_id}:{part}"

    def shard_key(self, shard: int, part: str) -> str:
        """A Redis key of one shard; `part` is `due` or `recent`."""
        return f"{self.namespace}:{{s{shard:02d}}}:{part}"

    def key(self, part: str) -> str:
        """A Redis key of the whole fleet, e.g. `aliases`."""
        return f"{self.namespace}:{part}"


def slug(revision: str) -> str:
    """A revision as part of a queue name: percent-encoded with `+` for `%`, at most MAX_SLUG_BYTES, still unique.

    aio-pika refuses a `%` (and `~`) in a queue's name; a `+` of the revision itself is encoded, so it can
    stand in. An adapter (`base@adapter`) shares the queue of its base.
    """
    base = revision.split("@", 1)[0]
    encoded = quote(base, safe="-_").replace("~", "%7E").replace("%", "+")
    if len(encoded) <= MAX_SLUG_BYTES:
        return encoded
    return f"{encoded[: MAX_SLUG_BYTES - 9]}-{zlib.crc32(base.encode()):08x}"


def store_shard(job_id: JobId) -> int:
    """Which of the NUM_STORE_SHARDS a job's keys live on: crc32 (IEEE) of the id's ASCII bytes."""
    return zlib.crc32(job_id.encode()) % NUM_STORE_SHARDS


def delay_step(delay_s: float) -> int:
    """The delay queue for a wish of `delay_s` seconds."""
    return next((step for step in DELAY_STEPS_S if step >= delay_s), DELAY_STEPS_S[-1])
