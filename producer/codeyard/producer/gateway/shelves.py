"""Where the gateways keep what is no job: the bytes of files, and documents about files and batches.

Called by: surface (part of the Kit), files, batches.
"""

import asyncio
from dataclasses import dataclass, field

from codeyard.shared.blobs.port import BlobStore
from codeyard.shared.documents.port import DocumentStore


@dataclass(frozen=True, slots=True)
class Shelves:
    blobs: BlobStore
    documents: DocumentStore
    new_batch: asyncio.Event = field(default_factory=asyncio.Event)  # set where one was made here: look at once
