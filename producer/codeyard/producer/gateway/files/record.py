"""What is kept of a file, beside its bytes, and how OpenAI's API shows it."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from codeyard.shared.blobs.port import Digest
from codeyard.shared.documents.port import Name
from codeyard.shared.errors import MalformedMessage
from codeyard.shared.job import new_job_id

KIND = "file"
PREFIX = "file-"

_ID = re.compile(rf"{PREFIX}[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}")


class FileRecord(BaseModel):
    """Times are wall time, for people: the store's clock ends the document and the bytes."""

    model_config = ConfigDict(frozen=True, extra="allow")

    v: Literal[1] = 1
    id: str
    filename: Annotated[str, Field(max_length=255)]
    purpose: str
    size_bytes: int
    num_lines: int  # without blank ones
    created_at: int
    expires_at: int
    chunks: tuple[Digest, ...]

    def encode(self) -> str:
        return self.model_dump_json()

    @classmethod
    def decode(cls, body: str) -> "FileRecord":
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise MalformedMessage(f"not a file: {error.errors(include_url=False)[0]['msg']}") from None

    def view(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.size_bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


def new_file_id() -> str:
    return PREFIX + new_job_id()


def is_file_id(given: str) -> bool:
    return _ID.fullmatch(given) is not None


def name_of(tenant: str, file_id: str) -> Name:
    return Name(KIND, tenant, file_id)
