"""The child process of the torch engine: loads a model, generates in closed batches, speaks frames.

    stdin:  {"model": ...} once, then {"op": "generate", "job": ...} | {"op": "abort", "id": ...} | {"op": "close"}
    stdout: {"version": ...} | {"error": ...} once, then {"op": "step", "deltas": [...]} and refusals per job

Jobs that came while a batch ran form the next one. A thread reads stdin, so an abort reaches a running
batch between two steps. An exception in a batch is narrowed down by running its jobs one by one.
"""

import ctypes
import json
import os
import queue
import signal
import sys
import threading
from dataclasses import dataclass
from typing import Any, BinaryIO

PR_SET_PDEATHSIG = 1  # linux/prctl.h
GATHER_S = 0.005  # jobs that the worker admitted together arrive within this
HELD_BACK = "\ufffd"  # what a tokenizer shows for bytes that are not a whole character yet


@dataclass(slots=True)
class Row:
    """One job in a batch. `prompt` and `generated` are token ids; `given` counts characters sent."""

    id: str
    prompt: list[int]
    generated: list[int]
    max_tokens: int
    stop: list[str]
    stream: bool
    sampler: Any
    num_prefix: int
    text: str = ""
    given_tokens: int = 0
    given_chars: int = 0
    finish_reason: str | None = None

    @property
    def history(self) -> list[int]:
        return self.prompt + self.generated


