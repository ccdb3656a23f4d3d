"""The results of a batch, line by line, made when they are read: from its input and the records of its jobs.

So they can be read while the batch runs, an item as soon as it has ended, and every gateway makes the same ones.
In the order of the input; a few lines of it are in memory at a time.
Called by: batches.openai_routes, batches.anthropic_routes, batches.expansion (to count, at the end).
"""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from codeyard.producer.gateway.batches.anthropic_items import AnthropicItems
from codeyard.producer.gateway.batches.items import Bad, Dialect, Item, Reader, outcome_of
from codeyard.producer.gateway.batches.openai_items import OpenAiItems
from codeyard.producer.gateway.batches.record import BatchRecord, Outcome, Phase, Refusal
from codeyard.producer.gateway.files.lines import Line, lines
from codeyard.shared.blobs import whole
from codeyard.shared.blobs.port import BlobStore
from codeyard.shared.record import JobStatus, Record
from codeyard.shared.store.port import Store

GROUP_ITEMS = 64  # read from the store in one round trip
GROUP_BYTES = 4_194_304  # of input lines in one group, unless one alone is longer

LOST = Refusal(code="result_missing", message="the job of this request is not there any more")
UNSAID = Refusal(code="refused", message="the request was refused; too many were to keep the reason of each")


@dataclass(frozen=True, slots=True)
class Result:
    """`text` is a line without its line break."""

    outcome: Outcome
    text: bytes


def dialect_of(batch: BatchRecord) -> Dialect:
    return OpenAiItems(batch.endpoint) if batch.api == "openai" else AnthropicItems()


def input_lines(
    blobs: BlobStore, tenant: str, batch: BatchRecord, *, most_line_bytes: int
) -> AsyncGenerator[Line, None]:
    """Raises BlobMissing, StoreUnavailable."""
    return lines(whole.read(blobs, tenant, batch.chunks), most_bytes=most_line_bytes)


async def results(
    store: Store, blobs: BlobStore, tenant: str, batch: BatchRecord, *, most_line_bytes: int
) -> AsyncGenerator[Result, None]:
    """Of every item that has ended; once the batch has, of every item. Raises BlobMissing, StoreUnavailable."""
    dialect = dialect_of(batch)
    reader = Reader(batch, dialect)
    group: list[Item | Bad] = []
    size_bytes = 0
    async for line in input_lines(blobs, tenant, batch, most_line_bytes=most_line_bytes):
        if line.number > batch.high and not batch.phase.ended and batch.phase is not Phase.FINALIZING:
            break  # nobody has come so far yet
        group.append(reader.read(line))
        size_bytes += len(line.raw or b"")
        if len(group) >= GROUP_ITEMS or size_bytes >= GROUP_BYTES:
            for result in await _of_group(store, tenant, batch, dialect, group):
                yield result
            group, size_bytes = [], 0
    for result in await _of_group(store, tenant, batch, dialect, group):
        yield result


async def _of_group(
    store: Store, tenant: str, batch: BatchRecord, dialect: Dialect, group: Sequence[Item | Bad]
) -> list[Result]:
    ids = [one.job_ids(batch.id, tenant) if isinstance(one, Item) else [] for one in group]
    flat = [job_id for each in ids for job_id in each]
    found = dict(zip(flat, await store.read(flat), strict=True)) if flat else {}
    made = (_of(batch, dialect, one, [found[job_id] for job_id in each]) for one, each in zip(group, ids, strict=True))
    return [result for result in made if result is not None]


def _of(batch: BatchRecord, dialect: Dialect, one: Item | Bad, records: Sequence[Record | None]) -> Result | None:
    """None: not ended yet."""
    if isinstance(one, Bad):
        return Result(Outcome.ERRORED, dialect.refuse(one, one.refusal))
    statuses = [JobStatus.of(record) for record in records if record is not None]
    if len(statuses) == len(records) and all(status.state.final for status in statuses):
        return Result(outcome_of([status.state for status in statuses]), dialect.answer(one, statuses))
    if (refusal := batch.refusal_of(one.line, one.model)) is not None:
        return Result(Outcome.ERRORED, dialect.refuse(one, refusal))
    if not batch.phase.ended:
        return None
    if batch.phase in (Phase.CANCELLED, Phase.EXPIRED):
        outcome = Outcome.CANCELLED if batch.phase is Phase.CANCELLED else Outcome.EXPIRED
        return Result(outcome, dialect.drop(one, outcome))
    refusal = UNSAID if batch.refused and not statuses else LOST
    return Result(Outcome.ERRORED, dialect.refuse(one, refusal))
