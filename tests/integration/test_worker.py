"""A whole job, from submission to its one result, and every way it can end."""

import asyncio
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from support.fleet import Backend, first_token, fleet_settings, worker_task

from codeyard.producer import AsyncClient, Submission
from codeyard.shared.broker.port import Message, PublishOutcome
from codeyard.shared.chat import Chat
from codeyard.shared.connect import open_broker
from codeyard.shared.errors import FleetError
from codeyard.shared.job import Lane
from codeyard.shared.record import EventKind, State
from codeyard.shared.settings import Settings
from codeyard.shared.store.port import CancelVerdict
from codeyard.shared.topology import Topology
from codeyard.worker import runner, service, warmup
from codeyard.worker.engines import select
from codeyard.worker.engines.port import Delta, Engine, EngineInfo, EngineJob, Load, Memory
from codeyard.worker.engines.simulated import simulated_completion
from codeyard.worker.held import Said

pytestmark = pytest.mark.timeout(90)

LONG = {"max_tokens": 250}


def endless_prompt() -> str:
    """A prompt whose simulated answer is long enough to be stopped in the middle."""
    prompts = (f"def endless_{n}():" for n in range(10_000))
    return next(prompt for prompt in prompts if len(simulated_completion(prompt, 250)[1]) == 250)


async def dead_letters(settings: Settings, count: int) -> dict[str, dict[str, object]]:
    """The headers of `count` dead letters by message id."""
    topology = Topology(settings.namespace)
    broker = await open_broker(settings.broker, topology)
    found: dict[str, dict[str, object]] = {}
    try:
        consumer = await broker.consume({topology.dead_queue: 10})
        while len(found) < count:
            async with asyncio.timeout(20):
                group = await consumer.receive(10)
            found |= {delivery.message_id: dict(delivery.headers) for delivery in group}
            await consumer.ack(group)
        await consumer.close()
    finally:
        await broker.close()
    return found


async def test_a_job_succeeds_with_the_text_that_was_streamed(backend: Backend) -> None:
    """The stream and the result are two views of one thing."""
    prompt = "def add(a, b):"
    async with worker_task(backend.settings()), backend.client() as client:
        job = await client.submit(prompt, stream=True, lane="interactive", sampling={"max_tokens": 40})

        events = [event async for event in job.stream()]
        result = await job.result(timeout=20)

    expected, token_ids, reason = simulated_completion(prompt, 40)
    assert result.state is State.SUCCEEDED
    assert result.text == expected
    assert result.finish_reason == reason
    assert result.usage.completion_tokens == len(token_ids)
    assert "".join(event.text for event in events) == result.text
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert events[-1].kind is EventKind.END


async def test_three_hundred_jobs_of_all_lanes_each_get_their_own_answer(backend: Backend) -> None:
    """Batches, groups and settling mix many jobs; no result may end up under another id."""
    prompts = [f"def job_{n}():" for n in range(300)]
    lanes = [list(Lane)[n % 3] for n in range(300)]
    async with worker_task(backend.settings()), backend.client() as client:
        submissions = [
            Submission(prompt, lane=lane, sampling={"max_tokens": 20})
            for prompt, lane in zip(prompts, lanes, strict=True)
        ]
        jobs = [job for job in await client.submit_many(submissions) if not isinstance(job, FleetError)]

        results = await asyncio.gather(*[job.result(timeout=60) for job in jobs])

    assert [result.text for result in results] == [simulated_completion(prompt, 20)[0] for prompt in prompts]


async def test_a_job_of_no_tokens_counts_its_prompt(embedded: Backend) -> None:
    """What a gateway answers a question for a prompt's length with."""
    async with worker_task(embedded.settings()), embedded.client() as client:
        job = await client.submit("x" * 30, stream=True, sampling={"max_tokens": 0})
        result = await job.result(timeout=20)

    assert (result.state, result.text, result.finish_reason) == (State.SUCCEEDED, "", "length")
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (10, 0)


