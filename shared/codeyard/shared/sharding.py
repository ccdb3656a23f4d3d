"""Which shard queues of a lane a tenant's jobs may go to: shuffle sharding.

A lane is one first-in-first-out queue at the broker, and a worker is fair only among the jobs it has in
hand: one tenant's flood buries the rest before a worker ever sees them. Spread over `shards` queues,
each tenant owns a fixed hand of `per_tenant` of them, drawn by hash, and a job goes to the emptiest of
its hand. A flood fills its own hand; another tenant is buried only if its whole hand lies within that
one, which has the probability 1 / C(shards, per_tenant): 1 in 70 for 4 of 8, 1 in 1,820 for 4 of 16.

What it costs: a worker must be able to fill its engine from one hand, so its prefetch is
slots * (1 + look-ahead) / per_tenant on each queue, up to shards / per_tenant times its slots in all.
"""

import hashlib


def shards_of(tenant: str, *, shards: int, per_tenant: int) -> tuple[int, ...]:
    """The tenant's hand: `per_tenant` different shards in 0..shards-1, the same on every machine.

    Drawn by repeated SHA-256 of the tenant's name, so that other languages can follow it.
    """
    if not 1 <= per_tenant <= shards:
        raise ValueError(f"a hand has between 1 and {shards} shards, not {per_tenant}")
    left = list(range(shards))
    hand = []
    for place in range(per_tenant):
        digest = hashlib.sha256(f"{place}:{tenant}".encode()).digest()
        hand.append(left.pop(int.from_bytes(digest[:8], "big") % len(left)))
    return tuple(hand)
