"""One attempt of one job on the engine, and what it means.

`execute` is the effect: it takes over what an earlier owner streamed, generates, and says what came
out; it raises nothing but cancellation. `ending` is the decision: a plain function of that.
Called by: worker.runner.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import cast

from codeyard.shared.blobs.port import BlobStore
from codeyard.shared.claims import redeem
from codeyard.shared.errors import BlobMissing, EngineDead, JobFailed, JobRejected, MalformedMessage
from codeyard.shared.job import Claim, Prompt
from codeyard.shared.record import Event, Failure, Result, State, Usage
from codeyard.shared.store.port import Renewal, Store
from codeyard.worker.engines.port import Adapter, Delta, Engine, EngineJob
from codeyard.worker.held import Finished, HandBack, HeldJob, Lost, Retry
from codeyard.worker.patience import persist

POISON_AFTER = 3  # engine deaths under a job that ran alone; docs/protocol.md


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one run of a job gave: a result as if it had succeeded, and what went wrong if it did not."""

    result: Result
    error: Exception | None


@dataclass(frozen=True, slots=True)
class Again:
    """Not an ending: the job stays in hand and waits for the engine once more."""


async def execute(
    held: HeldJob,
    engine: Engine,
    store: Store,
    blobs: BlobStore | None,
    *,
    adapters: Mapping[str, Adapter | None],
    batch_size: int,
    save_tokens: int,
    on_delta: Callable[[HeldJob, Delta], None],
) -> Attempt:
    """Run one job to its end, its deadline, or the engine's. `adapters` are those of every revision this
    engine serves, None for its own; `on_delta` hears of every delta. A job that may grow longer than
    `save_tokens` comes in deltas even if it does not stream, so that another worker can go on with it."""
    started_s, first_s = time.monotonic(), None
    finish_reason, stop, prompt_tokens = None, None, 0
    error: Exception | None = None
    try:
        prompt = await _prompt(held, blobs)
        goes_on = held.continuable(resumes_calls=engine.info.resumes_calls)
        await _prepare(held, store, goes_on=goes_on, alone=held.suspect and batch_size == 1)
        stream = held.job.stream or (goes_on and held.job.sampling.max_tokens > save_tokens)
        engine_job = _engine_job(held, prompt, adapters, stream=stream)
        async with asyncio.timeout(held.deadline_s - time.monotonic()):
            deltas = cast(AsyncGenerator[Delta, None], engine.generate(engine_job))
            async with aclosing(deltas):
                async for delta in deltas:
                    if delta.token_ids and first_s is None:
                        first_s = time.monotonic()
                        if not held.log.token_ids:
                            held.first_token_s = first_s
                    held.log.add(delta)
                    on_delta(held, delta)
                    if delta.finish_reason is not None:
                        finish_reason, stop, prompt_tokens = delta.finish_reason, delta.stop, delta.prompt_tokens
    except asyncio.CancelledError:
        if not held.abandoned:
            raise
        error = EngineDead("it did not end its jobs when it was closed")
    except Exception as raised:
        # The edge of a job: whatever an engine throws ends this job, not the worker.
        early = isinstance(raised, TimeoutError) and time.monotonic() < held.deadline_s
        error = JobFailed("the engine timed out") if early else raised
    result = Result(
        state=State.SUCCEEDED,
        text=held.log.text,
        content=held.log.said.content,
        tool_calls=held.log.said.tool_calls,
        logprobs=tuple(held.log.said.logprobs),
        finish_reason=finish_reason,
        stop=stop,
        usage=Usage(prompt_tokens=prompt_tokens, completion_tokens=len(held.log.token_ids)),
        engine=engine.info.version,
        revision=held.job.revision if adapters.get(held.job.revision) else engine.info.revision,
        batch_size=batch_size,
        first_token_s=first_s - started_s if first_s is not None else None,
        generate_s=time.monotonic() - started_s,
    )
    return Attempt(result, error)