async def test_a_conversation_is_answered_with_a_call_and_after_its_answer_with_text(backend: Backend) -> None:
    """What an agent does, through broker and store: the stream joined is the result, calls and content included."""
    asked = {"messages": [{"role": "user", "content": "what is in a.py?"}], "tools": [{"name": "look"}]}
    async with worker_task(backend.settings()), backend.client() as client:
        first = await client.submit(Chat.model_validate(asked), stream=True)
        called = await first.result(timeout=20)
        [call] = called.tool_calls
        answer = {"role": "tool", "tool_call_id": call.id, "content": "x = 1"}
        turns = [*asked["messages"], {"role": "assistant", "tool_calls": [call.model_dump()]}, answer]
        second = await client.submit(Chat.model_validate({**asked, "messages": turns}), sampling={"logprobs": 1})
        told = await second.result(timeout=20)
        streams = [[event async for event in job.stream()] for job in (first, second)]

    assert (call.name, call.arguments, called.content, called.finish_reason) == ("look", "{}", "", "tool_calls")
    assert (told.content, told.tool_calls) == (told.text, ())
    assert told.text
    assert "".join(one.text for one in told.logprobs) == told.text
    for events, result in zip(streams, (called, told), strict=True):
        seen = Said()
        for event in events:
            seen.add(event)
        assert (seen.text, seen.content, seen.tool_calls) == (result.text, result.content, result.tool_calls)
        assert tuple(seen.logprobs) == result.logprobs


async def test_the_same_key_attaches_and_replays_the_same_result(backend: Backend) -> None:
    """A caller that retries must get the job it has, not a second one."""
    async with worker_task(backend.settings()), backend.client() as client:
        first = await client.submit("def once():", idempotency_key="once")
        result = await first.result(timeout=20)

        second = await client.submit("def once():", idempotency_key="once")

        assert (second.id, second.attached) == (first.id, True)
        assert second.accepted_status.result == result


async def test_a_prompt_that_is_too_long_fails_and_is_dead_lettered_with_the_reason(backend: Backend) -> None:
    """It can never succeed, so it is not retried; and the dead-letter queue says why."""
    settings = backend.settings(engine={"max_model_len": 64})
    async with worker_task(settings), backend.client() as client:
        job = await client.submit("x" * 1_000)
        result = await job.result(timeout=20)
        dead = await dead_letters(settings, 1)

    assert result.state is State.FAILED
    assert result.error is not None
    assert result.error.code == "prompt_too_long"
    assert dead[job.id]["reason"] == "prompt_too_long"
    assert json.loads(str(dead[job.id]["history"]))[0]["attempt"] == 1


async def test_a_job_that_fails_in_the_engine_is_tried_again_through_a_delay_queue(backend: Backend) -> None:
    """Two attempts, then failed: attempts are counted in the record and end."""
    settings = backend.settings(worker={"max_attempts": 2})
    async with worker_task(settings), backend.client() as client:
        job = await client.submit("!fail in the engine")
        result = await job.result(timeout=30)
        status = await job.status()

    assert (result.state, status.attempt) == (State.FAILED, 2)
    assert result.error is not None
    assert result.error.code == "engine_error"


async def test_a_running_job_is_cancelled_within_a_renewal(backend: Backend) -> None:
    """The tokens it showed before stay; the state is cancelled."""
    async with worker_task(backend.settings(engine={"time_scale": 5.0})), backend.client() as client:
        job = await client.submit(endless_prompt(), stream=True, sampling=LONG)
        await first_token(client, job.id)

        verdict = await job.cancel()
        result = await job.result(timeout=20)

    assert verdict is CancelVerdict.REQUESTED
    assert result.state is State.CANCELLED
    assert 0 < result.usage.completion_tokens < 250


