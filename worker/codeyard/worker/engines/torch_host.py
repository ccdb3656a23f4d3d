"""The child process of the torch engine: owns the model, speaks length-prefixed JSON over its pipes.

    stdin   {"model", "device", "dtype", "max_model_len", "max_running", "load_format", "quantization",
             "chat_template"}  once
            {"op": "generate", "jobs": [...]} | {"op": "abort", "serial"}
    stdout  {"version", "context_tokens", "device"} | {"error"}  once
            {"op": "step", "running", "deltas": [...]} | {"op": "refused", "serial", "error", "code", "message"}

Jobs that come while a batch runs form the next one. A thread reads stdin, so that an abort reaches a
running batch between two steps, and the end of stdin ends the process in the middle of one.
"""

import contextlib
import ctypes
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

from codeyard.shared.chat import Chat
from codeyard.shared.errors import JobRejected
from codeyard.shared.job import Lane, Prompt, Sampling
from codeyard.worker.engines.port import EngineJob

if TYPE_CHECKING:
    from codeyard.worker.engines.torch_batch import Row, TorchModel

PR_SET_PDEATHSIG = 1  # linux/prctl.h
QUIET = {  # its stderr is shown when it dies; nothing else belongs there
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

Frame = dict[str, Any]


class Host:
    """Batches, one after another. `inbox` and `aborted` are written by the thread that reads stdin."""

    def __init__(self, model: "TorchModel", send: Callable[[Frame], None], *, max_running: int) -> None:
        self.inbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()
        self.aborted: set[int] = set()
        self._model = model
        self._send = send
        self._max_running = max_running
        self._waiting: list[Frame] = []

    def serve(self) -> None:
        """For ever; the process ends from outside or with its stdin."""
        while True:
            self.serve_batch()

    def serve_batch(self) -> None:
        """Wait for jobs, run those that are there, at most as many as there are slots."""
        if not self._waiting:
            self._waiting += self.inbox.get()["jobs"]
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting += self.inbox.get_nowait()["jobs"]
        taken, self._waiting = self._waiting[: self._max_running], self._waiting[self._max_running :]
        self.aborted.difference_update([serial for serial in list(self.aborted) if serial < taken[0]["serial"]])
        rows = [row for frame in taken if (row := self._row(frame)) is not None]
        self._report(rows)  # those aborted in the queue, or complete with what was generated before
        try:
            self._model.run(rows, self._report)
        except Exception as error:
            self._isolate(rows, error)

    def _row(self, frame: Frame) -> "Row | None":
        job = EngineJob(
            id=str(frame["serial"]),
            prompt=_prompt(frame["prompt"]),
            sampling=Sampling.model_validate(frame["sampling"]),
            lane=Lane.STANDARD,
            stream=frame["stream"],
            prefix_token_ids=tuple(frame["prefix"]),
        )
        try:
            return self._model.row(frame["serial"], job)
        except JobRejected as error:
            self._refuse(frame["serial"], "rejected", str(error), code=error.code)
        except Exception as error:
            self._refuse(frame["serial"], "failed", f"{type(error).__name__}: {error}")
        return None

    def _isolate(self, rows: Sequence["Row"], error: Exception) -> None:
        """One of them broke the batch: alone, it breaks only itself."""
        if not self._model.works():
            raise error
        left = [row for row in rows if row.completion.finish_reason is None]
        if len(rows) == 1:
            for row in left:
                self._refuse(row.serial, "failed", f"{type(error).__name__}: {error}")
            return
        for row in left:
            try:
                self._model.run([row], self._report)
            except Exception as alone:
                self._isolate([row], alone)

    def _report(self, rows: Sequence["Row"]) -> None:
        deltas = []
        for row in rows:
            if row.serial in self.aborted:
                self.aborted.discard(row.serial)
                row.completion.end("abort")
            if (delta := row.completion.delta()) is not None:
                deltas.append(
                    {
                        "serial": row.serial,
                        "text": delta.text,
                        "token_ids": delta.token_ids,
                        "finish_reason": delta.finish_reason,
                        "prompt_tokens": delta.prompt_tokens,
                        "stop": delta.stop,
                        "logprobs": [one.model_dump() for one in delta.logprobs],
                    }
                )
        running = sum(row.completion.finish_reason is None for row in rows)
        self._send({"op": "step", "running": running, "deltas": deltas})

    def _refuse(self, serial: int, error: str, message: str, *, code: str = "") -> None:
        self._send({"op": "refused", "serial": serial, "error": error, "code": code, "message": message[:500]})


def _prompt(said: Any) -> Prompt:
    if isinstance(said, dict):
        return Chat.model_validate(said)
    return said if isinstance(said, str) else tuple(said)


def main() -> None:
    _die_with_parent()
    os.environ.update(QUIET)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not end up between frames

    def send(frame: Frame) -> None:
        body = json.dumps(frame).encode()
        out.write(len(body).to_bytes(4, "big") + body)
        out.flush()

    asked = _receive(sys.stdin.buffer)
    if asked is None:
        return
    try:
        from codeyard.worker.engines.torch_batch import TorchModel

        max_running = asked.pop("max_running")
        model = TorchModel(asked.pop("model"), **asked)
    except Exception as error:
        # Whatever is wrong with a model directory or a driver: the parent shows it to a person.
        said = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        send({"error": said[:1_000]})
        sys.exit(1)
    host = Host(model, send, max_running=max_running)
    threading.Thread(target=_read, args=(host,), daemon=True).start()
    send({"version": model.version, "context_tokens": model.context_tokens, "device": model.device.type})
    host.serve()


def _read(host: Host) -> None:
    while (frame := _receive(sys.stdin.buffer)) is not None:
        if frame["op"] == "abort":
            host.aborted.add(frame["serial"])
        else:
            host.inbox.put(frame)
    os._exit(0)  # the parent is gone or done with us: nothing here is worth a step more


def _receive(pipe: BinaryIO) -> Frame | None:
    head = pipe.read(4)
    if len(head) < 4:
        return None
    frame: Frame = json.loads(pipe.read(int.from_bytes(head, "big")))
    return frame


def _die_with_parent() -> None:
    """Even when it cannot read its stdin, being stopped or in a long pass."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
