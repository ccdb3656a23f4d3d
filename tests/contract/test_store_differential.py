"""Random calls on the embedded store and on the pure transitions: same outcomes, same records, same streams.

Redis's scripts are held to the same functions in test_redis_differential.py.
"""

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from support.store_model import LIVES, Life, Model, new_jobs
from support.stores import StoreYard

from codeyard.shared.topology import Topology


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(life=LIVES)
async def test_the_embedded_store_does_what_the_transitions_say(life: Life) -> None:
    """Loading, saving and sweeping must add nothing to the protocol and lose nothing of it."""
    with tempfile.TemporaryDirectory() as folder:
        stores = StoreYard(f"sqlite:///{Path(folder) / 'yard.db'}", Topology("diff"))
        try:
            await live(stores, life)
        finally:
            await stores.tidy()


async def live(stores: StoreYard, life: Life) -> None:
    store = await stores.open()
    model = Model(stores.timing)
    jobs = new_jobs()
    for number, (pause_s, group) in enumerate(life):
        await stores.elapse(pause_s)
        now, name = await stores.now(), group[0].name
        model.forget(now)
        requests = [plan.request(jobs[plan.job], model.records.get(jobs[plan.job].id), now) for plan in group]
        where = f"step {number}: {name}({requests})"

        expected = model.call(name, requests, now)

        assert await getattr(store, name)(requests) == expected, where
        assert await store.read([job.id for job in jobs]) == [model.records.get(job.id) for job in jobs], where
        known = [model.records.get(job.id) for job in jobs]
        assert await store.states([job.id for job in jobs]) == [one.state if one else None for one in known], where
        for job in jobs:
            assert await store.events(job.id, after=0) == model.streams.get(job.id, []), where
        assert sorted(await store.due(10)) == sorted(model.due(now)), where
        assert sorted(await store.callbacks_due(10)) == sorted(model.callbacks_due(now)), where
