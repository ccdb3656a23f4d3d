"""Who runs a job, as its record says."""

import asyncio
from collections.abc import Collection, Sequence

from codeyard.producer import AsyncClient
from codeyard.shared.job import JobId
from codeyard.shared.record import Record, State
from support.fleet import READY_S


async def owned(client: AsyncClient, ids: Sequence[JobId], *, not_by: Collection[str] = ()) -> list[Record]:
    """The records once each job runs under an owner that is none of these. Nobody announces that."""
    async with asyncio.timeout(READY_S):
        while True:
            records = [record for record in await client.store.read(ids) if record is not None]
            running = [one for one in records if one.state is State.RUNNING and one.owner not in not_by]
            if len(running) == len(ids):
                return running
            await asyncio.sleep(0.05)