async def test_a_queued_job_is_cancelled_at_once(backend: Backend) -> None:
    """Nobody has it, so nobody needs to be asked."""
    async with worker_task(backend.settings()):
        pass  # the queues are declared, and nobody consumes
    async with backend.client() as client:
        job = await client.submit("def never():")

        assert await job.cancel() is CancelVerdict.CANCELLED
        assert (await job.status()).state is State.CANCELLED


async def test_a_job_past_its_deadline_in_the_queue_expires(backend: Backend) -> None:
    """The worker that comes late must not run it."""
    async with worker_task(backend.settings()):
        pass
    async with backend.client() as client:
        job = await client.submit("def late():", timeout_s=1e-6)
        async with worker_task(backend.settings()):
            result = await job.result(timeout=20)

    assert result.state is State.EXPIRED
    assert result.usage.completion_tokens == 0


async def test_a_job_past_its_deadline_in_the_engine_is_aborted_and_expires(backend: Backend) -> None:
    """Nobody waits for it any more, so its slot goes to others."""
    async with worker_task(backend.settings(engine={"time_scale": 20.0})), backend.client() as client:
        job = await client.submit(endless_prompt(), timeout_s=1.0, sampling=LONG)
        result = await job.result(timeout=20)

    assert result.state is State.EXPIRED
    assert result.error is not None
    assert result.error.code == "deadline_exceeded"


async def test_a_hung_engine_is_replaced_and_its_neighbours_complete(embedded: Backend) -> None:
    """No token for stall_s: closed by force, started again; the job that hangs ends alone as poison."""
    async with worker_task(embedded.settings()), embedded.client() as client:
        hanging = await client.submit("!hang for ever")
        neighbours = [await client.submit(f"def neighbour_{n}():", stream=n % 2 == 0) for n in range(6)]

        results = await asyncio.gather(*[job.result(timeout=40) for job in neighbours])
        hung = await hanging.result(timeout=40)

    assert {result.state for result in results} == {State.SUCCEEDED}
    assert hung.error is not None
    assert hung.error.code == "poison"


async def test_a_job_that_kills_the_engine_is_isolated_while_its_neighbours_complete(embedded: Backend) -> None:
    """One bad job must not take the others along, however often it comes back."""
    async with worker_task(embedded.settings()), embedded.client() as client:
        neighbours = [await client.submit(f"def neighbour_{n}():") for n in range(6)]
        killer = await client.submit("!die")

        results = await asyncio.gather(*[job.result(timeout=40) for job in neighbours])
        killed = await killer.result(timeout=40)

    assert {result.state for result in results} == {State.SUCCEEDED}
    assert killed.error is not None
    assert killed.error.code == "poison"


async def test_a_seeded_job_that_was_streamed_starts_over_behind_a_restarted_event(embedded: Backend) -> None:
    """It cannot be continued exactly, so readers are told to drop what they have."""
    async with worker_task(embedded.settings()), embedded.client() as client:
        seeded = await client.submit(
            endless_prompt(), stream=True, sampling={"max_tokens": 250, "seed": 1}, idempotency_key="seeded"
        )
        await first_token(client, seeded.id)
        await client.submit("!die")

        events = [event async for event in seeded.stream()]
        result = await seeded.result(timeout=30)

    kinds = [event.kind for event in events]
    assert EventKind.RESTARTED in kinds
    after = events[len(kinds) - kinds[::-1].index(EventKind.RESTARTED) :]
    assert "".join(event.text for event in after) == result.text
    assert result.usage.completion_tokens == 250


async def test_a_client_that_is_not_open_says_so() -> None:
    """A forgotten `async with` gets a sentence, not an attribute error."""
    client = AsyncClient("sqlite:///unused.db", "sqlite:///unused.db")
    with pytest.raises(FleetError, match="not open"):
        await client.submit("def f():")


