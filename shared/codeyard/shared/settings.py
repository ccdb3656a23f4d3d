"""Every setting, with its default, unit and reason; read once, checked at start.

From, strongest first: arguments of the command, environment `CODEYARD_<GROUP>_<NAME>`, the YAML file
(`--config`, else `CODEYARD_CONFIG`, else ./codeyard.yaml if it is there), the default. Modules take
their group as an argument and never read the environment. `load()` raises SettingsError naming the
variable, the value (unless secret) and what was expected.
"""

import base64
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit, urlunsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    IPvAnyNetwork,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from codeyard.shared.broker.rabbitmq_nodes import node_urls
from codeyard.shared.engine_args import refusals
from codeyard.shared.errors import SettingsError
from codeyard.shared.job import Lane
from codeyard.shared.store.port import Timing


def default_state_dir() -> Path:
    """Where the embedded file lives unless told otherwise (XDG base directories)."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "codeyard"


def _embedded_url() -> str:
    return f"sqlite:///{default_state_dir() / 'yard.db'}"


MIN_SECRET_BYTES = 32  # RFC 7518, 3.2: an HMAC key is at least as long as its hash

Tenant = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@|/+-]{0,127}$")]
"""As a credential may name one: safe in keys of the store, headers and log lines."""


HostPattern = Annotated[
    str, Field(pattern=r"^((\*\.)?[a-z0-9_]([a-z0-9._-]{0,252}[a-z0-9_])?|\[[0-9a-f:.]{2,45}\])(:[0-9]{1,5})?$")
]


def _share_or_size(given: object) -> object:
    if isinstance(given, str) and not given.replace(".", "", 1).isdecimal():
        try:
            return float(TypeAdapter(ByteSize).validate_python(given))
        except ValidationError:
            raise ValueError("a share of the memory, like 0.9, or a size, like 48GiB") from None
    return given


MemoryLimit = Annotated[float, BeforeValidator(_share_or_size), Field(gt=0)]
"""Up to 1 a share of the memory there is; above it bytes."""


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BrokerSettings(_Group):
    url: str = Field(default_factory=_embedded_url)  # amqp(s)://user:password@host:port/vhost, or sqlite:///path;
    # of a cluster host:port,host:port,... : each connection begins with another node, and goes on to the next
    publish_timeout_s: PositiveFloat = 10.0  # for connection and confirm; then the publish is "unknown"
    refuse_late: bool = True  # refuse a job that would not start before its deadline
    heartbeat_s: PositiveInt = 10  # a dead peer is noticed after about two of them
    queue_max_length: PositiveInt = 1_000_000  # messages; a queue argument, so one value for the whole fleet

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:
        known = _check_scheme(url, {"amqp", "amqps", "sqlite"})
        if not known.startswith("sqlite"):
            node_urls(known)
        return known


class StoreSettings(_Group):
    url: str = Field(default_factory=_embedded_url)  # redis(s)://user:password@host:port/db, or sqlite:///path;
    # of a cluster host:port,host:port,...; redis(s)+sentinel://host:port,host:port/NAME/db: docs/redis.md
    timeout_s: PositiveFloat = 5.0  # for one round trip, reconnect included
    replicas: Annotated[int, Field(ge=0)] = 0  # that have a write before anyone relies on it
    lease_s: PositiveFloat = 3.0  # a worker silent for this long has lost its jobs
    renew_s: PositiveFloat = 1.0  # several renewals fit into a lease
    grace_s: PositiveFloat = 2.0  # the reconciler waits this long on top
    unpublished_s: PositiveFloat = 60.0  # reserved for longer: was never accepted
    queue_check_s: PositiveFloat = 60.0  # first look whether a queued job's message is still there
    longest_run_s: PositiveFloat = 3_600.0
    retention_s: PositiveFloat = 86_400.0  # results stay this long past the job's deadline
    max_prompt_bytes: PositiveInt = 16_777_216  # as JSON; over 64 KiB it lies in the store, not in the message
    blob_quota_bytes: PositiveInt = 4_294_967_296  # of each tenant, for such prompts and uploaded files

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:
        return _check_scheme(url, {"redis", "rediss", "redis+sentinel", "rediss+sentinel", "sqlite"})

    def timing(self) -> Timing:
        return Timing(
            lease_s=self.lease_s,
            grace_s=self.grace_s,
            unpublished_s=self.unpublished_s,
            queue_check_s=self.queue_check_s,
            longest_run_s=self.longest_run_s,
            retention_s=self.retention_s,
        )


class GatewaySettings(_Group):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080  # 0: any free one, printed at start
    grpc_port: Annotated[int, Field(ge=0, le=65_535)] | None = None  # on the same host; None: no gRPC
    max_body_bytes: PositiveInt = 17_825_792  # the longest prompt, and a MiB for what is around it
    max_wait_s: PositiveFloat = 60.0  # of `Prefer: wait=N`
    max_file_bytes: PositiveInt = 209_715_200  # of an uploaded file, and of a batch sent in one body; OpenAI's 200 MB
    file_ttl_s: PositiveFloat = 2_592_000.0  # of uploaded files, where their caller does not say; OpenAI's 30 days
    max_batch_items: PositiveInt = 50_000  # OpenAI's
    batch_in_flight: PositiveInt = 4_096  # items of one batch that are at the broker or running; keeps a fleet full
    answer_wait_s: PositiveFloat = 600.0  # for a whole answer over OpenAI's API; as long as its SDKs wait
    submit_timeout_s: PositiveFloat = 15.0  # for reserve, publish and confirm together, retries included
    leave_s: NonNegativeFloat = 0.0  # SIGTERM: serve on for this long while /readyz says no; balancers take as long
    drain_s: PositiveFloat = 20.0  # then answers that cannot be gone on with at another gateway may finish
    fallbacks: dict[str, str] = Field(default_factory=dict)  # alias -> the one that stands in while its workers fail

    @field_validator("fallbacks")
    @classmethod
    def _no_circles(cls, fallbacks: dict[str, str]) -> dict[str, str]:
        for alias in fallbacks:
            line = [alias]
            while (following := fallbacks.get(line[-1])) is not None:
                if following in line:
                    raise ValueError(f"{' -> '.join([*line, following])} goes in a circle")
                line.append(following)
        return fallbacks


class BreakerSettings(_Group):
    """When the gateway stops asking what does not answer: docs/degradation.md."""

    requests: PositiveInt = 20  # outcomes within the window before it may open
    window_s: PositiveFloat = 5.0
    share: Annotated[float, Field(gt=0, le=1)] = 0.5  # of them, failures that open it
    open_s: PositiveFloat = 5.0  # then one probe goes
    probe_s: PositiveFloat = 10.0  # a probe without an outcome for this long is followed by another
    refuse_unserved: tuple[Lane, ...] = (Lane.INTERACTIVE,)  # in the other lanes jobs wait for a worker to come
    unserved_s: Annotated[float, Field(ge=0)] = 10.0  # no worker for this long: longer than a restart takes to be told


class WebhookSettings(_Group):
    """Callers told of their jobs' ends: docs/webhooks.md. Off as long as no host is allowed."""

    # example.com, *.example.com, example.com:8443; without a port the scheme's own
    allowed_hosts: tuple[HostPattern, ...] = ()
    allow_http: bool = False  # in the clear; for receivers in the same network
    private_networks: tuple[IPvAnyNetwork, ...] = ()  # not public, and may be connected to all the same
    secret: SecretStr | None = None  # whsec_ and base64 of 24 to 64 bytes; two, with a blank, while one is changed
    secrets: dict[Tenant, SecretStr] = Field(default_factory=dict)  # of single tenants, in its place
    timeout_s: PositiveFloat = 10.0  # for one request, names and connection included
    delays_s: tuple[NonNegativeFloat, ...] = (5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0)  # after each failure;
    # then it is given up: 17.5 h, within which the record is still there
    in_flight: PositiveInt = 16  # requests at once

    @field_validator("secret", "secrets")
    @classmethod
    def _are_keys(cls, given: SecretStr | dict[str, SecretStr] | None) -> SecretStr | dict[str, SecretStr] | None:
        for secret in given.values() if isinstance(given, dict) else [given] if given else []:
            if not _webhook_keys(secret):
                raise ValueError("whsec_ and the base64 of 24 to 64 bytes: `openssl rand -base64 32` makes a good one")
        return given

    @model_validator(mode="after")
    def _can_be_signed(self) -> Self:
        if self.allowed_hosts and not (self.secret or self.secrets):
            raise ValueError(
                "CODEYARD_WEBHOOK_SECRET must be set: without a signature anybody can tell receivers anything"
            )
        return self

    def keys_of(self, tenant: str) -> list[bytes]:
        """To sign with, the newest first; empty if there is none for this tenant."""
        secret = self.secrets.get(tenant, self.secret)
        return _webhook_keys(secret) if secret else []


