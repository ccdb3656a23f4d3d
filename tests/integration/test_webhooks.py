"""Callers told of their jobs' ends by a running gateway; and single requests against hostile receivers."""

import base64
import contextlib
import hashlib
import hmac
import io
import json
import logging
import re
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from support.brokers import comes_to
from support.fleet import Backend
from support.gateway import GatewayUnderTest, gateway_running, settings_for
from support.receiver import Receiver, answer, receiving
from support.store_calls import make_job, reservation_of

from codeyard.producer import AsyncClient
from codeyard.producer.webhooks.delivery import noted
from codeyard.producer.webhooks.policy import Policy
from codeyard.producer.webhooks.sending import MAX_ANSWER_BYTES, Answer, Fate, Sender
from codeyard.producer.webhooks.signing import signature
from codeyard.shared.errors import InvalidJob
from codeyard.shared.settings import Settings, WebhookSettings
from codeyard.shared.store import transitions
from codeyard.shared.store.port import CallbackOutcome, Timing
from codeyard.shared.telemetry import JsonFormatter

DOCS = Path(__file__).parents[2] / "docs"
KEY = b"0123456789abcdef0123456789abcdef"
SECRET = "whsec_" + base64.b64encode(KEY).decode()
HOST = "hooks.example.com"


def documented_recipe() -> Callable[[str, Mapping[str, str], bytes], bool]:
    """The function that docs/webhooks.md shows to receivers."""
    found = re.search(r"```python\n(.*?)```", (DOCS / "webhooks.md").read_text(), re.DOTALL)
    assert found
    names: dict[str, Any] = {}
    exec(found[1], names)  # noqa: S102 - our own page
    verified: Callable[[str, Mapping[str, str], bytes], bool] = names["verified"]
    return verified


def webhook(receiver: Receiver, **more: Any) -> WebhookSettings:
    """What an operator sets for a receiver in the same network."""
    settings: dict[str, Any] = {
        "allowed_hosts": (f"{HOST}:{receiver.port}", f"localhost:{receiver.port}", f"127.0.0.1:{receiver.port}"),
        "allow_http": True,
        "private_networks": ("127.0.0.0/8",),
        "secret": SECRET,
        "delays_s": (0.0, 0.0),
    }
    return WebhookSettings(**{**settings, **more})


def with_webhooks(settings: Settings, webhooks: WebhookSettings) -> Settings:
    return settings.model_copy(update={"webhook": webhooks})


@contextlib.asynccontextmanager
async def gateway_with(backend: Backend, webhooks: WebhookSettings) -> AsyncIterator[GatewayUnderTest]:
    settings = settings_for(backend.broker_url, backend.store_url, backend.namespace)
    async with gateway_running(with_webhooks(settings, webhooks)) as gateway:
        yield gateway


async def ended(gateway: GatewayUnderTest, url: str, **fields: Any) -> str:
    """The id of a job with this callback that has succeeded."""
    accepted = await gateway.submit(callback_url=url, **fields)
    assert accepted.status_code == 202, accepted.text
    job = await gateway.claimed(accepted.json()["id"])
    await job.says("return a + b")
    await job.succeeds()
    return job.job_id


async def callback_of(gateway: GatewayUnderTest, job_id: str, state: str) -> str:
    """Where its delivery comes to."""

    async def now() -> str:
        said: str = (await gateway.http.get(f"/v1/jobs/{job_id}")).json()["callback"]
        return said

    return await comes_to(now, state)


