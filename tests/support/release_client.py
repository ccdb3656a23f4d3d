"""A program that uses the client of whichever release runs it: work in as JSON, one line of JSON for each out.

    {"submit": PROMPT, "key": KEY, "max_tokens": N, "stream": BOOL}  ->  {"id", "attached"}
    {"read": ID}                                ->  {"id", "state", "text", "usage", "seqs", "streamed", "attempt"}

Nothing here is newer than the oldest release it is run with.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from codeyard.producer import AsyncClient
from codeyard.shared.settings import load


async def main() -> None:
    async with AsyncClient(settings=load(Path(sys.argv[1]), {})) as client:
        done = await asyncio.gather(*(answer(client, piece) for piece in json.load(sys.stdin)))
    for one in done:
        sys.stdout.write(json.dumps(one) + "\n")


async def answer(client: AsyncClient, piece: dict[str, Any]) -> dict[str, Any]:
    if "submit" in piece:
        job = await client.submit(
            piece["submit"],
            idempotency_key=piece["key"],
            sampling={"max_tokens": piece["max_tokens"]},
            stream=piece["stream"],
        )
        return {"id": job.id, "attached": job.attached}
    result = await client.result(piece["read"], timeout=60)
    events = [event async for event in client.stream(piece["read"])]
    return {
        "id": piece["read"],
        "state": result.state.value,
        "text": result.text,
        "usage": result.usage.model_dump(),
        "seqs": [event.seq for event in events],
        "streamed": "".join(event.text for event in events),
        "attempt": (await client.status(piece["read"])).attempt,
    }


if __name__ == "__main__":
    asyncio.run(main())