def _webhook_keys(secret: SecretStr) -> list[bytes]:
    """Empty if it is not as it should be."""
    keys = []
    for one in secret.get_secret_value().split():
        try:
            key = base64.b64decode(one.removeprefix("whsec_"), validate=True) if one.startswith("whsec_") else b""
        except ValueError:
            return []
        if not 24 <= len(key) <= 64:
            return []
        keys.append(key)
    return keys


class AuthSettings(_Group):
    """Who may call the gateway: docs/auth.md. API keys lie in the store (`codeyard keys`), the rest is here."""

    mode: Literal["auto", "on", "off"] = "auto"  # auto: on as soon as any credential is configured or made;
    # off: everyone is the development tenant, and the gateway listens on loopback only
    static_key: SecretStr | None = None  # one API key from the environment, with every scope; for first steps
    static_tenant: Tenant = "default"  # whose the static key is
    hs256_secret: SecretStr | None = None  # JWT: shared secret, at least 32 bytes
    jwks_file: Path | None = None  # JWT: public keys (RFC 7517), read again when it changes
    jwks_url: str | None = None  # the same over https, or http on loopback
    issuer: str | None = None  # `iss` a JWT must have
    audience: str | None = None  # `aud` a JWT must have
    require_nbf: bool = True  # false for issuers that leave `nbf` out; one that is there is checked either way
    leeway_s: Annotated[float, Field(ge=0, le=60)] = 10.0  # clocks of issuer and gateway may differ by this
    tenant_claim: Annotated[str, Field(min_length=1)] = "tenant"
    scope_claim: Annotated[str, Field(min_length=1)] = "scope"  # text with blanks between, or a list
    key_cache_s: Annotated[float, Field(ge=0, le=60)] = 5.0  # a revoked API key works this long, at most
    jwks_refresh_s: PositiveFloat = 300.0  # a key taken out of the set works this long, at most
    jwks_retry_s: PositiveFloat = 10.0  # between looks for an unknown `kid`: whoever makes them up costs no more
    jwks_timeout_s: PositiveFloat = 5.0
    open_metrics: bool = True  # /metrics without credentials; false: scope admin

    @property
    def accepts_jwt(self) -> bool:
        return any((self.hs256_secret, self.jwks_file, self.jwks_url))

    @field_validator("hs256_secret", "static_key")
    @classmethod
    def _long_enough(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None and len(secret.get_secret_value().encode()) < MIN_SECRET_BYTES:
            raise ValueError(f"at least {MIN_SECRET_BYTES} bytes; `openssl rand -hex 32` makes a good one")
        return secret

    @field_validator("jwks_url")
    @classmethod
    def _encrypted(cls, url: str | None) -> str | None:
        parts = urlsplit(url or "https://none")
        if parts.scheme != "https" and (parts.scheme, parts.hostname) not in {
            ("http", host) for host in ("127.0.0.1", "::1", "localhost")
        }:
            raise ValueError("an https URL: who can change the keys on their way can make tokens")
        return url

    @model_validator(mode="after")
    def _jwt_is_for_us(self) -> Self:
        if self.accepts_jwt and not (self.issuer and self.audience):
            raise ValueError(
                "CODEYARD_AUTH_ISSUER and CODEYARD_AUTH_AUDIENCE must be set with a JWT secret or key set: "
                "without them tokens made for other services would do"
            )
        if self.jwks_file and self.jwks_url:
            raise ValueError("CODEYARD_AUTH_JWKS_FILE or CODEYARD_AUTH_JWKS_URL, not both")
        return self


class TenantLimits(_Group):
    """Of one tenant, over all gateways. None: no limit. See docs/limits.md."""

    requests_per_minute: PositiveFloat | None = None  # submissions
    requests_burst: PositiveFloat | None = None  # submissions at once; None: a minute's worth
    tokens_per_minute: PositiveFloat | None = None  # prompt, estimated, and max_tokens
    tokens_burst: PositiveFloat | None = None  # None: a minute's worth
    concurrent_jobs: PositiveInt | None = None  # accepted and not final
    enqueued_tokens: PositiveInt | None = None  # of those
    body_bytes: PositiveInt | None = None  # below CODEYARD_GATEWAY_MAX_BODY_BYTES

    @model_validator(mode="after")
    def _bursts_have_rates(self) -> Self:
        for what in ("requests", "tokens"):
            if getattr(self, f"{what}_burst") and not getattr(self, f"{what}_per_minute"):
                raise ValueError(f"{what}_burst needs {what}_per_minute: nothing would fill it again")
        return self


class LimitSettings(TenantLimits):
    """The limits of a tenant that `tenants` does not name, and what to do without a store."""

    tenants: dict[Tenant, TenantLimits] = Field(default_factory=dict)  # in place of the general limits, whole
    store_down: Literal["open", "closed"] = "open"  # closed: 503 for what cannot be counted

    def of(self, tenant: str) -> TenantLimits:
        return self.tenants.get(tenant, self)


class WorkerSettings(_Group):
    engine: Literal["auto", "vllm", "torch", "simulated"] = "auto"  # auto: vllm, then torch; never simulated
    model: str = "starter"  # ALIAS, or ALIAS=DIRECTORY_OR_HUGGING_FACE_ID; several separated by commas
    lanes: tuple[Lane, ...] = tuple(Lane)
    device_budget_bytes: PositiveInt | None = None  # of device memory for loaded models; None: all are kept loaded
    host_budget_bytes: Annotated[int, Field(ge=0)] = 0  # of host memory for models asleep; 0: none sleeps
    prepare_s: PositiveFloat = 1_800.0  # a rollout's new revision must be loaded within this
    shards: PositiveInt = 1  # queues of each lane; more keep one tenant's flood from burying the others there
    shards_per_tenant: PositiveInt = 1  # of them, those one tenant's jobs go to
    set_alias: bool = False  # point the alias at this worker's revision even if it names another one
    look_ahead: Annotated[float, Field(ge=0, le=4)] = 0.25  # of the slots: claimed jobs kept ready
    max_attempts: PositiveInt = 3  # runs of one job before it is dead-lettered
    stall_s: PositiveFloat = 60.0  # no token from a running engine for this long: abort, then restart it
    drain_s: PositiveFloat = 30.0  # SIGTERM: running jobs may finish within this
    flush_s: PositiveFloat = 0.2  # streamed tokens are written to the store this often; the first one at once
    save_tokens: PositiveInt = 512  # a job that does not stream is saved every so many, for who may take it over
    settle_group: PositiveInt = 256  # results per round trip, at most
    hand_back_s: PositiveFloat = 300.0  # look-ahead older than this goes back (RabbitMQ's ack timeout is 30 min)
    metrics_port: Annotated[int, Field(ge=0, le=65_535)] | None = None  # None: no metrics server
    memory_limit: MemoryLimit = 0.9  # of the host, or of this container; at 90 % of it the window shrinks
    device_memory_limit: MemoryLimit | None = None  # of a GPU. None: vLLM takes its share at start and stays there
    memory_profile: bool = False  # trace allocations from the start; SIGUSR2 begins and ends it at any time
    memory_profile_jobs: PositiveInt = 1_000  # between reports of what grew
    memory_profile_file: Path | None = None  # None: memory-profile-PID.json in the state folder

    @model_validator(mode="after")
    def _hand_fits(self) -> Self:
        if self.shards_per_tenant > self.shards:
            raise ValueError(f"shards_per_tenant ({self.shards_per_tenant}) is more than shards ({self.shards})")
        return self


class EngineSettings(_Group):
    """Passed to the engine that is used; the others ignore what is not theirs. See docs/engines.md."""

    max_running: PositiveInt = 64  # slots (vLLM: max_num_seqs)
    scheduling_policy: Literal["priority", "fcfs"] = "priority"  # vLLM: lanes count inside too; fcfs: to compare
    dtype: str = "auto"
    device: str = "auto"  # torch engine: cpu, cuda, cuda:0, mps; auto takes an accelerator if there is one
    max_model_len: PositiveInt | None = None  # tokens; None: what the model's config says
    load_format: str = "auto"  # how weights are read: a name of vLLM's; torch engine: auto, safetensors, dummy
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.90
    kv_cache_memory_bytes: PositiveInt | None = None  # vLLM; None: by gpu_memory_utilization, on a CPU 1 GiB
    tensor_parallel_size: PositiveInt = 1
    quantization: str | None = None  # a name of vLLM's; torch engine: 8bit, 4bit
    enforce_eager: bool = False
    enable_prefix_caching: bool = True
    enable_lora: bool = False  # vLLM; a model with adapters has it by itself
    max_loras: PositiveInt = 4  # adapters in one step of the engine; each takes device memory
    max_cpu_loras: PositiveInt = 32  # adapters kept loaded; the least recently used one goes
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 16  # those that vLLM takes
    chat_template: str | None = None  # Jinja text or a file's path; None: the one in the model's directory
    tool_call_parser: str | None = None  # vLLM's name for how the model writes calls; None: Hermes, as Qwen2.5 does
    engine_args: dict[str, Any] = Field(default_factory=dict)  # what else vLLM's AsyncEngineArgs takes, by its names
    latency_table: Path | None = None  # simulated engine: JSON as in worker/codeyard/worker/data; None: the shipped one
    sleep_mode: bool = True  # vLLM on a GPU: an idle model's weights may wait in host memory instead of on disk
    simulated_load_s: Annotated[float, Field(ge=0)] = 0.0  # simulated engine: from disk; times time_scale
    simulated_wake_s: Annotated[float, Field(ge=0)] = 0.0  # from sleep
    simulated_bytes: Annotated[int, Field(ge=0)] = 0  # of device memory it says it holds
    time_scale: PositiveFloat = 1.0  # simulated engine: 0.1 is ten times faster than the table

    @field_validator("engine_args")
    @classmethod
    def _known_to_vllm(cls, given: dict[str, Any]) -> dict[str, Any]:
        if wrong := refusals(given, own=cls.model_fields):
            raise ValueError("; ".join(wrong))
        return given

    @model_validator(mode="after")
    def _adapters_fit(self) -> Self:
        if self.max_cpu_loras < self.max_loras:
            raise ValueError(f"max_cpu_loras ({self.max_cpu_loras}) is less than max_loras ({self.max_loras})")
        return self


class ModelSettings(_Group):
    """What differs for one model, by its alias."""

    engine: dict[str, Any] = Field(default_factory=dict)  # settings of the engine group, for this model only
    adapters: dict[str, str] = Field(default_factory=dict)  # LoRA: name -> directory; served as ALIAS@NAME


class Promise(_Group):
    """What a lane's jobs may count on while the fleet has room. Zero: nothing is promised."""

    first_token_s: Annotated[float, Field(ge=0)] = 0.0  # from submission
    per_token_s: Annotated[float, Field(ge=0)] = 0.0  # after the first, mean over the job


class AdmissionSettings(_Group):
    """The policy's plain values: shares and weights are relative, seconds are waits. See docs/scheduling.md."""

    policy: Literal["adaptive", "fixed", "straight"] = (
        "adaptive"  # straight: all to the engine, first come first served
    )
    window: PositiveInt | None = None  # jobs; of `fixed`; None: the engine's slots
    promises: dict[Lane, Promise] = Field(
        default_factory=lambda: {
            Lane.INTERACTIVE: Promise(first_token_s=0.3, per_token_s=0.04),  # reads along while it is typed
            Lane.STANDARD: Promise(first_token_s=2.0, per_token_s=0.06),  # waits for the answer, not for the first word
        }
    )
    shares: dict[Lane, PositiveInt] = Field(
        default_factory=lambda: {Lane.INTERACTIVE: 8, Lane.STANDARD: 3, Lane.BULK: 1}
    )
    tenant_weights: dict[str, PositiveFloat] = Field(default_factory=dict)  # others have 1.0
    tenant_slack: Annotated[float, Field(ge=0)] = 16_000.0  # tokens; served within this of each other: first come
    margin: Annotated[float, Field(gt=0, le=1)] = 0.93  # of a promise; the rest is for what the model does not see
    held_slots: Annotated[float, Field(ge=0, lt=1)] = 0.03  # of the slots, kept free for the lanes above bulk
    starvation_s: PositiveFloat = 30.0  # a lane with work in hand from which nothing was admitted for this long is next
    preempt_share: Annotated[float, Field(ge=0, le=1)] = 0.5  # of the running jobs, aborted for one promise at most
    calm_s: Annotated[float, Field(ge=0)] = 2.0  # the window stays narrow this long after the lane's last job left
    kv_cache_cap: Annotated[float, Field(gt=0, le=1)] = 0.92  # above: nothing is admitted until it falls
    linger_s: Annotated[float, Field(ge=0, le=0.05)] = 0.02  # closed batches only, from the first job in hand


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="CODEYARD_",
        env_nested_delimiter="_",
        env_nested_max_split=1,
        frozen=True,
        extra="forbid",
        yaml_file_encoding="utf-8",
    )

    namespace: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")] = "codeyard"
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["text", "json"] = "text"
    broker: BrokerSettings = Field(default_factory=BrokerSettings)
    store: StoreSettings = Field(default_factory=StoreSettings)
    gateway: GatewaySettings = Field(default_factory=GatewaySettings)
    breaker: BreakerSettings = Field(default_factory=BreakerSettings)
    webhook: WebhookSettings = Field(default_factory=WebhookSettings)
    auth: AuthSettings = Field(default_factory=AuthSettings)
    limit: LimitSettings = Field(default_factory=LimitSettings)
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    engine: EngineSettings = Field(default_factory=EngineSettings)
    admission: AdmissionSettings = Field(default_factory=AdmissionSettings)
    models: dict[str, ModelSettings] = Field(default_factory=dict)  # by alias

    @model_validator(mode="after")
    def _models_fit(self) -> Self:
        for alias in self.models:
            try:
                self.engine_of(alias)
            except SettingsError as error:
                raise ValueError(str(error)) from None
        return self

    def engine_of(self, alias: str) -> EngineSettings:
        """The engine group with what `models` says for this alias on top. Raises SettingsError."""
        if (own := self.models.get(alias)) is None or not (own.engine or own.adapters):
            return self.engine
        lora = {"enable_lora": self.engine.enable_lora or bool(own.adapters)}
        try:
            return EngineSettings.model_validate({**self.engine.model_dump(), **lora, **own.engine})
        except ValidationError as error:
            raise SettingsError(_explain(error, f"CODEYARD_MODELS: {alias}.engine.")) from None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)