async def test_the_end_of_a_job_is_told_with_a_signature_that_the_documented_recipe_verifies(backend: Backend) -> None:
    """docs/webhooks.md tells receivers to do exactly this, and its Python does it."""
    async with receiving() as receiver, gateway_with(backend, webhook(receiver)) as gateway:
        job_id = await ended(gateway, f"http://localhost:{receiver.port}/jobs?from=yard", metadata={"ticket": 7})
        [told] = await receiver.wait_for(1)
        assert await callback_of(gateway, job_id, "delivered") == "delivered"
        delivered = await gateway.metric('codeyard_webhooks_total{outcome="delivered"}')

    signed = f"{told.headers['webhook-id']}.{told.headers['webhook-timestamp']}.".encode() + told.body
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    expected = "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert told.headers["webhook-signature"] == expected
    verified = documented_recipe()
    assert verified(SECRET, told.headers, told.body)
    assert not verified(SECRET, told.headers, told.body.replace(b"succeeded", b"failed"))
    assert not verified("whsec_" + "A" * 44, told.headers, told.body)
    assert not verified(SECRET, {**told.headers, "webhook-timestamp": "1614265330"}, told.body)
    assert (told.method, told.path) == ("POST", "/jobs?from=yard")
    assert abs(int(told.headers["webhook-timestamp"]) - datetime.now(UTC).timestamp()) < 60
    message = json.loads(told.body)
    assert message["type"] == "job.succeeded"
    assert (message["data"]["id"], message["data"]["metadata"]) == (job_id, {"ticket": 7})
    assert b"return a + b" not in told.body  # what was generated is read with credentials
    assert delivered == 1


def test_a_signature_is_the_one_of_the_standards_own_example() -> None:
    """From the reference libraries' tests."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")

    made = signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')

    assert made == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


async def test_a_receiver_that_fails_is_told_again_with_the_same_id_until_it_takes_it(backend: Backend) -> None:
    """At least once; the id is how it knows that it had it already."""
    async with (
        receiving(answer(500), answer(429), answer(204)) as receiver,
        gateway_with(backend, webhook(receiver)) as gateway,
    ):
        job_id = await ended(gateway, f"http://localhost:{receiver.port}/")
        told = await receiver.wait_for(3)
        assert await callback_of(gateway, job_id, "delivered") == "delivered"

    assert len({one.headers["webhook-id"] for one in told}) == 1
    assert len({one.body for one in told}) == 1


async def test_a_receiver_that_never_takes_it_is_given_up_and_that_is_in_the_jobs_status(embedded: Backend) -> None:
    """The person who asks why nothing came finds the answer there, and the operator in the metrics."""
    async with receiving(answer(500)) as receiver, gateway_with(embedded, webhook(receiver)) as gateway:
        job_id = await ended(gateway, f"http://localhost:{receiver.port}/")

        assert await callback_of(gateway, job_id, "given_up") == "given_up"
        assert len(receiver.received) == 3  # the first, and one for each delay
        assert await gateway.metric('codeyard_webhooks_total{outcome="given_up"}') == 1


async def test_what_a_dead_gateway_left_is_told_by_the_next(backend: Backend) -> None:
    """The outbox lies in the store with the result; a gateway that was away when the job ended misses nothing."""
    async with receiving() as receiver:
        settings = webhook(receiver)
        async with gateway_with(backend, settings) as gateway:
            accepted = await gateway.submit(callback_url=f"http://localhost:{receiver.port}/")
            job = await gateway.claimed(accepted.json()["id"])
            gateway.stop.set()
            await gateway.ended
            await job.succeeds()
            assert receiver.received == []
            async with gateway_running(gateway.settings) as other:
                await receiver.wait_for(1)
                assert await callback_of(other, job.job_id, "delivered") == "delivered"


async def test_without_allowed_hosts_a_callback_is_refused_with_the_job(embedded: Backend) -> None:
    """Nothing is queued, and the answer names the field and the setting."""
    async with gateway_with(embedded, WebhookSettings()) as gateway:
        refused = await gateway.submit(callback_url="https://hooks.example.com/")

    assert (refused.status_code, refused.json()["field"]) == (422, "callback_url")
    assert "CODEYARD_WEBHOOK_ALLOWED_HOSTS" in refused.json()["detail"]


@pytest.mark.parametrize(
    "url",
    [
        "https://169.254.169.254/latest/meta-data",
        "https://user:password@hooks.example.com/",
        "file:///etc/passwd",
        "https://hooks.example.com/\r\nX-Injected: 1",
        "https://elsewhere.example.com/",
    ],
)
async def test_a_callback_that_leads_into_the_network_is_refused_with_the_job(embedded: Backend, url: str) -> None:
    """And the refusal does not say what is there."""
    settings = WebhookSettings(allowed_hosts=("hooks.example.com", "169.254.169.254"), secret=SECRET)
    async with gateway_with(embedded, settings) as gateway:
        refused = await gateway.submit(callback_url=url)

    assert (refused.status_code, refused.json()["field"]) == (422, "callback_url")
    assert "password" not in refused.json()["detail"].replace("user, password", "")


async def test_a_callback_that_came_past_the_gateway_is_checked_when_it_is_told(embedded: Backend) -> None:
    """Whoever can publish to the broker must not be able to use the gateway to look around."""
    async with receiving() as receiver:
        settings = webhook(receiver, private_networks=())
        async with (
            gateway_with(embedded, settings) as gateway,
            AsyncClient(settings=gateway.settings) as client,
        ):
            for url in (f"http://localhost:{receiver.port}/", "http://not-allowed.example.com/"):
                job = await client.submit("x", model="tiny", callback_url=url)
                running = await gateway.claimed(job.id)
                await running.succeeds()
                assert await callback_of(gateway, job.id, "given_up") == "given_up"

    assert receiver.num_connections == 0


async def test_a_url_that_is_none_is_refused_by_the_clients_too(embedded: Backend) -> None:
    """They know no list of hosts; the form they know."""
    settings = settings_for(embedded.broker_url, embedded.store_url, embedded.namespace)
    async with gateway_running(settings), AsyncClient(settings=settings) as client:
        with pytest.raises(InvalidJob, match="callback_url"):
            await client.submit("x", model="tiny", callback_url="ftp://x/\r\nX: 1")


async def test_the_secret_and_the_receivers_path_are_in_no_log_line_and_no_answer(
    embedded: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """A path is often the receiver's own secret."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    handler.setFormatter(JsonFormatter())
    logging.getLogger().addHandler(handler)
    try:
        caplog.set_level(logging.DEBUG)
        async with (
            receiving(answer(500), answer(500), answer(410)) as receiver,
            gateway_with(embedded, webhook(receiver)) as gateway,
        ):
            job_id = await ended(gateway, f"http://localhost:{receiver.port}/services/T00/B00/sesame?token=open")
            assert await callback_of(gateway, job_id, "given_up") == "given_up"
            answers = (await gateway.http.get(f"/v1/jobs/{job_id}")).text + (await gateway.http.get("/metrics")).text
            refused = (await gateway.submit(callback_url="http://evil.example.com/sesame")).text
    finally:
        logging.getLogger().removeHandler(handler)

    everything = log.getvalue() + answers + refused
    assert "webhook_given_up" in everything
    for secret in ("sesame", "token=open", SECRET, SECRET.removeprefix("whsec_"), KEY.decode()):
        assert secret not in everything


