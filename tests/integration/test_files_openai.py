"""OpenAI's files through the official SDK, and uploads that no SDK would send."""

import contextlib
from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from support.batches import openai_at, openai_line, uploaded
from support.fleet import Backend, gateway_task

from codeyard.producer.gateway.files.sink import Sink
from codeyard.shared.connect import open_blobs
from codeyard.shared.settings import Settings
from codeyard.shared.topology import Topology

BOUNDARY = "b0undary"
MULTIPART = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


@contextlib.asynccontextmanager
async def gateway(settings: Settings) -> AsyncIterator[openai.AsyncOpenAI]:
    async with gateway_task(settings) as url, openai_at(url) as client:
        yield client


async def used_bytes(settings: Settings) -> int:
    blobs = await open_blobs(settings.store, Topology(settings.namespace))
    try:
        return await blobs.used_bytes("default")
    finally:
        await blobs.close()


def part(name: str, content: bytes, *, filename: str | None = None) -> bytes:
    named = f'; filename="{filename}"' if filename is not None else ""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
    return head.encode() + content + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()


async def test_a_file_of_several_chunks_comes_back_byte_for_byte(backend: Backend) -> None:
    """Whatever is in it; and what is deleted gives its room back."""
    settings = backend.settings()
    content = b"".join(b'{"n": %d}\n' % n for n in range(250_000)) + bytes(range(256))  # 3.7 MB
    async with gateway(settings) as client:
        file = await client.files.create(file=("input.jsonl", content), purpose="batch")
        back = await client.files.content(file.id)
        found = await client.files.retrieve(file.id)
        used = await used_bytes(settings)
        deleted = await client.files.delete(file.id)
        left = await used_bytes(settings)
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)
        with pytest.raises(openai.NotFoundError):
            await client.files.content(file.id)
        with pytest.raises(openai.NotFoundError):
            await client.files.delete(file.id)

    assert back.content == content
    assert (file.bytes, file.filename, file.purpose) == (len(content), "input.jsonl", "batch")
    assert found == file
    assert file.expires_at is not None
    assert file.expires_at - file.created_at == 2_592_000
    assert (used, left, deleted.deleted) == (len(content), 0, True)


async def test_files_are_listed_newest_first_in_pages(embedded: Backend) -> None:
    """The SDK turns them. A file's end is its caller's to choose."""
    async with gateway(embedded.settings()) as client:
        made = [(await uploaded(client, [openai_line(n)])).id for n in range(5)]
        listed = [file.id async for file in client.files.list(limit=2)]
        others = [file.id async for file in client.files.list(purpose="assistants")]
        short = await client.files.create(
            file=("input.jsonl", b"{}"),
            purpose="batch",
            expires_after={"anchor": "created_at", "seconds": 3_600},
        )

    assert listed == made[::-1]
    assert others == []
    assert (short.expires_at or 0) - short.created_at == 3_600


async def test_another_tenants_files_and_batches_are_not_there(embedded: Backend) -> None:
    """Not in lists, not by their ids, and no batch can be made of one."""
    secret = "s" * 40
    auth = {"mode": "on", "static_key": secret, "static_tenant": "acme"}
    other = {**auth, "static_tenant": "globex"}
    async with gateway_task(embedded.settings(auth=auth)) as url, openai_with(url, secret) as client:
        file = await uploaded(client, [openai_line(0)])
        batch = await client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        )
        assert (await client.batches.retrieve(batch.id)).id == batch.id
    results = batch.id.replace("batch_", "file-") + "-output"
    async with gateway_task(embedded.settings(auth=other)) as url, openai_with(url, secret) as client:
        for file_id in (file.id, results):
            with pytest.raises(openai.NotFoundError):
                await client.files.retrieve(file_id)
            with pytest.raises(openai.NotFoundError):
                await client.files.content(file_id)
            with pytest.raises(openai.NotFoundError):
                await client.files.delete(file_id)
        with pytest.raises(openai.NotFoundError):
            await client.batches.retrieve(batch.id)
        with pytest.raises(openai.NotFoundError):
            await client.batches.cancel(batch.id)
        with pytest.raises(openai.NotFoundError):
            await client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        assert (await client.files.list()).data == []
        assert (await client.batches.list()).data == []


def openai_with(url: str, key: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


FILE = part("file", b"{}\n", filename="a.jsonl")
PURPOSE = part("purpose", b"batch")


@pytest.mark.parametrize(
    "body, status, param",
    [
        (FILE + END, 400, "purpose"),
        (FILE + part("purpose", b"fine-tune") + END, 400, "purpose"),
        (PURPOSE + END, 400, "file"),
        (PURPOSE + FILE, 400, "file"),  # broke off
        (PURPOSE + FILE + FILE + END, 400, "file"),
        (b"nothing of the kind", 400, "body"),
        (b"", 400, "file"),
        (PURPOSE + part("file", b"x" * 60_000, filename="a") + END, 413, "file"),
        (PURPOSE + part("other", b"x" * 70_000) + FILE + END, 400, "body"),
        (b"".join(part(f"f{n}", b"") for n in range(40)) + FILE + END, 400, "body"),
        (PURPOSE + FILE + part("expires_after[seconds]", b"5") + END, 400, "expires_after"),
    ],
)
async def test_an_upload_that_is_none_is_refused_and_leaves_nothing(
    embedded: Backend, body: bytes, status: int, param: str
) -> None:
    """In OpenAI's words, naming the field."""
    settings = embedded.settings(gateway={"max_file_bytes": 50_000})
    async with gateway_task(settings) as url, httpx.AsyncClient(base_url=url) as http:
        answer = await http.post("/v1/files", content=body, headers=MULTIPART)
        listed = await http.get("/v1/files")
        used = await used_bytes(settings)

    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert listed.json()["data"] == []
    assert used == 0


async def test_a_tenant_without_room_cannot_upload_more(embedded: Backend) -> None:
    """And what came of it until then is released."""
    settings = embedded.settings(store={"blob_quota_bytes": 2_000_000})
    content = b"".join(n.to_bytes(4, "big") for n in range(750_000))
    async with gateway(settings) as client:
        with pytest.raises(openai.APIStatusError) as refused:
            await client.files.create(file=("input.jsonl", content), purpose="batch")
        used = await used_bytes(settings)

    assert (refused.value.status_code, refused.value.code) == (413, "storage_full")
    assert used == 0


async def test_a_batch_goes_on_when_its_file_is_deleted(embedded: Backend) -> None:
    """It holds the bytes itself."""
    settings = embedded.settings()
    async with gateway(settings) as client:
        file = await uploaded(client, [openai_line(0)])
        await client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        await client.files.delete(file.id)

        assert await used_bytes(settings) == file.bytes


async def test_an_upload_is_never_whole_in_memory(embedded: Backend) -> None:
    """At most one chunk, and the piece that just came."""
    settings = embedded.settings()
    blobs = await open_blobs(settings.store, Topology(settings.namespace))
    sink = Sink(blobs, "acme", "file-1")

    for n in range(40):
        await sink.write(n.to_bytes(4, "big") * 65_536)
        assert len(sink._rest) < 1_048_576
    digests = await sink.keep(60)
    await blobs.close()

    assert len(digests) == 10
