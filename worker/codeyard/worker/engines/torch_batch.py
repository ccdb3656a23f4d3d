"""A transformers model and its generation loop: one closed batch at a time, one token per step and row.

Called by: torch_host, in the child process. Left-padded rows share one KV cache; a row that is done
leaves it at once, so the batch gets cheaper as it ends. Knows nothing of pipes and processes.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer

from codeyard.shared.chat import Chat, TokenLogprob
from codeyard.worker.engines.chat import prompt_ids
from codeyard.worker.engines.completion import Completion, check_prompt, decoder, token_logprob
from codeyard.worker.engines.hermes import hides_calls
from codeyard.worker.engines.port import EngineJob
from codeyard.worker.engines.sampling import RowSampling, choose
from codeyard.worker.engines.torch_load import load_model

# Below this a step is shorter than two threads need to meet: with the cores shared among processes, one
# thread took 4 ms a step where two took 120 (docs/engines.md).
ONE_THREAD_PARAMETERS = 100_000_000
PREFILL_TOKENS = 8_192  # per forward pass, padding included: bounds its memory, and shows that it moves


@dataclass(slots=True, eq=False)
class Row:
    """One job in a batch. `serial` names this run of it."""

    serial: int
    prompt_ids: list[int]
    completion: Completion
    sampling: RowSampling

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.completion.token_ids


class TorchModel:
    """A loaded model. Arguments as in EngineSettings. Raises ValueError for what this engine cannot do."""

    def __init__(
        self,
        directory: str,
        *,
        device: str,
        dtype: str = "auto",
        max_model_len: int | None = None,
        load_format: str = "auto",
        quantization: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        self.device = torch.device(_best_device() if device == "auto" else device)
        model = load_model(
            directory, device=self.device, dtype=dtype, load_format=load_format, quantization=quantization
        )
        self._model = model
        self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        self._template = chat_template
        self._hides_calls = hides_calls(self._tokenizer)
        config = self._model.config.get_text_config()
        longest = config.max_position_embeddings
        self.context_tokens: int = min(max_model_len or longest, longest)
        self._vocabulary: int = self._model.get_input_embeddings().num_embeddings
        self._ends = _end_ids(self._model)
        weights = quantization or str(model.dtype).removeprefix("torch.")
        self.version = f"torch {torch.__version__} ({self.device.type}, {weights})"
        small = sum(weight.numel() for weight in model.parameters()) < ONE_THREAD_PARAMETERS
        if self.device.type == "cpu" and small and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)

    def row(self, serial: int, job: EngineJob) -> Row:
        """Ready to run. Raises JobRejected for a prompt that the model can never take."""
        ids = prompt_ids(self._tokenizer, job.prompt, template=self._template)
        only_count = job.sampling.max_tokens == 0
        check_prompt(ids, vocabulary=self._vocabulary, context_tokens=self.context_tokens, only_count=only_count)
        reads_calls = isinstance(job.prompt, Chat) and job.prompt.offers_tools
        decode = decoder(self._tokenizer, self._ends, special=reads_calls and self._hides_calls)
        completion = Completion(job, ids, decode, ends=self._ends, context_tokens=self.context_tokens)
        return Row(serial, ids, completion, RowSampling(job.sampling, self.device))

    @torch.inference_mode()  # type: ignore[untyped-decorator]  # torch is untyped here
    def run(self, rows: Sequence[Row], on_step: Callable[[Sequence[Row]], None]) -> None:
        """Generate until every row has ended. `on_step` hears of the rows after each pass over them,
        and may abort some. A row's tokens stay its own if this raises: it can be run again."""
        active = [row for row in rows if row.completion.finish_reason is None]
        if not active:
            return
        cache, mask, positions, logits = self._prefill(active, on_step)
        while True:
            tokens = choose(
                logits,
                [row.sampling for row in active],
                [row.prompt_ids for row in active],
                [row.completion.token_ids for row in active],
            )
            odds = self._logprobs(logits, tokens, active)
            for row, token, logprobs in zip(active, tokens, odds, strict=True):
                row.completion.push((token,), logprobs)
            on_step(active)
            kept = [n for n, row in enumerate(active) if row.completion.finish_reason is None]
            if not kept:
                return
            if len(kept) < len(active):
                keep = torch.tensor(kept, device=self.device)
                active, mask, positions = [active[n] for n in kept], mask[keep], positions[keep]
                cache.batch_select_indices(keep)
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], dim=1)
            positions = positions + 1
            newest = torch.tensor([[row.completion.token_ids[-1]] for row in active], device=self.device)
            out = self._forward(newest, mask, positions, cache)
            logits = out.logits[:, -1]

    def works(self) -> bool:
        """False once the device refuses everything, as a GPU does after a failed assertion."""
        try:
            return bool(torch.ones(1, device=self.device).item() == 1.0)
        except RuntimeError:
            return False

    def _logprobs(self, logits: Any, tokens: Sequence[int], rows: Sequence[Row]) -> list[list[TokenLogprob]]:
        """Of each row's new token, where it asks; as the model has them, before any sampling setting."""
        found: list[list[TokenLogprob]] = []
        for row_logits, token, row in zip(logits, tokens, rows, strict=True):
            if (num_top := row.sampling.sampling.logprobs) is None:
                found.append([])
                continue
            odds = row_logits.float().log_softmax(-1)
            best = odds.topk(num_top)
            top = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            found.append([token_logprob(self._tokenizer.decode, token, float(odds[token]), top)])
        return found

    def _prefill(self, rows: Sequence[Row], on_step: Callable[[Sequence[Row]], None]) -> tuple[Any, Any, Any, Any]:
        """(cache, mask, last positions, logits of the next token), all with one row per job."""
        longest = max(len(row.ids) for row in rows)
        pads = [longest - len(row.ids) for row in rows]
        ids = torch.tensor([[0] * pad + row.ids for pad, row in zip(pads, rows, strict=True)], device=self.device)
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=self.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        width = max(1, PREFILL_TOKENS // len(rows))
        cache = None
        for start in range(0, longest, width):
            end = min(start + width, longest)
            out = self._forward(ids[:, start:end], mask[:, :end], positions[:, start:end], cache)
            cache = out.past_key_values
            if end < longest:
                on_step(())
        return cache, mask, positions[:, -1:], out.logits[:, -1]

    def _forward(self, ids: Any, mask: Any, positions: Any, cache: Any) -> Any:
        return self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,  # of a long prompt all of them would fill the memory
        )


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _end_ids(model: Any) -> frozenset[int]:
    """Chat models end with more tokens than their config names; the generation config has them all."""
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    if ends is None:
        ends = model.config.get_text_config().eos_token_id
    return frozenset(ends if isinstance(ends, list) else () if ends is None else (ends,))