# One request against a hostile receiver -----------------------------------------------------------


def sender(receiver: Receiver, *, tls: ssl.SSLContext | None = None, timeout_s: float = 5.0, **more: Any) -> Sender:
    """Whose names all stand for the receiver's address."""

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    return Sender(Policy(webhook(receiver, **more)), timeout_s=timeout_s, resolve=resolve, tls=tls)


async def test_the_connection_goes_to_the_address_that_was_checked_and_the_name_is_resolved_once() -> None:
    """A name that stands for something else a moment later (DNS rebinding) is not asked again."""
    asked: list[str] = []
    async with receiving() as receiver:

        async def rebinding(host: str, port: int) -> list[str]:
            asked.append(host)
            return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

        rebound = Sender(Policy(webhook(receiver)), timeout_s=5.0, resolve=rebinding)
        answered = await rebound.send(f"http://{HOST}:{receiver.port}/x", {}, b"{}")
        [told] = await receiver.wait_for(1)

    assert (answered.fate, asked) == (Fate.ARRIVED, [HOST])
    assert told.headers["host"] == f"{HOST}:{receiver.port}"


async def test_a_redirect_is_not_followed() -> None:
    """Its target was checked by nobody."""
    async with receiving() as inside, receiving(answer(307, f"Location: http://127.0.0.1:{inside.port}/")) as receiver:
        answered = await sender(receiver).send(f"http://{HOST}:{receiver.port}/", {}, b"{}")

    assert (answered.fate, answered.reason) == (Fate.FAILED, "the receiver answered 307")
    assert inside.num_connections == 0


