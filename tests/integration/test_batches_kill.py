"""The gateway that works on a batch is killed half-way, and another one finishes it."""

import json
from collections import Counter

import pytest
from openai.types import Batch
from support.batches import ended, openai_at, openai_line, uploaded
from support.fleet import Backend, worker_task
from support.rpc import gateways

from codeyard.producer.gateway.batches.items import Item, Reader
from codeyard.producer.gateway.batches.record import BatchRecord, name_of
from codeyard.producer.gateway.batches.results import dialect_of
from codeyard.producer.gateway.files.lines import Line
from codeyard.shared.connect import open_documents
from codeyard.shared.topology import Topology


@pytest.mark.process
@pytest.mark.parametrize(
    "num_items, in_flight",
    [
        (1_000, 100),
        pytest.param(50_000, 4_096, marks=[pytest.mark.long, pytest.mark.timeout(1_800)]),
    ],
)
async def test_a_batch_whose_gateway_is_killed_half_way_is_finished_by_another(
    backend: Backend, num_items: int, in_flight: int
) -> None:
    """Every custom_id exactly once in the results, and generated once."""
    settings = backend.settings(
        engine={"max_running": 256, "time_scale": 0.001}, gateway={"batch_in_flight": in_flight}
    )
    patience_s = 60 + num_items / 20
    lines = [openai_line(n, max_tokens=1) for n in range(num_items)]
    async with worker_task(settings):
        async with gateways(settings, backend.folder) as [first], openai_at(first.url) as client:
            file = await uploaded(client, lines)
            batch = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
            )
            half = num_items // 2
            await ended(client, batch.id, until=lambda one: completed(one) >= half, patience_s=patience_s)
            await first.kill()
        async with gateways(settings, backend.folder) as [second], openai_at(second.url) as client:
            left = await client.batches.retrieve(batch.id)
            done = await ended(client, batch.id, patience_s=patience_s)
            content = await client.files.content(done.output_file_id or "")
    async with backend.client() as client:
        documents = await open_documents(settings.store, Topology(settings.namespace))
        document = await documents.read(name_of("openai", "default", batch.id))
        await documents.close()
        assert document is not None
        record = BatchRecord.decode(document.body)
        reader = Reader(record, dialect_of(record))
        attempts: Counter[int] = Counter()
        for number, text in enumerate(lines, start=1):
            item = reader.read(Line(number, text.encode()))
            assert isinstance(item, Item)
            [found] = await client.store.read(item.job_ids(batch.id, "default"))
            assert found is not None
            attempts[found.attempt] += 1

    assert left.status == "in_progress"
    assert completed(left) < num_items
    assert (done.status, completed(done)) == ("completed", num_items)
    ids = Counter(json.loads(line)["custom_id"] for line in content.text.splitlines())
    assert ids == Counter(f"item-{n}" for n in range(num_items))
    assert attempts == {1: num_items}


def completed(batch: Batch) -> int:
    return batch.request_counts.completed if batch.request_counts is not None else 0
