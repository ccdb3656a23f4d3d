"""How long Anthropic's form costs: a request read into a job, a result written as a message.

    python loadtest/bench_convert.py [--kilobytes 10] [--rounds 5000]

The request is one as coding agents send them: system blocks, tools with schemas, turns with calls and results.
Measured is all of the conversion and nothing else, from the bytes of the body to the bytes of the answer, in
one process: Anthropic -> job -> message. No HTTP, no broker, no store. Beside it what Python's own JSON parser
takes for the same body ("parse"): ratios within one run mean more than the numbers.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import click

from codeyard.producer.gateway.anthropic.convert import Asked, message_of, read_message
from codeyard.shared.chat import ToolCall
from codeyard.shared.job import Lane, new_job_id
from codeyard.shared.record import JobStatus, Result, State, Usage

WARM_UP = 200  # rounds that do not count
ANSWER = "I read the file and changed the function as you asked.\n" * 8
CALL = ToolCall(id="call_1", name="edit_file", arguments=json.dumps({"path": "/src/a.py", "text": "x = 1\n" * 40}))


def request(num_bytes: int) -> bytes:
    """A body of about so many bytes: turns are added until it is full."""
    properties = {"path": {"type": "string", "description": "absolute"}, "text": {"type": "string"}}
    schema = {"type": "object", "properties": properties, "required": ["path"], "additionalProperties": False}
    cached = {"cache_control": {"type": "ephemeral"}}
    tools = [
        {"name": name, "description": "Works on a file.\n" * 6, "input_schema": schema}
        for name in ("read_file", "edit_file", "list_files", "run_tests", "search")
    ]
    body: dict[str, Any] = {
        "model": "starter",
        "max_tokens": 32_000,
        "stream": True,
        "system": [{"type": "text", "text": "You change code. " * 20}, {"type": "text", "text": "Rules.", **cached}],
        "tools": tools,
        "metadata": {"user_id": "u" * 40},
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Fix the bug.", **cached}]}],
    }
    while len(encoded := json.dumps(body).encode()) < num_bytes:
        number = len(body["messages"])
        call = {"type": "tool_use", "id": f"call_{number}", "name": "read_file", "input": {"path": f"/src/{number}.py"}}
        result = {"type": "tool_result", "tool_use_id": f"call_{number}", "content": "def f(x):\n    return x\n" * 16}
        body["messages"] += [
            {"role": "assistant", "content": [{"type": "text", "text": "Let me look."}, call]},
            {"role": "user", "content": [result]},
        ]
    return encoded


def answered(asked: Asked) -> JobStatus:
    result = Result(
        state=State.SUCCEEDED,
        text=ANSWER,
        content=ANSWER,
        tool_calls=(CALL,),
        finish_reason="tool_calls",
        usage=Usage(prompt_tokens=3_000, completion_tokens=200),
    )
    return JobStatus(
        id=new_job_id(),
        state=State.SUCCEEDED,
        lane=Lane.INTERACTIVE,
        model=asked.model,
        revision="starter-1",
        tenant="default",
        key="key",
        attempt=1,
        created_at=1.0,
        started_at=2.0,
        finished_at=3.0,
        deadline_at=4.0,
        cancel_requested=False,
        last_seq=2,
        result=result,
    )


def timed(rounds: int, work: Callable[[], object]) -> list[float]:
    """Seconds of each round, sorted."""
    times = []
    for number in range(WARM_UP + rounds):
        started = time.perf_counter()
        work()
        if number >= WARM_UP:
            times.append(time.perf_counter() - started)
    return sorted(times)


@click.command(help=__doc__)
@click.option("--kilobytes", default=10.0, show_default=True, type=click.FloatRange(min=4))
@click.option("--rounds", default=5_000, show_default=True, type=click.IntRange(min=100))
def main(kilobytes: float, rounds: int) -> None:
    body = request(round(kilobytes * 1024))
    asked = read_message(body)
    status = answered(asked)

    def there_and_back() -> bytes:
        return json.dumps(message_of(read_message(body), status)).encode()

    print(f"a request of {len(body)} bytes, {len(asked.prompt.messages)} messages, {len(asked.prompt.tools)} tools")
    for name, work in (
        ("parse", lambda: json.loads(body)),
        ("read", lambda: read_message(body)),
        ("answer", lambda: json.dumps(message_of(asked, status)).encode()),
        ("both", there_and_back),
    ):
        times = timed(rounds, work)
        p99_s = times[int(0.99 * len(times))]
        print(f"{name:7} median {1e3 * statistics.median(times):7.3f} ms   p99 {1e3 * p99_s:7.3f} ms")


if __name__ == "__main__":
    main()
