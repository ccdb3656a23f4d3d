"""Redis: may we, does it keep what it was given, and does its clock run as ours?

A job counts as accepted when it is written there. A Redis that may lose or evict what it was given loses accepted
jobs in silence, so that is a failure here, though nothing works any worse until the day it happens.
Called by: cli.doctor. What is asked of the server: shared.store.redis_probe.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from codeyard.cli.checks.check import Finding, Place, Status, fail, gib, ok, skipped, warn
from codeyard.cli.checks.reach import unreachable
from codeyard.cli.checks.settings import without_secrets
from codeyard.shared.errors import SettingsError, StoreUnavailable
from codeyard.shared.settings import StoreSettings
from codeyard.shared.store.redis_connections import each_host
from codeyard.shared.store.redis_link import OLDEST_VERSION
from codeyard.shared.store.redis_probe import RedisNode, look_at, try_script
from codeyard.shared.topology import Topology

START = "docker compose up -d redis, or start redis-server"
URL = "CODEYARD_STORE_URL"
CLOCK_S = 5.0  # leases and deadlines use the store's clock alone; tokens, logs and people use this machine's
FULL = 0.9  # of maxmemory
DURABLE = "in redis-cli: CONFIG SET appendonly yes; CONFIG SET appendfsync always; CONFIG REWRITE"


async def check_store(place: Place) -> list[Finding]:
    settings = place.settings.store
    if settings.url.startswith("sqlite:"):
        return [skipped("the store is the embedded file: see `file`")]
    try:
        hosts = each_host(settings.url)
    except ValueError as error:
        return [fail(f"{without_secrets(settings.url)}: {error}", f"mend {URL}: docs/redis.md")]
    asked = [await unreachable(one, variable=URL, start=START, within_s=place.answer_s) for one in hosts]
    silent = [finding for finding in asked if finding is not None]
    if len(silent) == len(hosts):
        return silent
    bounded = settings.model_copy(update={"timeout_s": place.answer_s})
    try:
        nodes = await look_at(bounded)
    except (StoreUnavailable, SettingsError) as error:
        return [refused(error, settings, answer_s=place.answer_s)]
    findings = [replace(finding, status=Status.WARN) for finding in silent]  # the others stand in for these
    findings += [finding for node in nodes for finding in node_findings(node, settings)]
    if not _stops_writing(nodes):
        try:
            await try_script(bounded, Topology(place.settings.namespace))
        except (StoreUnavailable, SettingsError) as error:
            findings.insert(0, refused(error, settings, answer_s=place.answer_s))
    return findings


def _stops_writing(nodes: Sequence[RedisNode]) -> bool:
    """What was found says already why a write would be refused."""
    return any(node.mode == "sentinel" or node.role == "slave" or node.loading or _too_old(node) for node in nodes)


def refused(error: Exception, settings: StoreSettings, *, answer_s: float) -> Finding:
    """Somebody listens there, and we cannot work with them."""
    said, url = str(error).removeprefix("store unavailable: "), without_secrets(settings.url)
    hangs = f"{url} takes the connection and gives no answer within {answer_s:g} s"
    acl = "in redis-cli: ACL SETUSER NAME ~codeyard:* &codeyard:* +@all -@dangerous +info +config|get"
    for words, text, way_out in (
        ("Authentication required", f"{url} wants a password", f"redis://:PASSWORD@host in {URL}"),
        ("refused user or password", f"{url} refused user or password", f"mend them in {URL} (percent-encoded)"),
        ("may not run", f"{url}: {said}", acl),
        ("MISCONF", f"{url} does not write: {said}", "its disk is full or not writable: see the server's log"),
        ("out of memory", f"{url} is full", "raise maxmemory, or lower CODEYARD_STORE_RETENTION_S"),
        ("no answer", hangs, "the server hangs (redis-cli PING), or it is no Redis"),
        ("certificate", f"no TLS with {url}: {said}", "rediss://...?ssl_ca_certs=/path/ca.pem"),
        ("7.0 or later", f"{url}: {said}", "upgrade the server: scripts need flags, which 7.0 brought"),
    ):
        if words in said:
            return fail(text, way_out)
    return fail(f"{url}: {said}", f"see the server's log, or mend {URL}")


def node_findings(node: RedisNode, settings: StoreSettings) -> Iterator[Finding]:
    """One server. `settings` say for how many replicas a write waits."""
    at = node.address
    if node.mode == "sentinel":
        way_out = f"name the primary in {URL}, or its Sentinels: redis+sentinel://{at}/NAME"
        yield fail(f"{at} is a Sentinel, which keeps no data", way_out)
        return
    if _too_old(node):
        yield fail(f"Redis {node.version} at {at} is too old", "upgrade to 7.0 or later")
        return
    if node.role == "slave":
        yield fail(
            f"{at} is a read-only replica", f"name the primary in {URL}, or promote it (in redis-cli: REPLICAOF NO ONE)"
        )
        return
    if node.loading:
        yield fail(f"{at} is still loading its data", "wait: INFO persistence says how long (loading_eta_seconds)")
        return
    wrong = [*_durability(node, settings), *_room(node), *_clock(node)]
    yield from wrong
    if any(finding.status is Status.FAIL for finding in wrong):
        return
    file = f"append-only file, fsync {node.fsync}" if node.append_only else "no append-only file"
    yield ok(f"Redis {node.version} at {at}: {file}, {node.eviction}; answers in {node.round_trip_s * 1e3:.1f} ms")


def _too_old(node: RedisNode) -> bool:
    return tuple(int(part) for part in node.version.split(".")[:2]) < OLDEST_VERSION


def _durability(node: RedisNode, settings: StoreSettings) -> Iterator[Finding]:
    at = node.address
    if not node.append_only:
        yield fail(f"{at} keeps no append-only file: a restart loses accepted jobs and results", DURABLE)
    elif node.append_failed:
        yield fail(f"{at} could not write its append-only file", "see its log; the disk may be full")
    elif node.fsync is None:
        yield warn(f"{at} does not say when it syncs to disk (CONFIG is not allowed)", "see that appendfsync is always")
    elif node.fsync != "always":
        lost = "the last second of" if node.fsync == "everysec" else "what it has not written of"
        text = f"{at} has appendfsync {node.fsync}: a crash loses {lost} accepted jobs and results"
        # What was acked is on a replica too; only both dying at once loses it.
        yield (warn if settings.replicas else fail)(text, "in redis-cli: CONFIG SET appendfsync always; CONFIG REWRITE")
    if node.replicas < settings.replicas:
        yield fail(
            f"CODEYARD_STORE_REPLICAS is {settings.replicas}, {at} has {node.replicas}: no job would be settled",
            "start replicas, or lower the setting",
        )


def _room(node: RedisNode) -> Iterator[Finding]:
    at = node.address
    if node.eviction != "noeviction":
        text = f"{at} has maxmemory-policy {node.eviction}: when it is full it throws accepted jobs away"
        # Without a limit it is never full.
        yield (fail if node.max_bytes else warn)(
            text, "in redis-cli: CONFIG SET maxmemory-policy noeviction; CONFIG REWRITE"
        )
    if node.evicted_keys:
        yield warn(f"{at} has evicted {node.evicted_keys} keys since it started", "noeviction, and more maxmemory")
    if node.max_bytes and node.used_bytes > FULL * node.max_bytes:
        text = f"{at} uses {gib(node.used_bytes)} of {gib(node.max_bytes)}: full, it takes no more jobs"
        yield warn(text, "raise maxmemory, or lower CODEYARD_STORE_RETENTION_S")


def _clock(node: RedisNode) -> Iterator[Finding]:
    if abs(node.clock_ahead_s) > CLOCK_S:
        way = "ahead" if node.clock_ahead_s > 0 else "behind"
        text = f"the clock of {node.address} is {abs(node.clock_ahead_s):.0f} s {way} of this machine's"
        yield warn(text, "deadlines follow the store's; set both with NTP, or tokens and logs do not fit")
