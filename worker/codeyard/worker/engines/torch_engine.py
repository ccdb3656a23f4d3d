"""The torch engine: transformers on any device, in closed batches, in a child process.

The child (`torch_host`) owns the model. So the worker's event loop stays free, a batch that hangs can be
killed by force, memory really returns, and a crash of the child is an EngineDead and not the worker's
end. Parent and child speak length-prefixed JSON over pipes; the child ends when its stdin does.
"""

import asyncio
import contextlib
import json
import logging
import sys
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from codeyard.shared.errors import EngineDead, EngineUnavailable, JobFailed, JobRejected
from codeyard.shared.job import JobId
from codeyard.shared.settings import EngineSettings
from codeyard.worker.engines.models import ModelSource
from codeyard.worker.engines.port import Delta, EngineInfo, EngineJob, Load

log = logging.getLogger(__name__)

LOAD_S = 600.0  # a large model from a slow disk
CLOSE_S = 3.0  # for a child that was asked to end
STDERR_LINES = 20  # of the child's, shown when it dies
MAX_FRAME = 64 * 1024 * 1024


class TorchEngine:
    """Made by `start`. One reader task spreads the child's frames over the jobs' queues."""

    def __init__(self, process: asyncio.subprocess.Process, info: EngineInfo) -> None:
        self.info = info
        self._process = process
        self._jobs: dict[JobId, asyncio.Queue[dict[str, Any]]] = {}
        self._steps = 0
        self._dead: str | None = None
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._reader = asyncio.create_task(self._read(), name="torch engine frames")
        self._stderr_reader = asyncio.create_task(self._read_stderr(), name="torch engine stderr")

    @classmethod
    async def start(cls, source: ModelSource, settings: EngineSettings) -> "TorchEngine":
        """Load the model in a child process. Raises EngineUnavailable with what the child said."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "codeyard.worker.engines.torch_host",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        asked = {
            "model": source.location,
            "device": settings.device,
            "dtype": settings.dtype,
            "max_running": settings.max_running,
            "max_model_len": settings.max_model_len,
        }
        try:
            async with asyncio.timeout(LOAD_S):
                await _send(process.stdin, asked)
                ready = await _receive(process.stdout)
                if ready is None or "error" in ready:
                    said = ready["error"] if ready else (await process.stderr.read()).decode(errors="replace")[-2_000:]
                    raise EngineUnavailable(f"torch cannot load {source.location}: {said.strip()}")
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            _close_pipes(process)
            raise
        info = EngineInfo(
            name="torch",
            version=ready["version"],
            model=source.location,
            revision=source.revision,
            context_tokens=ready["context_tokens"],
            max_running=settings.max_running,
            continuous=False,
        )
        return cls(process, info)

    async def generate(self, job: EngineJob) -> AsyncGenerator[Delta, None]:
        if self._dead is not None:
            raise EngineDead(self._dead)
        frames = self._jobs[job.id] = asyncio.Queue()
        ended = False
        try:
            await self._tell({"op": "generate", "job": _as_frame(job)})
            while not ended:
                frame = await frames.get()
                ended = frame["op"] != "delta" or frame.get("finish_reason") is not None
                match frame["op"]:
                    case "rejected":
                        raise JobRejected(frame["code"], frame["message"])
                    case "failed":
                        raise JobFailed(frame["message"])
                    case "dead":
                        raise EngineDead(frame["message"])
                yield Delta(
                    text=frame["text"],
                    token_ids=tuple(frame["token_ids"]),
                    finish_reason=frame.get("finish_reason"),
                    prompt_tokens=frame.get("prompt_tokens", 0),
                )
        finally:
            del self._jobs[job.id]
            if not ended and self._dead is None:
                await self.abort(job.id)

    async def abort(self, job_id: JobId) -> None:
        with contextlib.suppress(EngineDead):
            await self._tell({"op": "abort", "id": job_id})

    def load(self) -> Load:
        return Load(running=len(self._jobs), waiting=0, steps=self._steps)

    async def close(self, *, force: bool = False) -> None:
        if self._dead is None and not force:
            with contextlib.suppress(EngineDead, TimeoutError):
                await self._tell({"op": "close"})
                async with asyncio.timeout(CLOSE_S):
                    await self._process.wait()
        self._die("the engine was closed")
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        for task in (self._reader, self._stderr_reader):
            task.cancel()
        await asyncio.gather(self._reader, self._stderr_reader, return_exceptions=True)
        _close_pipes(self._process)

    async def _tell(self, frame: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            await _send(self._process.stdin, frame)
        except (ConnectionError, RuntimeError, OSError) as error:
            raise EngineDead(self._dead or f"the torch process is gone: {error}") from None

    async def _read(self) -> None:
        assert self._process.stdout is not None
        while (frame := await _receive(self._process.stdout)) is not None:
            if frame["op"] == "step":
                self._steps += 1
                for one in frame["deltas"]:
                    self._give(one)
            else:
                self._give(frame)
        status = await self._process.wait()
        await asyncio.gather(self._stderr_reader, return_exceptions=True)
        self._die(f"the torch process ended with status {status}: {' | '.join(self._stderr)[-500:]}")

    def _give(self, frame: dict[str, Any]) -> None:
        if frames := self._jobs.get(frame["id"]):
            frames.put_nowait(frame)

    async def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        while line := await self._process.stderr.readline():
            self._stderr.append(line.decode(errors="replace").rstrip())

    def _die(self, reason: str) -> None:
        if self._dead is None:
            self._dead = reason
        for frames in self._jobs.values():
            frames.put_nowait({"op": "dead", "message": self._dead})


def _as_frame(job: EngineJob) -> dict[str, Any]:
    return {
        "id": job.id,
        "prompt": job.prompt,
        "sampling": job.sampling.model_dump(mode="json", exclude_none=True),
        "stream": job.stream,
        "prefix": job.prefix_token_ids,
    }


async def _send(pipe: asyncio.StreamWriter, frame: dict[str, Any]) -> None:
    body = json.dumps(frame).encode()
    pipe.write(len(body).to_bytes(4, "big") + body)
    await pipe.drain()


async def _receive(pipe: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next frame, None at the end of the pipe."""
    try:
        length = int.from_bytes(await pipe.readexactly(4), "big")
        if length > MAX_FRAME:
            return None
        frame: dict[str, Any] = json.loads(await pipe.readexactly(length))
    except asyncio.IncompleteReadError:
        return None
    return frame


def _close_pipes(process: asyncio.subprocess.Process) -> None:
    if process.stdin is not None:
        process.stdin.close()
    process._transport.close()  # type: ignore[attr-defined]  # else its pipes warn when they are collected
