"""The torch engine: transformers on any device, in closed batches, in a child process.

The child (`torch_host`) owns the model. So the worker's event loop stays free, a batch that hangs can be
killed, memory really returns, and a crash of the child is an EngineDead and not the worker's end.
"""

import asyncio
import contextlib
import itertools
import json
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from codeyard.shared.chat import Chat, TokenLogprob
from codeyard.shared.errors import EngineDead, EngineUnavailable, JobFailed, JobRejected
from codeyard.shared.job import JobId
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.chat import template_text
from codeyard.worker.engines.children import descendants
from codeyard.worker.engines.completion import refuse_formats
from codeyard.worker.engines.hermes import hermes_calls
from codeyard.worker.engines.memory import Meter
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import Delta, EngineInfo, EngineJob, Load, Memory

LOAD_S = 600.0  # a large model from a slow disk
LAST_WORDS = 2_000  # bytes of the child's stderr, shown when it dies
READ_BYTES = 65_536

Frame = dict[str, Any]


@dataclass(slots=True, eq=False)
class _Run:
    job: EngineJob
    serial: int  # names this run: the child may still be busy with an earlier one of the same job
    news: asyncio.Queue[Delta | Exception] = field(default_factory=asyncio.Queue)


class TorchEngine:
    """Made by `start`. One task reads the child's frames and spreads them over the jobs' queues."""

    def __init__(
        self, process: asyncio.subprocess.Process, stderr: "_LastWords", info: EngineInfo, device: str, meter: Meter
    ) -> None:
        self.info = info
        self._meter = meter
        self._device = device
        self._process = process
        self._stderr = stderr
        self._runs: dict[int, _Run] = {}
        self._serials = itertools.count()
        self._unsent: list[Frame] = []  # jobs of this turn of the event loop: they make one batch
        self._running = 0
        self._steps = 0
        self._dead: str | None = None  # why; an error is made for each who asks, since one holds its frames
        self._reader: asyncio.Task[None] | None = asyncio.create_task(self._read(), name="torch engine")

    @classmethod
    async def start(cls, source: ModelSource, settings: EngineSettings) -> "TorchEngine":
        """Load the model in a child process. Raises EngineUnavailable with what the child said."""
        if settings.enable_lora:
            raise EngineUnavailable("the torch engine takes no LoRA adapters; vllm does, on a CPU too")
        template, meter = template_text(settings.chat_template), Meter()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "codeyard.worker.engines.torch_host"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # a signal to the worker's group must not end it before the drain
        )
        assert process.stdout is not None
        assert process.stderr is not None
        stderr = _LastWords(process.stderr)
        try:
            _send(
                process,
                {
                    "model": source.location,
                    "device": settings.device,
                    "dtype": settings.dtype,
                    "max_model_len": settings.max_model_len,
                    "max_running": settings.max_running,
                    "load_format": settings.load_format,
                    "quantization": settings.quantization,
                    "chat_template": template,
                },
            )
            async with meter.across(), asyncio.timeout(LOAD_S):
                ready = await _receive(process.stdout)
            if ready is None or "error" in ready:
                said = ready["error"] if ready else await stderr.all()
                raise EngineUnavailable(f"torch cannot load {source.location}: {said}")
        except TimeoutError:
            await _end(process, stderr)
            raise EngineUnavailable(f"torch did not load {source.location} within {LOAD_S:g} s") from None
        except BaseException:
            await _end(process, stderr)
            raise
        info = EngineInfo(
            name="torch",
            version=ready["version"],
            model=source.location,
            revision=source.revision,
            context_tokens=ready["context_tokens"],
            max_running=settings.max_running,
            continuous=False,
            resumes_calls=True,
        )
        return cls(process, stderr, info, ready["device"], meter)

    async def generate(self, job: EngineJob) -> AsyncGenerator[Delta, None]:
        if self._dead is not None:
            raise EngineDead(self._dead)
        if job.adapter is not None:
            raise JobFailed(f"the torch engine takes no LoRA adapters, such as {job.adapter.name}")
        refuse_formats(job, "torch")
        calls = hermes_calls(job, "torch")
        run = _Run(job, next(self._serials))
        self._runs[run.serial] = run
        self._submit(run)
        try:
            while True:
                news = await run.news.get()
                if isinstance(news, Exception):
                    try:
                        raise news
                    finally:
                        del news  # else frame and error hold each other, and with them this engine
                if news.finish_reason is not None:
                    del self._runs[run.serial]
                yield news if calls is None else calls.of(news)
                if news.finish_reason is not None:
                    return
        finally:
            if self._runs.pop(run.serial, None) is not None:
                self._tell({"op": "abort", "serial": run.serial})

    async def abort(self, job_id: JobId) -> None:
        for run in self._runs.values():
            if run.job.id == job_id:
                self._tell({"op": "abort", "serial": run.serial})

    def load(self) -> Load:
        return Load(running=self._running, waiting=max(0, len(self._runs) - self._running), steps=self._steps)

    def pids(self) -> tuple[int, ...]:
        return (self._process.pid, *descendants([self._process.pid]))

    async def memory(self) -> Memory:
        return await asyncio.to_thread(self._meter.measure, self.pids(), self._device)

    async def sleep(self) -> None:
        raise EngineUnavailable("the torch engine has no sleep mode")

    async def wake(self) -> None:
        raise EngineUnavailable("the torch engine has no sleep mode")

    async def close(self, *, force: bool = False) -> None:
        """Kills the child either way: it has nothing that outlives it."""
        self._die("the torch engine was closed")
        reader, self._reader = self._reader, None  # its cancellation holds its frame, and that this engine
        if reader is not None:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
        await _end(self._process, self._stderr)

    def _submit(self, run: _Run) -> None:
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._send_jobs)
        prompt = run.job.prompt
        self._unsent.append(
            {
                "serial": run.serial,
                "prompt": prompt.model_dump(mode="json") if isinstance(prompt, Chat) else prompt,
                "sampling": run.job.sampling.model_dump(mode="json", exclude_none=True),
                "stream": run.job.stream,
                "prefix": run.job.prefix_token_ids,
            }
        )

    def _send_jobs(self) -> None:
        jobs, self._unsent = self._unsent, []
        self._tell({"op": "generate", "jobs": jobs})

    def _tell(self, frame: Frame) -> None:
        """Never waits: what a child that hangs has not read stays in this process, the jobs it has at most."""
        if self._dead is None:
            _send(self._process, frame)

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while (frame := await _receive(self._process.stdout)) is not None:
            if frame["op"] == "step":
                self._steps += 1
                self._running = frame["running"]
                for delta in frame["deltas"]:
                    self._give(delta.pop("serial"), _delta(delta))
            elif frame["error"] == "rejected":
                self._give(frame["serial"], JobRejected(frame["code"], frame["message"]))
            else:
                self._give(frame["serial"], JobFailed(frame["message"]))
        status = await self._process.wait()
        self._die(f"the torch process ended with status {status}: {await self._stderr.all()}")

    def _give(self, serial: int, news: Delta | Exception) -> None:
        run = self._runs.get(serial)
        if run is not None:
            run.news.put_nowait(news)
            if isinstance(news, Exception):
                del self._runs[serial]

    def _die(self, reason: str) -> None:
        if self._dead is None:
            self._dead = reason
        for run in self._runs.values():
            run.news.put_nowait(EngineDead(self._dead))
        self._runs.clear()
        self._running = 0


