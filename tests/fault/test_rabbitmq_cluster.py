"""Three RabbitMQ nodes on this machine, killed with -9 under load: what docs/guarantees.md promises of a cluster.

`pytest tests/fault/test_rabbitmq_cluster.py -m long -s` prints how long submissions and claims stood still.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from support import services
from support.audited_load import audited_load
from support.fleet import Backend, WorkerProcess
from support.rabbitmq_cluster import ClusterNode, RabbitCluster, by_leader
from support.stalls import Prober, probing

from codeyard.producer import AsyncClient
from codeyard.shared.broker.rabbitmq import RabbitBroker
from codeyard.shared.errors import BrokerUnavailable
from codeyard.shared.job import Lane
from codeyard.shared.settings import BrokerSettings
from codeyard.shared.topology import Topology

pytestmark = [pytest.mark.long, pytest.mark.services, pytest.mark.process, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
NUM_WORKERS = 2
RATE = 25.0  # jobs a second: two cores also run three brokers, and probes come on top
IMPATIENT_S = 3.0  # for a submission that is to be refused


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RabbitCluster]:
    """Three running nodes."""
    need_cluster()
    with RabbitCluster(tmp_path / "cluster") as cluster:
        yield cluster


@pytest.fixture
def backend(cluster: RabbitCluster, redis_url: str, tmp_path: Path, namespace: str) -> Backend:
    return Backend(tmp_path, cluster.url, redis_url, namespace)


@pytest.fixture
async def workers(backend: Backend) -> AsyncIterator[list[WorkerProcess]]:
    """Serving, with leases as short as the drill's; killed at the end."""
    store = {"lease_s": 2.0, "renew_s": 0.5, "grace_s": 1.0}
    settings = backend.settings(engine={"time_scale": 0.5, "max_running": 32}, store=store, worker={"stall_s": 60})
    found = []
    for n in range(NUM_WORKERS):
        folder = backend.folder / f"worker-{n}"
        folder.mkdir()
        found.append(WorkerProcess(settings, folder))
    try:
        await asyncio.gather(*(worker.start() for worker in found))
        yield found
    finally:
        for worker in found:
            if worker.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    worker.signal(signal.SIGKILL)
                await worker.ended()


def need_cluster() -> None:
    if not RabbitCluster.available():
        services.missing("RabbitMQ to make a cluster of", "rabbitmq-server", None)


def all_in_sync(cluster: RabbitCluster) -> bool:
    """Whether every queue has a leader, and all its members answer."""
    return all(queue.leader and queue.online == queue.members for queue in cluster.queues())


def leader_among(cluster: RabbitCluster, names: set[str]) -> ClusterNode:
    """Of these nodes the one that leads most queues."""
    leads = by_leader(cluster.queues())
    return cluster.named(max(sorted(names), key=lambda name: leads.get(name, 0)))


