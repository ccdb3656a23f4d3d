"""What a drill will do, all of it decided by its seed: the jobs, their known answers, the faults.

Plain values and functions; nothing is started here. Called by: every other module of the drill, also in the
producer processes, which must agree with the audit on what job number 4711 was.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from codeyard.producer.submission import Submission
from codeyard.shared.job import Lane
from codeyard.shared.record import State

MAX_TOKENS = 64  # answers of the simulated engine have 16 to 255 tokens; long ones are cut here
FAILING = "!fail"  # prompts that begin so fail in the drill's own workers, see fleet.py
TENANT = "drill"
SHORT_S = 1.0  # a deadline that many of those who have it miss
LONG_S = 3_600.0
LANES = (Lane.INTERACTIVE, *(Lane.STANDARD,) * 5, *(Lane.BULK,) * 4)  # a light urgent lane: it is probed for recovery


class FaultKind(StrEnum):
    KILL_WORKER = "kill_worker"
    KILL_GATEWAY = "kill_gateway"
    KILL_PRODUCER = "kill_producer"
    PAUSE_WORKER = "pause_worker"
    FILL_QUEUE = "fill_queue"
    RESTART_BROKER = "restart_broker"
    RESTART_STORE = "restart_store"
    CUT_BROKER = "cut_broker"
    CUT_STORE = "cut_store"
    DELAY_BROKER = "delay_broker"
    DELAY_STORE = "delay_store"


PROCESSES = (
    FaultKind.KILL_WORKER,
    FaultKind.KILL_GATEWAY,
    FaultKind.KILL_PRODUCER,
    FaultKind.PAUSE_WORKER,
    FaultKind.FILL_QUEUE,
)
SERVERS = (FaultKind.RESTART_BROKER, FaultKind.RESTART_STORE)
LINKS = (FaultKind.CUT_BROKER, FaultKind.CUT_STORE, FaultKind.DELAY_BROKER, FaultKind.DELAY_STORE)


@dataclass(frozen=True, slots=True)
class PlannedJob:
    number: int
    prompt: str
    lane: Lane
    stream: bool
    timeout_s: float
    cancel: bool  # its producer cancels it once it is accepted
    expected: frozenset[State]

    def submission(self, namespace: str, model: str) -> Submission:
        return Submission(
            prompt=self.prompt,
            model=model,
            lane=self.lane,
            idempotency_key=f"{namespace}-{self.number}",
            sampling={"max_tokens": MAX_TOKENS, "temperature": 0.0},
            stream=self.stream,
            timeout_s=self.timeout_s,
            tenant=TENANT,
        )

    def body(self, model: str) -> dict[str, Any]:
        """Of the same job over HTTP."""
        return {
            "model": model,
            "prompt": self.prompt,
            "lane": self.lane,
            "sampling": {"max_tokens": MAX_TOKENS, "temperature": 0.0},
            "stream": self.stream,
            "timeout_s": self.timeout_s,
        }


def planned_job(seed: int, number: int, *, can_fail: bool) -> PlannedJob:
    """Job `number`, from 0. `can_fail`: the engine knows FAILING."""
    cancel, short = number % 97 == 5, number % 211 == 17
    fails = can_fail and number % 199 == 11 and not cancel and not short
    expected = {State.FAILED} if fails else {State.SUCCEEDED}
    if cancel:
        expected |= {State.CANCELLED}
    if short:
        expected |= {State.EXPIRED}
    return PlannedJob(
        number=number,
        prompt=f"{FAILING if fails else ''}def drill_{seed}_{number}():",
        lane=LANES[number * 7 % len(LANES)],
        stream=number % 10 == 3,
        timeout_s=SHORT_S if short else LONG_S,
        cancel=cancel,
        expected=frozenset(expected),
    )


@dataclass(frozen=True, slots=True)
class Fault:
    """`at` is a share of the jobs being final, in (0, 1): a fault meets a fleet under load, however fast it is.
    `choice` picks the victim among those there are then; `scale` in [0, 1) how long it lasts."""

    at: float
    kind: FaultKind
    choice: int
    scale: float


def schedule(seed: int, num_faults: int, kinds: Sequence[FaultKind]) -> list[Fault]:
    """`num_faults` faults in order; every kind comes before one comes again."""
    choose = random.Random(f"faults {seed}")
    found: list[Fault] = []
    round_of: list[FaultKind] = []
    for n in range(num_faults if kinds else 0):
        if not round_of:
            round_of = choose.sample(list(kinds), len(kinds))
        at = 0.03 + 0.92 * (n + choose.uniform(0.1, 0.9)) / num_faults
        found.append(Fault(at, round_of.pop(), choose.randrange(1_000), choose.random()))
    return found
