"""What it means for an item of a batch that its submission was not accepted. Plain functions of plain values.

What can be otherwise in a while is waited for; what can never succeed is the item's own error.
Called by: batches.expansion.
"""

from dataclasses import dataclass

from codeyard.producer.gateway.batches.record import Refusal
from codeyard.producer.gateway.problems import KINDS, kind_of
from codeyard.shared.errors import FleetError, QueueFull, QuotaExceeded, StorageQuotaExceeded, UnknownModel

MAX_BROKEN = 5  # submissions of one item that broke off, before it is given up
BROKEN = Refusal(code="internal_error", message="the request could not be submitted")
AGAIN_S = 1.0  # after a refusal that does not say when to come again
SHORTEST_S = 0.05


@dataclass(frozen=True, slots=True)
class Later:
    """Not now: again after so many seconds; `room`: or as soon as another item has ended."""

    seconds: float
    room: bool = False
    broken: bool = False  # nobody knows why; not for ever


def refusal_or_later(error: FleetError) -> Refusal | Later:
    if isinstance(error, UnknownModel):
        return Refusal(code="model_not_found", message=str(error), param="model")
    kind = kind_of(error)
    if isinstance(error, StorageQuotaExceeded) or kind == "internal-error" or KINDS[kind].status in (429, 503):
        room = isinstance(error, QueueFull | QuotaExceeded)
        after_s = max(SHORTEST_S, getattr(error, "retry_after_s", None) or AGAIN_S)
        return Later(after_s, room, broken=kind == "internal-error")
    field: str | None = getattr(error, "field", None)
    return Refusal(code=kind.replace("-", "_"), message=str(error), param=field)