async def test_every_node_of_a_cluster_is_killed_under_load_and_nothing_is_lost(
    cluster: RabbitCluster, backend: Backend, workers: list[WorkerProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    """The leader of the queues first, then the others, each with clients on it. Afterwards two at once: without a
    majority nothing is accepted, the caller is told so by name, and everything goes on when they are back."""
    settings = backend.settings()
    assert {len(queue.members) for queue in cluster.queues()} == {3}

    def tell(text: object) -> None:
        with capsys.disabled():
            print(text, flush=True)

    async with audited_load(settings, backend.folder / "load", rate=RATE, seed=7) as load:
        left = {node.node for node in cluster.nodes}
        while left:
            victim = await asyncio.to_thread(leader_among, cluster, left)
            left.discard(victim.node)
            clients = (await asyncio.to_thread(cluster.connections))[victim.node]
            leads = by_leader(await asyncio.to_thread(cluster.queues)).get(victim.node, 0)
            async with probing(settings, load, f"kill_{len(left)}", timeout_s=10.0) as probing_it:
                await probing_it.more(10)
                await asyncio.to_thread(cluster.kill_node, victim)
                await probing_it.more(40)
            stalls = await probing_it.submit_stalls_s()
            claim_s = await probing_it.claim_stall_s()
            mine = stalls.pop(f"{victim.host}:{victim.port}")
            refusals = sum(len(prober.refusals) for prober in probing_it.probers)
            tell(
                f"killed: {leads} queues led, {len(clients)} connections; submit stalled {mine:.2f} s there, "
                f"{max(stalls.values()):.2f} s elsewhere, claims {claim_s:.2f} s; {refusals} submissions refused"
            )
            assert clients
            await asyncio.to_thread(cluster.start_node, victim)
            await asyncio.to_thread(cluster.until, lambda: all_in_sync(cluster), "all queues have all members again")

        lost = cluster.nodes[:2]
        async with AsyncClient(settings=settings, timeout_s=IMPATIENT_S) as client:
            await asyncio.gather(*(asyncio.to_thread(cluster.kill_node, node) for node in lost))
            refusal = await Prober("any", client).refused("minority", load)
        tell(f"without a majority: {refusal}")
        assert isinstance(refusal, BrokerUnavailable)
        await asyncio.gather(*(asyncio.to_thread(cluster.start_node, node) for node in lost))
        async with probing(settings, load, "after", timeout_s=10.0) as probing_it:
            await probing_it.more(20)
        ledger = await load.finished()

    tell(f"accepted {ledger.accepted}, {dict(ledger.states)}, resumed {ledger.resumed}")
    assert ledger.findings == []
    assert ledger.good
    assert ledger.accepted > 0
    assert [worker.process.returncode for worker in workers if worker.process] == [None] * NUM_WORKERS


async def test_queues_have_a_copy_on_a_node_that_was_down_and_are_grown_onto_one_that_joins_later(
    tmp_path: Path,
) -> None:
    """Members are chosen when a queue is made, among the nodes of the cluster then; docs/rabbitmq-cluster.md says
    what to do. Afterwards the queues are still the ones that every worker declares."""
    need_cluster()
    topology = Topology("grown")
    cluster = RabbitCluster(tmp_path / "cluster")
    first, down, late = cluster.nodes
    settings = BrokerSettings(url=cluster.url, publish_timeout_s=60)
    names = [topology.job_queue("weights:1", lane) for lane in Lane]
    try:
        await asyncio.to_thread(cluster.start, 2)
        broker = await RabbitBroker.open(settings, topology)
        await broker.declare(names[:1])
        two_members = await asyncio.to_thread(cluster.queues)
        await asyncio.to_thread(cluster.start_node, late)
        await asyncio.to_thread(cluster.until, lambda: len(cluster.running()) == 3, "the third node has joined")
        await asyncio.to_thread(cluster.kill_node, down)
        await broker.declare(names)
        await asyncio.to_thread(cluster.start_node, down)

        grow = ("grow", late.node, "all", "--vhost-pattern", ".*", "--queue-pattern", ".*")
        await asyncio.to_thread(lambda: cluster.control(*grow, tool="rabbitmq-queues"))
        await asyncio.to_thread(cluster.until, lambda: all_in_sync(cluster), "all members of all queues answer")
        grown = await asyncio.to_thread(cluster.queues)
        await broker.declare(names)
        await broker.close()
    finally:
        await asyncio.to_thread(cluster.stop)

    everyone = {node.node for node in cluster.nodes}
    assert {queue.members for queue in two_members} == {frozenset({first.node, down.node})}
    assert {queue.members for queue in grown} == {frozenset(everyone)}
    assert {queue.name for queue in grown} >= set(names)


def test_the_contract_suite_of_the_broker_passes_on_a_cluster(cluster: RabbitCluster) -> None:
    """Every promise of the port, where each confirm is a majority's."""
    node = cluster.nodes[1]
    command = (
        sys.executable,
        "-m",
        "pytest",
        "tests/contract",
        "-k",
        "broker or rabbitmq",
        "-m",
        "services and not long",
    )
    run = subprocess.run(
        [*command, "-q", "-p", "no:cacheprovider"],
        cwd=REPOSITORY,
        env={**os.environ, services.BROKER_VARIABLE: node.url},
        capture_output=True,
        text=True,
    )

    assert run.returncode == 0, run.stdout[-4_000:]
