"""WeightedLanes: a fixed window shared by lanes, closed batches, suspects apart."""

from codeyard.shared.job import JobId, Lane
from codeyard.worker.scheduling.port import Candidate, EngineLoad
from codeyard.worker.scheduling.weighted import WeightedLanes

SHARES = {Lane.INTERACTIVE: 8.0, Lane.STANDARD: 3.0, Lane.BULK: 1.0}
IDLE: dict[Lane, int] = {}
MORE = {Lane.BULK: 10}


def lanes(*, slots: int = 12, continuous: bool = True, linger_s: float = 0.02) -> WeightedLanes:
    return WeightedLanes(slots=slots, continuous=continuous, shares=SHARES, linger_s=linger_s)


def job(
    name: JobId, lane: Lane = Lane.BULK, *, at_s: float = 0.0, suspect: bool = False, attempt: int = 1
) -> Candidate:
    return Candidate(name, lane, "t", 10, 10, at_s, 1e9, suspect=suspect, attempt=attempt)


def admitted(scheduler: WeightedLanes, now_s: float = 0.0) -> tuple[JobId, ...]:
    return scheduler.decide(now_s, IDLE, EngineLoad()).admit


def test_lanes_with_work_get_slots_by_their_shares() -> None:
    """A flood in one lane must not push the others out."""
    scheduler = lanes(slots=24)
    for number in range(100):
        for lane in Lane:
            scheduler.offer(job(f"{lane}{number}", lane), 0.0)

    chosen = admitted(scheduler)

    assert [sum(name.startswith(lane) for name in chosen) for lane in Lane] == [16, 6, 2]


def test_a_lane_alone_gets_every_slot() -> None:
    """Work-conserving: a share is a right against others with work, not a ceiling."""
    scheduler = lanes()
    for number in range(20):
        scheduler.offer(job(str(number)), 0.0)

    assert len(admitted(scheduler)) == 12


def test_a_lane_that_was_empty_earns_no_burst_for_it() -> None:
    """After an hour of bulk alone, interactive work gets its share, not everything."""
    scheduler = lanes(slots=12)
    for number in range(200):
        scheduler.offer(job(f"bulk{number}"), 0.0)
    for _ in range(10):
        for name in admitted(scheduler):
            scheduler.ended(name, 1.0)
    for number in range(100):
        scheduler.offer(job(f"interactive{number}", Lane.INTERACTIVE), 2.0)

    chosen = admitted(scheduler, 2.0)

    assert any(name.startswith("bulk") for name in chosen)


def test_a_job_that_comes_back_keeps_its_place() -> None:
    """A requeued job has waited since it was submitted, not since this delivery."""
    scheduler = lanes(slots=1)
    scheduler.offer(job("young", at_s=5.0), 6.0)
    scheduler.offer(job("old", at_s=1.0), 7.0)

    assert admitted(scheduler) == ("old",)


def test_a_withdrawn_job_is_never_admitted() -> None:
    """Cancelled while waiting: it must not reach the engine; unknown ids are no error."""
    scheduler = lanes()
    scheduler.offer(job("a"), 0.0)
    scheduler.withdraw("a", 0.0)
    scheduler.withdraw("unknown", 0.0)

    assert admitted(scheduler) == ()


def test_a_closed_batch_waits_for_the_engine_to_be_empty() -> None:
    """An engine that cannot join jobs would queue them unseen, out of the policy's hands."""
    scheduler = lanes(slots=2, continuous=False)
    for name in "abc":
        scheduler.offer(job(name), 0.0)
    first = admitted(scheduler)
    scheduler.ended(first[0], 1.0)

    while_running = admitted(scheduler, 1.0)
    scheduler.ended(first[1], 2.0)

    assert (first, while_running, admitted(scheduler, 2.0)) == (("a", "b"), (), ("c",))


def test_a_closed_batch_lingers_from_its_first_job_only_while_more_is_coming() -> None:
    """Lingering with nothing at the broker is latency for nothing."""
    scheduler = lanes(slots=4, continuous=False, linger_s=0.02)
    scheduler.offer(job("a"), 1.0)
    scheduler.offer(job("b"), 1.015)

    early = scheduler.decide(1.015, MORE, EngineLoad())
    due = scheduler.decide(1.02, MORE, EngineLoad())

    assert early.admit == ()
    assert early.wake_in_s is not None
    assert abs(early.wake_in_s - 0.005) < 1e-9
    assert due.admit == ("a", "b")


def test_a_closed_batch_does_not_linger_when_nothing_is_at_the_broker() -> None:
    """One job on an idle yard starts at once."""
    scheduler = lanes(slots=4, continuous=False)
    scheduler.offer(job("a"), 1.0)

    assert admitted(scheduler, 1.0) == ("a",)


def test_suspects_wait_for_an_empty_engine_and_hold_everything_else_back() -> None:
    """If one of them kills the engine, no innocent may be in it."""
    scheduler = lanes(slots=4)
    scheduler.offer(job("innocent"), 0.0)
    assert admitted(scheduler) == ("innocent",)
    scheduler.offer(job("suspect", suspect=True), 1.0)
    scheduler.offer(job("next", Lane.INTERACTIVE), 1.0)

    beside = admitted(scheduler, 1.0)
    scheduler.ended("innocent", 2.0)
    apart = admitted(scheduler, 2.0)
    beside_the_suspect = admitted(scheduler, 2.0)
    scheduler.ended("suspect", 3.0)

    assert (beside, apart, beside_the_suspect) == ((), ("suspect",), ())
    assert admitted(scheduler, 3.0) == ("next",)


def test_a_killer_among_suspects_is_alone_after_a_logarithm_of_crashes() -> None:
    """Bisection: its neighbours complete on the way, and are never charged."""
    scheduler = lanes(slots=64)
    for number in range(64):
        scheduler.offer(job(str(number), suspect=True), 0.0)

    crashes = 0
    completed: set[JobId] = set()
    for _ in range(64):
        group = admitted(scheduler)
        if group == ("37",):
            break
        for name in group:
            scheduler.ended(name, 0.0)
        if "37" in group:
            crashes += 1
            for name in group:
                scheduler.offer(job(name, suspect=True), 0.0)
        else:
            completed.update(group)

    assert group == ("37",)
    assert crashes <= 6


def test_a_suspect_with_many_attempts_runs_alone_though_nobody_remembers_it() -> None:
    """A crash that takes the worker with it must not bring the same group back for ever."""
    scheduler = lanes(slots=8)
    for number in range(8):
        scheduler.offer(job(str(number), suspect=True, attempt=4), 0.0)

    assert len(admitted(scheduler)) == 1
