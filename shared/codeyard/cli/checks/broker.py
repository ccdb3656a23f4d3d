"""RabbitMQ: may we, can it, and are the queues there the ones we would make?

Called by: cli.doctor. What is asked of the server: shared.broker.rabbitmq_probe.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from urllib.parse import unquote, urlsplit

from codeyard.cli.checks.check import Finding, Place, Status, fail, ok, skipped, warn
from codeyard.cli.checks.fleet import known_revisions
from codeyard.cli.checks.reach import unreachable
from codeyard.cli.checks.settings import without_secrets
from codeyard.shared.broker.rabbitmq_nodes import node_urls
from codeyard.shared.broker.rabbitmq_probe import RabbitProbe, Seen, Trial
from codeyard.shared.broker.rabbitmq_topology import exchanges, queues
from codeyard.shared.envelope import new_nonce
from codeyard.shared.errors import BrokerUnavailable
from codeyard.shared.settings import BrokerSettings
from codeyard.shared.topology import Topology

OLDEST = (3, 10)  # quorum queues with message TTL and at-least-once dead lettering
TESTED = "3.10 and 4.x"
START = "docker compose up -d rabbitmq, or start rabbitmq-server"
URL = "CODEYARD_BROKER_URL"
EMBEDDED = "the broker is the embedded file: see `file`"


async def check_broker(place: Place) -> list[Finding]:
    settings = place.settings.broker
    if settings.url.startswith("sqlite:"):
        return [skipped(EMBEDDED)]
    lost = await _lost_nodes(place)
    if len(lost) == len(node_urls(settings.url)):
        return lost
    try:
        async with _probing(place) as probe:
            findings = version_findings(probe.product, probe.version, without_secrets(settings.url))
            if any(finding.status is Status.FAIL for finding in findings):
                return findings
            findings += [warn(f"one node is lost: {one.text}", one.way_out) for one in lost]
            trial = await probe.try_queue(f"{place.settings.namespace}.doctor.{new_nonce()}")
            return [*findings, *trial_findings(trial, settings, answer_s=place.answer_s)]
    except BrokerUnavailable as error:
        return [refused(error, settings, answer_s=place.answer_s)]


async def check_queues(place: Place) -> list[Finding]:
    """Those of the fleet, of the models here, and of every alias in the store."""
    settings = place.settings
    if settings.broker.url.startswith("sqlite:"):
        return [skipped("the broker is the embedded file: its queues have no arguments")]
    if len(await _lost_nodes(place)) == len(node_urls(settings.broker.url)):
        return [skipped("the broker cannot be reached: see `broker`")]
    topology = Topology(settings.namespace)
    shards = range(settings.worker.shards)
    names = [
        topology.job_queue(revision, lane, shard)
        for revision in await known_revisions(place)
        for lane in settings.worker.lanes
        for shard in shards
    ]
    seen: list[Seen] = []
    name = ""
    try:
        async with _probing(place) as probe:
            for exchange in exchanges(topology):
                name = exchange.name
                seen.append(await probe.look_at_exchange(exchange))
            for queue in queues(topology, names, max_length=settings.broker.queue_max_length):
                name = queue.name
                seen.append(await probe.look_at_queue(queue))
    except BrokerUnavailable as error:
        if name and isinstance(error.__cause__, TimeoutError):
            text = f"no answer about {name} within {place.answer_s:g} s"
            way_out = "a quorum queue needs more than half of its nodes: rabbitmq-queues quorum_status NAME"
            return [fail(text, way_out)]
        return [skipped(f"the broker does not answer: see `broker` ({error})")]
    return list(queue_findings(seen, settings.namespace))


async def _lost_nodes(place: Place) -> list[Finding]:
    """Of the nodes that the URL names, why nothing answers at those where nothing does."""
    asked = (
        unreachable(url, variable=URL, start=START, within_s=place.answer_s)
        for url in node_urls(place.settings.broker.url)
    )
    return [nobody for nobody in await asyncio.gather(*asked) if nobody is not None]


@asynccontextmanager
async def _probing(place: Place) -> AsyncIterator[RabbitProbe]:
    probe = await RabbitProbe.open(place.settings.broker, timeout_s=place.answer_s)
    try:
        yield probe
    finally:
        await probe.close()


# What the answers mean -----------------------------------------------------------------------------


def version_findings(product: str, version: str, url: str) -> list[Finding]:
    """`url` without its secrets."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if product != "RabbitMQ":
        return [warn(f"{url} is {product or 'unnamed'} {version}, no RabbitMQ", f"RabbitMQ {TESTED} was tested")]
    if numbers < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        way_out = f"upgrade to {oldest} or later: before, quorum queues lose what expires in them"
        return [fail(f"RabbitMQ {version} at {url} is too old", way_out)]
    return [ok(f"RabbitMQ {version} at {url}")]


