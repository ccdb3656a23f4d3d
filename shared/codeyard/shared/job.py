"""The job: what a producer asks for, as it crosses the wire.

Promise: whatever `Job.decode` returns is valid; whatever it was given, it raises only
`MalformedMessage`. Called by: clients and gateway (build, encode), worker (decode).
The format is documented for other languages in docs/wire-contract.md; when it gets a new version, and what
each release reads, in docs/upgrades.md.
"""

import hashlib
import json
import math
import secrets
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from codeyard.shared.chat import Chat
from codeyard.shared.errors import InvalidJob, JobTooLarge, LaterVersion, MalformedMessage

WIRE_VERSION = 1  # what this release writes and decides by
Fields = dict[str, Any]
FROM_BEFORE: Final[Mapping[int, Callable[[Fields], Fields]]] = {}
"""For the version before WIRE_VERSION: its fields as WIRE_VERSION has them. The one place that knows an older
version; every release reads its own and the one before. None yet: 1 is the first."""
MESSAGE_TYPE = "codeyard.job.v1"
MAX_JOB_BYTES = 1_048_576  # encoded; RabbitMQ 4 refuses messages over 16 MiB, Redis and SQLite hold the body too
MAX_METADATA_BYTES = 8_192
DEFAULT_TIMEOUT_S = 86_400.0
MAX_TIMEOUT_S = 604_800.0

JobId = str
"""A request id: UUIDv5 of (tenant, key), or a UUIDv7 where the caller gave no key."""

_KEY_NAMESPACE = uuid.UUID("6f0ad9f4-6f7f-5c39-9f0e-5d0f6f5e9a11")  # fixed for ever: ids are derived from it

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
CallbackUrl = Annotated[str, Field(max_length=2_000, pattern=r"^https?://[\x21-\x7e]+$")]


Prompt = Annotated[str, Field(min_length=1)] | Annotated[tuple[TokenId, ...], Field(min_length=1)] | Chat
"""Text, token ids of the model's own vocabulary, or a conversation that the model's template renders."""

CLAIM_OVER_BYTES = 65_536  # of a prompt as canonical JSON: longer ones lie in the store, see claims.py
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Claim(BaseModel):
    """What a job carries in place of a long prompt: where it lies in the store, and what a scheduler asks of it.

    `digest` is SHA-256 of the prompt's canonical JSON, `chunks` those of its pieces, in order. `tokens` is the
    estimate of whoever wrote it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: Sha256
    kind: Literal["text", "tokens", "chat"]
    size_bytes: Annotated[int, Field(ge=1)]
    tokens: Annotated[int, Field(ge=1)]
    chunks: Annotated[tuple[Sha256, ...], Field(min_length=1, max_length=4_096)]


CHARS_PER_TOKEN = 3  # of our own sources: 3.3 with a tokenizer of 32,768 entries, 2.6 with the starter's 2,048


class Lane(StrEnum):
    """A priority class with its own durable queue; earlier members are more urgent."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BULK = "bulk"


class OutputFormat(BaseModel):
    """What the text must be: JSON of a schema (an empty one: any object), or a match of a regular expression,
    or one of some choices. Engines with structured outputs only; others reject the job."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["json_schema", "regex", "choice"]
    json_schema: dict[str, Any] | None = None
    regex: Annotated[str, Field(min_length=1, max_length=10_000)] | None = None
    choice: Annotated[tuple[str, ...], Field(min_length=1, max_length=1_000)] | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        given = {name for name in ("json_schema", "regex", "choice") if getattr(self, name) is not None}
        if given != {self.type}:
            raise ValueError(f"type {self.type} needs the field {self.type}, and no other")
        return self


class Sampling(BaseModel):
    """How to generate. `None` means the engine's default. Unknown fields are refused: they change meaning.

    `max_tokens` 0 generates nothing: the result counts the prompt's tokens. `logprobs`: of each token, and of
    so many of the likeliest in its place.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_tokens: Annotated[int, Field(ge=0, le=131_072)] = 128
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Field(max_length=16)] = ()
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    output_format: OutputFormat | None = None


