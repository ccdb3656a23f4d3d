"""What a request pays for being checked: credentials, then limits. Medians in microseconds, one at a time.

    CODEYARD_STORE_URL=redis://127.0.0.1:6379/0 python loadtest/bench_access.py [--rounds 3000]

Ratios within one run mean more than the numbers: the row "redis PING" is what one round trip costs there.
"""

import argparse
import asyncio
import json
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from codeyard.producer.gateway.auth import Credentials
from codeyard.producer.gateway.jwks import KeySet
from codeyard.producer.gateway.keys import ApiKeys
from codeyard.producer.gateway.limits import Limits
from codeyard.producer.gateway.tokens import Tokens
from codeyard.shared.access.keys import Scope, make_key
from codeyard.shared.access.port import KeyStore
from codeyard.shared.connect import open_keys, open_limits, open_store
from codeyard.shared.job import new_job_id
from codeyard.shared.limits.rules import GiveBack
from codeyard.shared.settings import AuthSettings, LimitSettings, load
from codeyard.shared.topology import Topology

SECRET = "a-shared-secret-of-forty-characters-or-so"
STATIC = "a-static-key-of-at-least-thirty-two-characters"
Step = Callable[[], Awaitable[object]]


class _Published:
    """A key set that is there already."""

    def __init__(self, *keys: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> None:
        entries = []
        for key in keys:
            kind = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
            public = key.public_key()
            if isinstance(public, rsa.RSAPublicKey):
                entry = RSAAlgorithm.to_jwk(public, as_dict=True)
            else:
                entry = ECAlgorithm.to_jwk(public, as_dict=True)
            entries.append({**entry, "kid": kind})
        self._text = json.dumps({"keys": entries}).encode()

    async def read(self) -> bytes:
        return self._text

    async def close(self) -> None:
        pass


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3_000)
    rounds = parser.parse_args().rounds
    settings, topology = load().store, Topology(f"bench{uuid.uuid4().hex[:8]}")
    store = await open_store(settings, topology)
    keys = await open_keys(settings, topology)
    counts = await open_limits(settings, topology)
    try:
        for name, step in (await _credential_steps(keys)).items():
            _tell(name, await _timed(step, rounds))
        _tell(f"{(await store.ping()).split()[0]} ping", await _timed(store.ping, rounds))
        limited = {
            "limits: none set": LimitSettings(),
            "limits: both rates": LimitSettings(requests_per_minute=6e9, tokens_per_minute=6e12),
            "limits: rates and quotas": LimitSettings(
                requests_per_minute=6e9, tokens_per_minute=6e12, concurrent_jobs=10**6, enqueued_tokens=10**12
            ),
        }
        for name, limit in limited.items():
            limits = Limits(limit, counts, store.states)
            ids: list[str] = []

            async def admit(limits: Limits = limits, ids: list[str] = ids) -> None:
                ids.append(new_job_id())
                await limits.admit("bench", ids[-1], tokens=200, timeout_s=600)

            _tell(name, await _timed(admit, rounds))
            started_s = time.perf_counter()
            async with asyncio.TaskGroup() as tasks:
                for _ in range(rounds):
                    tasks.create_task(admit())
            each_us = (time.perf_counter() - started_s) / rounds * 1e6
            print(f"{'  the same, all at once':34} {each_us:9.1f} each")
            await counts.give_back([GiveBack("bench", job_id) for job_id in ids])
            await limits.close()
    finally:
        for opened in (counts, keys, store):
            await opened.close()


async def _credential_steps(keys: KeyStore) -> dict[str, Step]:
    rsa_key = rsa.generate_private_key(public_exponent=65_537, key_size=2_048)
    ec_key = ec.generate_private_key(ec.SECP256R1())
    auth = AuthSettings.model_validate(
        {
            "hs256_secret": SECRET,
            "static_key": STATIC,
            "jwks_url": "https://issuer.example/keys",
            "issuer": "https://issuer.example",
            "audience": "codeyard",
        }
    )
    made = make_key("bench", tenant="bench", scopes=list(Scope), now=time.time())
    await keys.put([made.key])
    key_set = KeySet(_Published(rsa_key, ec_key), auth)
    credentials = Credentials(auth, ApiKeys(keys, cache_s=60), Tokens(auth, key_set))
    now = int(time.time())
    claims = {
        "iss": auth.issuer,
        "aud": auth.audience,
        "nbf": now - 60,
        "exp": now + 3_600,
        "tenant": "bench",
        "scope": "submit read",
    }

    def by(credential: str) -> Step:
        return lambda: credentials.caller([f"Bearer {credential}"], [])

    return {
        "static key": by(STATIC),
        "API key, remembered": by(made.text),
        "JWT HS256": by(jwt.encode(claims, SECRET, algorithm="HS256")),
        "JWT RS256": by(jwt.encode(claims, rsa_key, algorithm="RS256", headers={"kid": "RS256"})),
        "JWT ES256": by(jwt.encode(claims, ec_key, algorithm="ES256", headers={"kid": "ES256"})),
    }


async def _timed(step: Step, rounds: int) -> list[float]:
    """Microseconds of each round, after some to warm up."""
    for _ in range(100):
        await step()
    took = []
    for _ in range(rounds):
        started_s = time.perf_counter()
        await step()
        took.append((time.perf_counter() - started_s) * 1e6)
    return took


def _tell(name: str, took: list[float]) -> None:
    print(f"{name:34} {statistics.median(took):9.1f} median {sorted(took)[len(took) * 99 // 100]:9.1f} p99")


if __name__ == "__main__":
    asyncio.run(main())