def load(config: Path | None = None, overrides: dict[str, Any] | None = None) -> Settings:
    """All settings. `overrides` is nested like the YAML file, e.g. {"broker": {"url": ...}}."""
    path = config or (Path(named) if (named := os.environ.get("CODEYARD_CONFIG")) else None)
    if path is not None and not path.is_file():
        raise SettingsError(f"no settings file {path}")
    found = path or Path("codeyard.yaml")

    class FromFile(Settings):
        model_config = SettingsConfigDict(yaml_file=found if found.is_file() else None)

    try:
        return FromFile(**(overrides or {}))
    except ValidationError as error:
        raise SettingsError(_explain(error)) from None
    except (ValueError, OSError) as error:
        raise SettingsError(f"cannot read settings: {error}") from None


def masked(url: str) -> str:
    """A URL fit for logs: without its password."""
    parts = urlsplit(url)
    if parts.password is None:
        return url
    host = parts.netloc.rsplit("@", 1)[1]
    return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:***@{host}"))


def _check_scheme(url: str, known: set[str]) -> str:
    scheme = urlsplit(url).scheme
    if scheme not in known:
        raise ValueError(f"the URL must start with one of {', '.join(sorted(known))}")
    return url


def _explain(error: ValidationError, inside: str = "") -> str:
    lines = []
    for item in error.errors(include_url=False):
        names = [str(part) for part in item["loc"]]
        if not names:  # of the whole, as checked by a validator of ours
            lines.append(item["msg"].removeprefix("Value error, "))
            continue
        of_group = names in (["auth"], ["webhook"])  # of a whole group; its input holds secrets
        if item["type"] == "value_error" and of_group:
            lines.append(item["msg"].removeprefix("Value error, "))
            continue
        variable = f"{inside}{'.'.join(names)}" if inside else "CODEYARD_" + "_".join(names).upper()
        # A name we do not know may be a misspelt URL or key; a whole group may hold one.
        hides = item["type"] == "extra_forbidden" or isinstance(item["input"], dict)
        secret = names[-1] == "url" or names[0] == "auth" or "secret" in "".join(names) or hides
        value = "" if secret else f" (got {item['input']!r:.80})"
        lines.append(f"{variable}: {item['msg']}{value}")
    return "; ".join(lines)
