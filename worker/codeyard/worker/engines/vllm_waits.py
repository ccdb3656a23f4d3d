"""Let vLLM's processes on a CPU sleep while they wait for each other, instead of yielding in a loop.

vLLM's engine core waits for its worker by `sched_yield` in a loop, the worker likewise for a second after each
step (vllm/distributed/device_communicators/shm_broadcast.py). On a machine with few cores that takes a core from
the work itself; and Linux 6.18 gives a loop of yields so odd a place in its run queues that others on the same core
waited 0.5 to 3 s for it (measured: Redis, RabbitMQ, this worker; docs/engines.md). A nap of 20 us costs a step
about 0.1 ms.

Loaded by vLLM in each of its processes as a plugin (entry point `vllm.general_plugins`); does nothing unless the
worker that starts them asked for it in the environment.
"""

import os
import time

NAP = "CODEYARD_VLLM_NAP_S"  # set by vllm_load around the start of an engine on a CPU
NAP_S = "0.00002"


def register() -> None:
    """What vLLM calls. Newer versions may wait otherwise: then there is nothing to replace."""
    if (nap := os.environ.get(NAP)) is None:
        return
    from vllm.distributed.device_communicators import shm_broadcast

    nap_s = float(nap)
    if hasattr(shm_broadcast, "sched_yield"):
        shm_broadcast.sched_yield = lambda: time.sleep(nap_s)