class StuckEngine:
    """Answers the worker's own prompts; then takes jobs, gives nothing, and ignores being aborted and closed."""

    def __init__(self, info: EngineInfo) -> None:
        self.info = info

    async def generate(self, job: EngineJob) -> AsyncGenerator[Delta, None]:
        if not isinstance(job.prompt, str) or warmup.PROMPT not in job.prompt:
            await asyncio.Event().wait()
        yield Delta("a", (1,), "length")

    async def abort(self, job_id: str) -> None:
        raise RuntimeError("it does not even abort")

    def load(self) -> Load:
        return Load(running=1, waiting=0)

    def pids(self) -> tuple[int, ...]:
        return ()

    async def memory(self) -> Memory:
        return Memory(0, 0)

    async def sleep(self) -> None:
        pass

    async def wake(self) -> None:
        pass

    async def close(self, *, force: bool = False) -> None:
        pass


async def test_an_engine_that_ignores_its_own_closing_is_left_behind(
    embedded: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs must not hang with it: their tasks are cancelled, and they run on the next engine."""
    real = select.start_engine
    started: list[Engine] = []

    async def start(*arguments: Any) -> Engine:
        engine: Engine = await real(*arguments)
        started.append(engine)
        return StuckEngine(engine.info) if len(started) == 1 else engine

    monkeypatch.setattr(service, "start_engine", start)
    monkeypatch.setattr(runner, "FORCE_CLOSE_S", 0.2)
    async with worker_task(embedded.settings()), embedded.client() as client:
        jobs = [await client.submit(f"def job_{n}():") for n in range(4)]
        await jobs[0].cancel()
        results = await asyncio.gather(*[job.result(timeout=40) for job in jobs])

    assert len(started) >= 2
    assert results[0].state is State.CANCELLED
    assert {result.state for result in results[1:]} == {State.SUCCEEDED}


async def test_a_malformed_message_is_dead_lettered_with_the_reason_and_the_worker_goes_on(backend: Backend) -> None:
    """A queue is open to every publisher; one broken message must not stop the others."""
    settings = backend.settings()
    async with worker_task(settings), backend.client() as client:
        good = await client.submit("def good():")
        queue = client.topology.job_queue(good.accepted_status.revision, Lane.STANDARD)
        bad = [Message(queue, f"bad-{n}", body, {}) for n, body in enumerate((b"", b"not json", b"{}", b"\xff\xfe"))]
        assert set(await client.publisher.publish(bad, timeout_s=10)) == {PublishOutcome.CONFIRMED}
        after = await client.submit("def after():")

        dead = await dead_letters(settings, 4)
        assert (await good.result(timeout=20)).state is State.SUCCEEDED
        assert (await after.result(timeout=20)).state is State.SUCCEEDED

    assert {headers["reason"] for headers in dead.values()} == {"malformed"}
    assert all(headers["error"] for headers in dead.values())


@pytest.mark.services
async def test_what_the_broker_itself_drops_ends_as_failed(
    rabbitmq_url: str, redis_url: str, tmp_path: Path, namespace: str
) -> None:
    """A foreign consumer that rejects, or a policy, must not leave a caller waiting for ever."""
    settings = fleet_settings(tmp_path, rabbitmq_url, redis_url, namespace)
    async with worker_task(settings):
        pass  # declared, and nobody consumes
    async with AsyncClient(settings=settings, timeout_s=10) as client:
        job = await client.submit("def dropped():")
        queue = client.topology.job_queue(job.accepted_status.revision, Lane.STANDARD)
        connection = await aio_pika.connect(rabbitmq_url)
        async with connection, connection.channel() as channel:
            message = await (await channel.get_queue(queue, ensure=False)).get(timeout=10)
            assert message is not None
            await message.reject(requeue=False)

        async with worker_task(settings):
            result = await job.result(timeout=30)
        dead = await dead_letters(settings, 1)

    assert result.state is State.FAILED
    assert result.error is not None
    assert result.error.code == "dropped_by_broker"
    assert dead[job.id]["reason"] == "dropped_by_broker"