class _LastWords:
    """Reads the child's stderr, so that the child never waits for it, and keeps the end."""

    def __init__(self, pipe: asyncio.StreamReader) -> None:
        self._pipe = pipe
        self._kept = b""
        self._task = asyncio.create_task(self._read(), name="torch engine stderr")

    async def all(self) -> str:
        """Once the child has ended."""
        await asyncio.wait([self._task], timeout=1.0)
        return self._kept.decode(errors="replace").strip()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _read(self) -> None:
        while chunk := await self._pipe.read(READ_BYTES):
            self._kept = (self._kept + chunk)[-LAST_WORDS:]


def _delta(said: dict[str, Any]) -> Delta:
    logprobs = tuple(TokenLogprob.model_validate(one) for one in said["logprobs"])
    return Delta(**{**said, "token_ids": tuple(said["token_ids"]), "logprobs": logprobs})


def _send(process: asyncio.subprocess.Process, frame: Frame) -> None:
    assert process.stdin is not None
    body = json.dumps(frame).encode()
    with contextlib.suppress(ConnectionError, RuntimeError):  # it has ended, as its stdout tells too
        process.stdin.write(len(body).to_bytes(4, "big") + body)


async def _receive(pipe: asyncio.StreamReader) -> Frame | None:
    """The next frame, None at the end of the pipe."""
    try:
        length = int.from_bytes(await pipe.readexactly(4), "big")
        frame: Frame = json.loads(await pipe.readexactly(length))
    except asyncio.IncompleteReadError:
        return None
    return frame


async def _end(process: asyncio.subprocess.Process, stderr: _LastWords) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
    await stderr.close()
    if process.stdin is not None:
        process.stdin.close()
    process._transport.close()  # type: ignore[attr-defined]  # else its pipes warn when they are collected
