"""What a GPU of a given latency table takes for one engine step.

A step of a continuously batching engine decodes one token for each running job and prefills up to
`step_tokens` prompt tokens on the side. The model is

    step_s(n, p) = decode_s(n) + prefill_s * p

with n jobs decoding and p prompt tokens. A table measured in a closed loop gives the time per output
token at a few windows, prefill included: in a closed loop of n jobs every finished job is replaced, so
a step carries on average n * (mean prompt / mean completion) prompt tokens. Taking that share away
leaves decode_s(n), interpolated between the measured windows. `prefill_s` and `frontend_s` (tokenizing,
process hops: latency that costs no GPU time) come from the measured times to first token; the file says
how they were found. `codeyard simulate --calibrate` runs the same closed loop through the simulator and
prints the error.
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError

from codeyard.shared.errors import SettingsError

SHIPPED = "vllm-h200-qwen2.5-7b.json"


class MeasuredWindow(BaseModel):
    """One closed-loop measurement: `window` jobs at a time. Other fields of the file are kept for people."""

    model_config = ConfigDict(frozen=True, extra="allow")

    window: PositiveInt
    n: PositiveInt  # jobs
    jobs_s: PositiveFloat
    tok_s: PositiveFloat
    ttft_p50: PositiveFloat  # seconds
    tpot_ms: PositiveFloat


class Lengths(BaseModel):
    """A lognormal, clipped: how long prompts or completions of the measurement were."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mu: float
    sigma: PositiveFloat
    least: PositiveInt
    most: PositiveInt
    mean: PositiveFloat  # of the clipped distribution


class EngineFit(BaseModel):
    """What the closed-loop numbers alone do not tell."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    how: str
    prefill_s: PositiveFloat  # per prompt token
    frontend_s: Annotated[float, Field(ge=0)]
    step_tokens: PositiveInt  # prompt tokens prefilled in one step at most
    kv_tokens: PositiveInt  # the KV cache's room
    prompts: Lengths
    completions: Lengths


class TableFile(BaseModel):
    """A latency table as it is on disk."""

    model_config = ConfigDict(frozen=True, extra="allow")

    what: str
    engine_start_s: PositiveFloat
    closed_loop: Annotated[tuple[MeasuredWindow, ...], Field(min_length=2)]
    fit: EngineFit


@dataclass(frozen=True, slots=True)
class LatencyTable:
    """`decode_s[n]` is seconds of a step with n jobs decoding and nothing to prefill; `decode_s[0]` is 0."""

    what: str
    decode_s: tuple[float, ...]
    prefill_s: float
    frontend_s: float
    step_tokens: int
    kv_tokens: int
    start_s: float
    capacity_jobs_s: float  # of one GPU at its widest measured window
    prompts: Lengths
    completions: Lengths
    measured: tuple[MeasuredWindow, ...]

    @property
    def slots(self) -> int:
        return len(self.decode_s) - 1

    @property
    def capacity_tokens_s(self) -> float:
        return self.capacity_jobs_s * self.completions.mean


def load_table(path: Path | None = None) -> LatencyTable:
    """The table in `path`, or the shipped one. Raises SettingsError if it cannot be used."""
    try:
        source = path if path is not None else resources.files("codeyard.worker") / "data" / SHIPPED
        file = TableFile.model_validate_json(source.read_text())
    except (OSError, ValueError, ValidationError) as error:
        raise SettingsError(f"latency table {path or SHIPPED}: {error}") from None
    return _build(file)


def _build(file: TableFile) -> LatencyTable:
    fit = file.fit
    per_token = fit.prompts.mean / fit.completions.mean
    points = sorted((m.window, m.tpot_ms / 1e3 - fit.prefill_s * per_token * m.window) for m in file.closed_loop)
    windows, steps = [0], [points[0][1]]
    for window, step_s in points:
        windows.append(window)
        steps.append(max(step_s, steps[-1]))  # a wider step is never shorter: what looks so is noise
    decode = [_between(windows, steps, n) for n in range(windows[-1] + 1)]
    widest = max(file.closed_loop, key=lambda m: m.window)
    # Closed loops were measured over a few jobs per slot, so their jobs/s include ramp and tail; the
    # rate while full follows from the step.
    capacity = widest.window / (widest.tpot_ms / 1e3 * fit.completions.mean)
    return LatencyTable(
        what=file.what,
        decode_s=(0.0, *decode[1:]),
        prefill_s=fit.prefill_s,
        frontend_s=fit.frontend_s,
        step_tokens=fit.step_tokens,
        kv_tokens=fit.kv_tokens,
        start_s=file.engine_start_s,
        capacity_jobs_s=capacity,
        prompts=fit.prompts,
        completions=fit.completions,
        measured=file.closed_loop,
    )


def _between(xs: list[int], ys: list[float], x: int) -> float:
    right = next(i for i, known in enumerate(xs) if known >= x)
    if xs[right] == x:
        return ys[right]
    left = right - 1
    share = (x - xs[left]) / (xs[right] - xs[left])
    return ys[left] + share * (ys[right] - ys[left])
