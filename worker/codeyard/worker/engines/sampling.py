"""Choose the next token of every row of a batch, each by its own sampling settings.

The order is vLLM's, so a job means the same on both engines: repetition, presence and frequency
penalties, temperature, min-p, top-k, top-p. Temperature 0, or none given, is greedy. A row with a seed
has a generator of its own, so what it draws does not depend on its neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from codeyard.shared.job import Sampling

NEVER = float("-inf")


@dataclass(slots=True, eq=False)
class RowSampling:
    """How one row is sampled, and its generator if it is seeded."""

    sampling: Sampling
    device: torch.device
    generator: torch.Generator | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.sampling.seed is not None:
            self.generator = torch.Generator(self.device).manual_seed(self.sampling.seed)

    @property
    def greedy(self) -> bool:
        return not self.sampling.temperature

    @property
    def penalises(self) -> bool:
        asked = self.sampling
        return asked.repetition_penalty not in (None, 1.0) or bool(asked.presence_penalty or asked.frequency_penalty)


def choose(
    logits: torch.Tensor, rows: Sequence[RowSampling], prompts: Sequence[list[int]], generated: Sequence[list[int]]
) -> list[int]:
    """The next token id of each row. `logits`: (rows, vocabulary)."""
    logits = logits.float()
    if any(row.penalises for row in rows):
        logits = logits.clone()
        for n, row in enumerate(rows):
            if row.penalises:
                _penalise(logits[n], row.sampling, prompts[n], generated[n])
    tokens: list[int] = logits.argmax(-1).tolist()
    drawing = [n for n, row in enumerate(rows) if not row.greedy]
    if drawing:
        drawn = _draw(logits[drawing], [rows[n] for n in drawing])
        for n, token in zip(drawing, drawn, strict=True):
            tokens[n] = token
    return tokens


def _penalise(logits: torch.Tensor, asked: Sampling, prompt: list[int], generated: list[int]) -> None:
    """In place. Repetition counts the prompt too, presence and frequency only what was generated."""
    if asked.repetition_penalty not in (None, 1.0):
        seen = torch.tensor(sorted({*prompt, *generated}), device=logits.device)
        factor = asked.repetition_penalty
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / factor, logits[seen] * factor)
    if generated:
        counts = torch.bincount(torch.tensor(generated, device=logits.device), minlength=logits.shape[-1])
        logits -= (asked.presence_penalty or 0.0) * (counts > 0)
        logits -= (asked.frequency_penalty or 0.0) * counts


def _draw(logits: torch.Tensor, rows: Sequence[RowSampling]) -> list[int]:
    asked = [row.sampling for row in rows]
    logits = logits / _column(logits, [one.temperature or 1.0 for one in asked])
    if any(one.min_p for one in asked):
        odds = logits.softmax(-1)
        least = _column(logits, [one.min_p or 0.0 for one in asked]) * odds.amax(-1, keepdim=True)
        logits = logits.masked_fill(odds < least, NEVER)
    if any(one.top_k is not None or (one.top_p or 1.0) < 1.0 for one in asked):
        logits = _keep_likeliest(logits, asked)
    return (logits.softmax(-1) / _noise(logits, rows)).argmax(-1).tolist()  # type: ignore[no-any-return]  # torch is untyped here


def _keep_likeliest(logits: torch.Tensor, asked: Sequence[Sampling]) -> torch.Tensor:
    """Top-k, then top-p of what is left: the smallest set that reaches p; the token that crosses it stays."""
    ordered, order = logits.sort(-1, descending=True)
    size = logits.shape[-1]
    places = torch.arange(size, device=logits.device)
    ordered = ordered.masked_fill(places >= _column(logits, [float(one.top_k or size) for one in asked]), NEVER)
    odds = ordered.softmax(-1)
    before = odds.cumsum(-1) - odds
    # A p of 1 keeps everything, also where rounding makes the sum pass it early.
    ordered = ordered.masked_fill(before >= _column(logits, [_p(one.top_p) for one in asked]), NEVER)
    return torch.full_like(logits, NEVER).scatter(-1, order, ordered)


def _p(top_p: float | None) -> float:
    return top_p if top_p is not None and top_p < 1.0 else 2.0


def _noise(logits: torch.Tensor, rows: Sequence[RowSampling]) -> torch.Tensor:
    """Exponential noise: the argmax of odds / noise is a draw from the odds."""
    noise = torch.empty_like(logits).exponential_()
    for n, row in enumerate(rows):
        if row.generator is not None:
            noise[n].exponential_(generator=row.generator)
    return noise


def _column(like: torch.Tensor, values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device).unsqueeze(-1)