def trial_findings(trial: Trial, settings: BrokerSettings, *, answer_s: float) -> Iterator[Finding]:
    user, vhost = _user(settings.url), _vhost(settings.url)
    if "ACCESS_REFUSED" in trial.refused:
        way_out = f"rabbitmqctl set_permissions -p {vhost} {user} '.*' '.*' '.*'"
        yield fail(f"user {user} may not declare queues in virtual host {vhost}", way_out)
    elif trial.refused:
        way_out = "rabbitmqctl enable_feature_flag all, and see that half of the cluster's nodes are up"
        yield fail(f"no quorum queue can be made: {trial.refused}", way_out)
    elif trial.blocked:
        yield fail(
            "the server has stopped taking messages: an alarm of memory or disk",
            "rabbitmq-diagnostics alarms says which; free disk or memory, or raise vm_memory_high_watermark / "
            "lower disk_free_limit",
        )
    elif not trial.confirmed:
        way_out = "see the server's log: its disk may be slow, or the queue's nodes down"
        yield fail(f"a message was not confirmed within {answer_s:g} s", way_out)
    else:
        yield ok("quorum queues can be made, messages are confirmed")


def refused(error: BrokerUnavailable, settings: BrokerSettings, *, answer_s: float) -> Finding:
    """Somebody listens there, and we cannot work with them."""
    said, url = str(error).removeprefix("broker unavailable: "), without_secrets(settings.url)
    user, vhost = _user(settings.url), _vhost(settings.url)
    if "refused user" in said:
        way_out = f"mend user or password in {URL} (percent-encode what is not a letter or digit)"
        if user == "guest":
            way_out += "; guest may come from the broker's own machine only: rabbitmqctl add_user NAME"
        return fail(f"{url} refused user {user!r}", way_out)
    if "virtual host" in said:
        way_out = f"rabbitmqctl add_vhost {vhost}; rabbitmqctl set_permissions -p {vhost} {user} '.*' '.*' '.*'"
        return fail(f"there is no virtual host {vhost!r} at {url}, or user {user!r} may not use it", way_out)
    if "certificate" in said.lower() or "ssl" in said.lower():
        return fail(f"no TLS with {url}: {said}", "amqps://...?cafile=/path/ca.pem, or amqp:// on a port without TLS")
    if isinstance(error.__cause__, TimeoutError) or "no answer" in said or "in time" in said:
        way_out = "the server hangs or is still starting, or another protocol is spoken there (AMQP: 5672, TLS: 5671)"
        return fail(f"{url} takes the connection and gives no answer within {answer_s:g} s", way_out)
    return fail(f"{url}: {said}", f"see the server's log, or mend {URL}")


def queue_findings(seen: Sequence[Seen], namespace: str) -> Iterator[Finding]:
    there = [one for one in seen if one.there]
    for one in there:
        if one.differs:
            yield fail(
                f"{one.name} exists and is another one: {_argument(one.differs)}",
                "CODEYARD_BROKER_QUEUE_MAX_LENGTH must be the same everywhere; to change it, drain the fleet, "
                f"then rabbitmqctl delete_queue {one.name}",
            )
        elif one.ready and not one.consumers and ".jobs." in one.name:
            yield warn(f"{one.name} holds {one.ready} that nobody takes", "start a worker for that model")
    if not there:
        yield ok(f"none of {namespace} yet: the first worker makes them")
        return
    if not any(one.differs for one in there):
        ready = sum(one.ready for one in there)
        yield ok(f"{len(there)} of {len(seen)} are there, as we would make them; {ready} messages wait")


def _argument(reason: str) -> str:
    """The server's words: "PRECONDITION_FAILED - inequivalent arg 'x-max-length' for queue ...: received ..."."""
    found = re.search(r"inequivalent arg '([^']+)'.*?received (.+?) but current is (.+)$", reason)
    if found is None:
        return reason
    name, ours, theirs = found.groups()
    return f"{name} is {_plain(theirs)}, ours is {_plain(ours)}"


def _plain(value: str) -> str:
    """Of "the value '10' of type 'long'" the value."""
    quoted = re.search(r"value '([^']*)'", value)
    return quoted.group(1) if quoted else value.strip("' ")


def _user(url: str) -> str:
    return unquote(urlsplit(url).username or "guest")


def _vhost(url: str) -> str:
    return unquote(urlsplit(url).path[1:]) or "/"