class Host:
    """The model and the loop over batches."""

    def __init__(self, asked: dict[str, Any], out: BinaryIO) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        self._torch = torch
        self._out = out
        self._out_lock = threading.Lock()
        device = asked["device"]
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        self.device = torch.device(device)
        dtype = asked["dtype"]
        if dtype == "auto" and self.device.type == "cpu":
            dtype = "float32"  # bfloat16 is slower on most CPUs, and float32 repeats exactly
        self.tokenizer = AutoTokenizer.from_pretrained(asked["model"])
        config = AutoConfig.from_pretrained(asked["model"])
        self.model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=dtype).to(self.device).eval()
        self.context_tokens = min(
            asked["max_model_len"] or config.max_position_embeddings, config.max_position_embeddings
        )
        self.vocabulary = config.vocab_size
        end = config.eos_token_id
        self.ends = set(end if isinstance(end, list) else [end])
        self.max_running = asked["max_running"]
        self.version = f"torch {torch.__version__} ({self.device.type}, {str(self.model.dtype).removeprefix('torch.')})"
        self.inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.aborted: set[str] = set()

    def serve(self) -> None:
        """Batch after batch, until told to close or stdin ends."""
        while (frame := self.inbox.get()) is not None:
            frames = [frame]
            try:
                while len(frames) < self.max_running:
                    following = self.inbox.get(timeout=GATHER_S)
                    if following is None:
                        return
                    frames.append(following)
            except queue.Empty:
                pass
            rows = [row for frame in frames if (row := self._admit(frame["job"])) is not None]
            try:
                with self._torch.inference_mode():
                    self._generate(rows)
            except Exception:
                self._one_by_one(rows)

    def send(self, frame: dict[str, Any]) -> None:
        body = json.dumps(frame).encode()
        with self._out_lock:
            self._out.write(len(body).to_bytes(4, "big") + body)
            self._out.flush()

    def _admit(self, job: dict[str, Any]) -> Row | None:
        """Check before the batch, so that a bad job leaves its neighbours alone."""
        from codeyard.worker.engines.sampling import RowSampler

        prompt, sampling = job["prompt"], job["sampling"]
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        foreign = next((token for token in ids if token >= self.vocabulary), None)
        if foreign is not None:
            self._refuse(job, "invalid_prompt", f"token {foreign} is outside the vocabulary of {self.vocabulary}")
            return None
        if len(ids) >= self.context_tokens:
            text = f"the prompt has {len(ids)} tokens, the model takes {self.context_tokens} with its answer"
            self._refuse(job, "prompt_too_long", text)
            return None
        prefix = list(job["prefix"])
        row = Row(
            id=job["id"],
            prompt=ids,
            generated=prefix,
            max_tokens=min(sampling["max_tokens"], self.context_tokens - len(ids)),
            stop=list(sampling.get("stop", ())),
            stream=job["stream"],
            sampler=RowSampler(sampling, self.device),
            num_prefix=len(prefix),
            given_tokens=len(prefix),
        )
        row.text = self.tokenizer.decode(prefix, skip_special_tokens=True) if prefix else ""
        row.given_chars = len(row.text.rstrip(HELD_BACK))
        return row

    def _refuse(self, job: dict[str, Any], code: str, message: str) -> None:
        self.send({"op": "rejected", "id": job["id"], "code": code, "message": message})

    def _one_by_one(self, rows: list[Row]) -> None:
        for row in rows:
            if row.finish_reason is not None:
                continue
            try:
                with self._torch.inference_mode():
                    self._generate([row])
            except Exception as error:
                row.finish_reason = "error"
                self.send({"op": "failed", "id": row.id, "message": f"{type(error).__name__}: {error}"[:500]})

    def _generate(self, rows: list[Row]) -> None:
        """Left-padded, one token per step and row; a row that is done leaves the batch at once."""
        torch, active, cache = self._torch, list(rows), None
        longest = max((len(row.history) for row in active), default=0)
        pads = [longest - len(row.history) for row in active]
        ids = torch.tensor([[0] * pad + row.history for pad, row in zip(pads, active, strict=True)], device=self.device)
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        while active:
            out = self.model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            self._choose(active, out.logits[:, -1])
            self._send_step(active)
            kept = [n for n, row in enumerate(active) if row.finish_reason is None]
            active = [active[n] for n in kept]
            if not active:
                return
            if len(kept) < len(mask):
                keep = torch.tensor(kept, device=self.device)
                mask, positions = mask[keep], positions[keep]
                cache.batch_select_indices(keep)
            ids = torch.tensor([[row.generated[-1]] for row in active], device=self.device)
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def _choose(self, active: list[Row], logits: Any) -> None:
        greedy = logits.argmax(-1).tolist()
        for n, row in enumerate(active):
            if row.id in self.aborted:
                self.aborted.discard(row.id)
                row.finish_reason = "abort"
                continue
            sampler = row.sampler
            token = greedy[n] if sampler.greedy else sampler.choose(logits[n], row.prompt, row.generated)
            if token in self.ends:
                row.finish_reason = "stop"
                continue
            row.generated.append(token)
            if len(row.generated) >= row.max_tokens:
                row.finish_reason = "length"

    def _send_step(self, active: list[Row]) -> None:
        deltas = [delta for row in active if (delta := self._delta(row)) is not None]
        self.send({"op": "step", "deltas": deltas})

    def _delta(self, row: Row) -> dict[str, Any] | None:
        """What is new of a row: each step if it streams, else once at its end."""
        if not (row.stream or row.stop or row.finish_reason):
            return None
        row.text = self.tokenizer.decode(row.generated, skip_special_tokens=True)
        cut = min((at for stop in row.stop if (at := row.text.find(stop)) >= 0), default=-1)
        if cut >= 0:
            row.text, row.finish_reason = row.text[:cut], "stop"
        if row.finish_reason is None and not row.stream:
            return None
        whole = row.text
        if row.finish_reason is None:
            whole = whole.rstrip(HELD_BACK)
            if row.stop:  # what may be the beginning of a stop string is held back
                whole = whole[: max(row.given_chars, len(whole) - max(map(len, row.stop)) + 1)]
        text, ids = whole[row.given_chars :], row.generated[row.given_tokens :]
        row.given_chars, row.given_tokens = max(row.given_chars, len(whole)), len(row.generated)
        delta: dict[str, Any] = {"op": "delta", "id": row.id, "text": text, "token_ids": ids}
        if row.finish_reason is not None:
            delta |= {"finish_reason": row.finish_reason, "prompt_tokens": len(row.prompt)}
        return delta


def main() -> None:
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not end up between frames
    asked = _receive(sys.stdin.buffer)
    if asked is None:
        return
    try:
        host = Host(asked, out)
    except Exception as error:
        _send_error(out, error)
        sys.exit(1)
    threading.Thread(target=_read, args=(host,), daemon=True).start()
    host.send({"version": host.version, "context_tokens": host.context_tokens})
    host.serve()


def _read(host: Host) -> None:
    while (frame := _receive(sys.stdin.buffer)) is not None and frame["op"] != "close":
        if frame["op"] == "abort":
            host.aborted.add(frame["id"])
        else:
            host.aborted.discard(frame["job"]["id"])
            host.inbox.put(frame)
    host.inbox.put(None)


def _receive(pipe: BinaryIO) -> dict[str, Any] | None:
    head = pipe.read(4)
    if len(head) < 4:
        return None
    body = pipe.read(int.from_bytes(head, "big"))
    frame: dict[str, Any] = json.loads(body)
    return frame


def _send_error(out: BinaryIO, error: Exception) -> None:
    body = json.dumps({"error": f"{type(error).__name__}: {error}"[:1_000]}).encode()
    out.write(len(body).to_bytes(4, "big") + body)
    out.flush()


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
