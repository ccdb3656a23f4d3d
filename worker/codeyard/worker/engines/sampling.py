"""Choose the next token of each row of a batch, by that row's own sampling settings.

The order is transformers': repetition, presence and frequency penalties, temperature, top-k, top-p,
min-p. Temperature 0, or none given, is greedy. A seeded row has a generator of its own, so its tokens
do not depend on its neighbours.
"""

from typing import Any

import torch


class RowSampler:
    """One job's choice. `history` is its prompt and what it has generated, as token ids."""

    def __init__(self, sampling: dict[str, Any], device: torch.device) -> None:
        self._sampling = sampling
        self._temperature = float(sampling.get("temperature", 0.0))
        self._generator: torch.Generator | None = None
        if "seed" in sampling:
            self._generator = torch.Generator(device=device).manual_seed(int(sampling["seed"]))

    @property
    def greedy(self) -> bool:
        return self._temperature == 0.0 and not self._penalises

    @property
    def _penalises(self) -> bool:
        names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        return any(name in self._sampling for name in names)

    def choose(self, logits: torch.Tensor, prompt: list[int], generated: list[int]) -> int:
        """The next token id. `logits`: float tensor of shape (vocabulary,)."""
        logits = logits.float()
        if self._penalises:
            logits = self._penalised(logits.clone(), prompt, generated)
        if self._temperature == 0.0:
            return int(logits.argmax())
        return self._drawn(logits / self._temperature)

    def _penalised(self, logits: torch.Tensor, prompt: list[int], generated: list[int]) -> torch.Tensor:
        if (factor := self._sampling.get("repetition_penalty")) is not None:
            seen = torch.tensor(sorted({*prompt, *generated}), device=logits.device)
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / factor, logits[seen] * factor)
        if generated:
            counts = torch.bincount(torch.tensor(generated, device=logits.device), minlength=len(logits))
            logits -= self._sampling.get("presence_penalty", 0.0) * (counts > 0)
            logits -= self._sampling.get("frequency_penalty", 0.0) * counts
        return logits

    def _drawn(self, logits: torch.Tensor) -> int:
        if (top_k := self._sampling.get("top_k")) is not None and top_k < len(logits):
            logits[logits < logits.topk(top_k).values[-1]] = float("-inf")
        probabilities = logits.softmax(-1)
        if (top_p := self._sampling.get("top_p")) is not None and top_p < 1.0:
            ordered, order = probabilities.sort(descending=True)
            outside = ordered.cumsum(-1) - ordered >= top_p  # the token that crosses top_p stays
            probabilities[order[outside]] = 0.0
        if (min_p := self._sampling.get("min_p")) is not None:
            probabilities[probabilities < min_p * probabilities.max()] = 0.0
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