def ending(held: HeldJob, attempt: Attempt, *, max_attempts: int) -> Finished | Retry | HandBack | Lost | Again:
    """What becomes of a job after an attempt. What it was told to stop for goes before what came out."""
    result, error = attempt.result, attempt.error
    match held.stop_reason:
        case "lost":
            return Lost(held)
        case "cancelled":
            return _ended(held, result, State.CANCELLED, "cancelled", "cancelled on request")
        case "drained":
            return HandBack(held)
    if isinstance(error, EngineDead):
        if held.alone_crashes >= POISON_AFTER:
            return Finished(held, poisoned(held.attempt))
        return Again()
    if held.stop_reason == "preempted" and result.finish_reason in (None, "abort"):
        return Again()
    if isinstance(error, TimeoutError):
        text = f"not finished within its {held.job.timeout_s:g} s"
        return _ended(held, result, State.EXPIRED, "deadline_exceeded", text)
    if isinstance(error, JobRejected):
        return _ended(held, result, State.FAILED, error.code, str(error))
    if error is None and result.finish_reason in (None, "abort"):
        error = JobFailed("the engine ended it without being asked")
    if error is None:
        return Finished(held, result)
    text = str(error) or type(error).__name__
    if held.attempt < max_attempts:
        return Retry(held, text)
    return _ended(held, result, State.FAILED, "engine_error", f"{text} (attempt {held.attempt}, the last)")


def poisoned(attempt: int) -> Result:
    """The result of a job that killed its engine each time it ran alone."""
    text = f"the engine died each time this job ran alone; given up at attempt {attempt}"
    return Result(state=State.FAILED, error=Failure(code="poison", message=text))


async def _prepare(held: HeldJob, store: Store, *, goes_on: bool, alone: bool) -> None:
    """Take over or drop what was generated before; record that a suspect runs alone before it may crash."""
    if alone:
        await persist(lambda: store.renew([Renewal(held.id, held.fence, alone=True)]))
        held.alone = True
    if held.log.last_seq and not held.log.token_ids and goes_on:
        held.log.resume(await _streamed(held, store))
    elif not goes_on:
        held.log.restart()


async def _streamed(held: HeldJob, store: Store) -> list[Event]:
    events: list[Event] = []
    after = 0
    while page := await persist(lambda: store.events(held.id, after=after)):  # noqa: B023 - awaited before `after` moves
        events += page
        after = page[-1].seq
    return events


async def _prompt(held: HeldJob, blobs: BlobStore | None) -> Prompt:
    """What the job's claim stands for, if it has one. Raises JobRejected."""
    prompt = held.job.prompt
    if not isinstance(prompt, Claim):
        return prompt
    if blobs is None:
        raise JobRejected("prompt_missing", "this worker has no access to stored prompts")
    if held.redeemed is None:
        try:
            held.redeemed = await persist(lambda: redeem(blobs, held.job.tenant, prompt))
        except BlobMissing as error:
            raise JobRejected("prompt_missing", str(error)) from None
        except MalformedMessage as error:
            raise JobRejected("prompt_malformed", str(error)) from None
    return held.redeemed


def _engine_job(held: HeldJob, prompt: Prompt, adapters: Mapping[str, Adapter | None], *, stream: bool) -> EngineJob:
    """Raises JobRejected for a revision whose weights are not here: another's answer would be a wrong one."""
    job = held.job
    if job.revision not in adapters:
        raise JobRejected("unknown_revision", f"this worker has {', '.join(adapters)}, not {job.revision}")
    return EngineJob(
        id=job.id,
        prompt=prompt,
        sampling=job.sampling,
        lane=job.lane,
        stream=stream,
        prefix_token_ids=tuple(held.log.token_ids),
        adapter=adapters[job.revision],
        prefix_text=held.log.text,
    )


def _ended(held: HeldJob, result: Result, state: State, code: str, message: str) -> Finished:
    failure = Failure(code=code, message=message)
    return Finished(held, result.model_copy(update={"state": state, "error": failure}))