class Job(BaseModel):
    """One code-generation job. Frozen; unknown envelope fields are kept and passed on.

    `prompt` is text, token ids of the model's own vocabulary, a conversation, or the claim of a long one.
    `revision` and `shard` (which of its lane's queues) are filled in when the job is pinned at submission.
    `stream` asks the worker to publish tokens as they come; any job can be read as a stream, one without it
    arrives in one piece.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    v: Annotated[int, Field(ge=1, strict=True)] = WIRE_VERSION
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
    tenant: Name = "default"
    key: Name
    model: Name
    revision: Name
    lane: Lane = Lane.STANDARD
    shard: Annotated[int, Field(ge=0, lt=1_024)] = 0
    prompt: Prompt | Claim
    sampling: Sampling = Sampling()
    stream: bool = False
    timeout_s: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S)] = DEFAULT_TIMEOUT_S
    metadata: dict[str, Any] = Field(default_factory=dict)
    callback_url: CallbackUrl | None = None  # told the job's end: docs/webhooks.md
    asked_model: Name | None = None  # what the caller named, where `model` stands in for it; the digest goes by it

    @model_validator(mode="after")
    def _metadata_is_small(self) -> Self:
        if len(json.dumps(self.metadata)) > MAX_METADATA_BYTES:
            raise ValueError(f"metadata over {MAX_METADATA_BYTES} bytes")
        return self

    def digest(self) -> str:
        """What makes two submissions "the same body": SHA-256 over canonical JSON, hex.

        Covers alias, prompt and sampling, unset fields left out, and a version. A prompt over CLAIM_OVER_BYTES
        counts as {"sha256": digest}, claimed or not. Not lane, deadline, stream, metadata or trace: those say
        how a job travels, not what it is.
        """
        sampling = self.sampling.model_dump(mode="json", exclude_none=True)
        if not sampling["stop"]:
            del sampling["stop"]
        claimed = self.prompt.digest if isinstance(self.prompt, Claim) else None
        prompt = "" if isinstance(self.prompt, Claim) else canonical_prompt(self.prompt)
        if len(prompt) > CLAIM_OVER_BYTES:
            claimed = sha256_of(prompt)
        if claimed is not None:
            prompt = _canonical({"sha256": claimed})
        alias = _canonical(self.asked_model or self.model)
        # The keys in their order, written by hand: a long prompt is not encoded twice.
        return sha256_of(f'{{"model":{alias},"prompt":{prompt},"sampling":{_canonical(sampling)},"v":1}}')

    def encode(self) -> bytes:
        """UTF-8 JSON without unset optional fields. Raises JobTooLarge past MAX_JOB_BYTES."""
        body = self.model_dump_json(exclude_none=True).encode()
        if len(body) > MAX_JOB_BYTES:
            raise JobTooLarge(f"the encoded job has {len(body)} bytes, the limit is {MAX_JOB_BYTES}", field="prompt")
        return body

    @classmethod
    def decode(cls, body: bytes) -> "Job":
        """The job in a message body of this version or the one before. Raises LaterVersion for one that a newer
        release reads, MalformedMessage for anything else, whatever it is."""
        if len(body) > MAX_JOB_BYTES:
            raise MalformedMessage(f"body of {len(body)} bytes, the limit is {MAX_JOB_BYTES}")
        try:
            job = cls.model_validate_json(body)
            if job.v == WIRE_VERSION:
                return job
            wrong = ""
        except (ValidationError, ValueError, RecursionError) as error:
            wrong = _first_line(error)
        try:
            return cls.model_validate(_as_of_now(body))
        except (ValidationError, ValueError, RecursionError) as error:
            raise MalformedMessage(f"not a {MESSAGE_TYPE} body: {wrong or _first_line(error)}") from None

    @classmethod
    def build(cls, **fields: Any) -> "Job":
        """A job from a caller's fields. Raises InvalidJob naming the first field that is wrong."""
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise InvalidJob(first["msg"], field=_where(first["loc"])) from None


def _as_of_now(body: bytes) -> Fields:
    """The fields of a body that is not of this version, as this version has them. Raises LaterVersion,
    MalformedMessage for a version too old, ValueError where the version is not what is wrong."""
    fields = json.loads(body)
    version = fields.get("v", WIRE_VERSION) if isinstance(fields, dict) else WIRE_VERSION
    if isinstance(version, bool) or not isinstance(version, int) or version == WIRE_VERSION:
        raise ValueError("of this version, or of none")
    if version > WIRE_VERSION:
        raise LaterVersion(f"a job of version {version}; this release reads up to {WIRE_VERSION}")
    if version not in FROM_BEFORE:
        raise MalformedMessage(f"a job of version {version}; this release does not read it any more")
    return {**FROM_BEFORE[version](fields), "v": WIRE_VERSION}


def canonical_prompt(prompt: str | Sequence[int] | Chat) -> str:
    """The prompt as the JSON that digests are taken of; ASCII."""
    return _canonical(prompt.model_dump(mode="json", exclude_defaults=True) if isinstance(prompt, Chat) else prompt)


def estimate_tokens(prompt: str | Sequence[int] | Chat | Claim) -> int:
    """Of a prompt whose tokens nobody has counted; exact for token ids. At least 1."""
    if isinstance(prompt, Claim):
        return prompt.tokens
    if isinstance(prompt, Chat | str):
        num_chars = len(prompt) if isinstance(prompt, str) else prompt.num_chars
        return math.ceil(num_chars / CHARS_PER_TOKEN)
    return len(prompt)


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def shared_key(model: str, prompt: str | Sequence[int] | Chat, sampling: Sampling) -> str:
    """The idempotency key under which equal jobs share one generation. Raises InvalidJob (`share`) for those
    whose answers differ each time: with a temperature and no seed."""
    if sampling.temperature and sampling.seed is None:
        raise InvalidJob("needs temperature 0 or a seed: otherwise equal jobs have different answers", field="share")
    job_id = new_job_id()
    checked = prompt if isinstance(prompt, str | Chat) else tuple(prompt)
    job = Job.build(id=job_id, key=job_id, model=model, revision=model, prompt=checked, sampling=sampling.model_dump())
    return f"shared:{job.digest()}"


def job_id_for_key(tenant: str, key: str) -> JobId:
    """The request id of a job submitted under an idempotency key: the same for ever, on every machine."""
    return str(uuid.uuid5(_KEY_NAMESPACE, json.dumps([tenant, key], separators=(",", ":"))))


def new_job_id() -> JobId:
    """A UUIDv7 (RFC 9562): sorts by the time it was made, 74 random bits."""
    unix_ms = time.time_ns() // 1_000_000
    value = (
        (unix_ms & 0xFFFF_FFFF_FFFF) << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62 | secrets.randbits(62)
    )
    return str(uuid.UUID(int=value))


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"{_where(first['loc'])}: {first['msg']}"
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _where(loc: tuple[int | str, ...]) -> str:
    """A field's path as a caller knows it: without pydantic's names for the branches of a union."""
    parts = [str(part) for part in loc if isinstance(part, int) or part.isidentifier()]
    return ".".join(parts) or "body"