async def test_a_receiver_that_never_answers_is_left_alone_in_time() -> None:
    """It holds a slot for no longer than its time; what comes back says so."""
    async with receiving(None) as receiver:
        answered = await sender(receiver, timeout_s=0.3).send(f"http://{HOST}:{receiver.port}/", {}, b"{}")

    assert (answered.fate, answered.reason) == (Fate.FAILED, "no answer within 0.3 s")


async def test_of_a_large_answer_only_a_little_is_read() -> None:
    """An endless one must not fill the gateway's memory; the status had said it all."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n"
    async with receiving(head + b"x" * (4 * MAX_ANSWER_BYTES)) as receiver:
        answered = await sender(receiver).send(f"http://{HOST}:{receiver.port}/", {}, b"{}")

    assert answered.fate is Fate.ARRIVED


@pytest.mark.parametrize("raw", [b"", b"\r\n\r\n", b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 abc\r\n\r\n", b"\x00" * 100])
async def test_something_that_speaks_no_http_is_a_failure_and_no_crash(raw: bytes) -> None:
    """The reason tells nothing of what it said: it may be a service of the operator's own."""
    async with receiving(raw) as receiver:
        answered = await sender(receiver).send(f"http://{HOST}:{receiver.port}/", {}, b"{}")

    assert answered.fate is Fate.FAILED
    assert "SSH" not in answered.reason


def certificate_for(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's TLS context for this name, and a client's that trusts it and nobody else."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "receiver under test")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "receiver.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cadata=made.public_bytes(serialization.Encoding.PEM).decode())


@pytest.mark.parametrize("name, fate", [(HOST, Fate.ARRIVED), ("other.example.com", Fate.FAILED)])
async def test_tls_is_checked_against_the_name_although_an_address_is_asked(
    tmp_path: Path, name: str, fate: Fate
) -> None:
    """Whoever has the address must have the name's certificate too."""
    server, client = certificate_for(tmp_path, name)
    async with receiving(tls=server) as receiver:
        answered = await sender(receiver, tls=client).send(f"https://{HOST}:{receiver.port}/", {}, b"{}")

    assert answered.fate is fate


@pytest.mark.parametrize(
    "attempt, answered, outcome, delay_s",
    [
        (1, Answer(Fate.ARRIVED), CallbackOutcome.DELIVERED, 0.0),
        (1, Answer(Fate.FAILED), CallbackOutcome.AGAIN, 5.0),
        (2, Answer(Fate.FAILED), CallbackOutcome.AGAIN, 300.0),
        (3, Answer(Fate.FAILED), CallbackOutcome.GIVEN_UP, 0.0),
        (1, Answer(Fate.HOPELESS), CallbackOutcome.GIVEN_UP, 0.0),
    ],
)
def test_what_becomes_of_a_delivery_follows_the_schedule(
    attempt: int, answered: Answer, outcome: CallbackOutcome, delay_s: float
) -> None:
    """Each failure has the delay of its number; after the last one it is over."""
    job = make_job(callback_url=f"https://{HOST}/")
    made = transitions.reserve(None, reservation_of(job), 1_000.0, Timing()).record
    assert made is not None
    record = made.model_copy(update={"callback_attempts": attempt})
    settings = WebhookSettings(delays_s=(5.0, 300.0))

    note = noted(record, answered, settings)

    assert (note.outcome, note.delay_s, note.attempt) == (outcome, delay_s, attempt)


def test_the_default_schedule_is_over_before_the_record_is() -> None:
    """An entry whose record has ended can be told to nobody."""
    assert sum(WebhookSettings().delays_s) < Settings().store.retention_s
