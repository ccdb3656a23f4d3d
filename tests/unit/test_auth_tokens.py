"""JSON Web Tokens: what is let in, and the ways in that have been found elsewhere."""

import inspect
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt import exceptions
from support.tokens import (
    AUDIENCE,
    ISSUER,
    SECRET,
    MadeUpSource,
    auth_settings,
    claims,
    ec_key,
    forged,
    public_jwk,
    rsa_key,
    token,
)

from codeyard.producer.gateway.jwks import KeySet
from codeyard.producer.gateway.tokens import Tokens
from codeyard.shared.access.keys import Scope
from codeyard.shared.errors import Unauthorized


def by_secret(**settings: Any) -> Tokens:
    return Tokens(auth_settings(hs256_secret=SECRET, **settings), None)


def by_key_set(*entries: dict[str, Any], **settings: Any) -> Tokens:
    auth = auth_settings(jwks_url="https://issuer.example/keys", **settings)
    return Tokens(auth, KeySet(MadeUpSource(*entries), auth))


async def refused(tokens: Tokens, credential: str) -> str:
    with pytest.raises(Unauthorized) as caught:
        await tokens.caller(credential)
    return str(caught.value)


# What is let in ------------------------------------------------------------------------------------


async def test_a_token_by_the_shared_secret_names_its_tenant_and_scopes() -> None:
    """Nothing else about it counts."""
    caller = await by_secret().caller(token(scope="submit read openid profile"))

    assert (caller.tenant, caller.scopes) == ("acme", frozenset({Scope.SUBMIT, Scope.READ}))


@pytest.mark.parametrize("key, algorithm", [(rsa_key(), "RS256"), (ec_key(), "ES256")], ids=["RS256", "ES256"])
async def test_a_token_by_a_key_of_the_set_is_let_in_with_and_without_kid(key: Any, algorithm: str) -> None:
    """Without one, only because no other key could be meant."""
    tokens = by_key_set(public_jwk(key, "k1"))

    assert (await tokens.caller(token(key, algorithm, kid="k1"))).tenant == "acme"
    assert (await tokens.caller(token(key, algorithm))).tenant == "acme"


async def test_tenant_and_scopes_come_from_the_claims_that_the_settings_name() -> None:
    """Issuers differ: some list scopes, some have no claim but `sub`."""
    tokens = by_secret(tenant_claim="sub", scope_claim="scp")

    caller = await tokens.caller(token(sub="auth0|42", scp=["read", 7, "admin"]))

    assert (caller.tenant, caller.scopes) == ("auth0|42", frozenset({Scope.READ, Scope.ADMIN}))


async def test_clocks_may_differ_by_the_leeway_and_not_by_more() -> None:
    """Ten seconds by default."""
    now = int(time.time())

    await by_secret().caller(token(exp=now - 5))
    await by_secret().caller(token(nbf=now + 5))
    assert "expired" in await refused(by_secret(leeway_s=2), token(exp=now - 5))


# What is not ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", ["none", "None", "NONE", "", None, 7, ["HS256"], {}])
@pytest.mark.parametrize("signature", ["", "AAAA"])
async def test_a_token_that_says_it_needs_no_signature_is_refused(alg: Any, signature: str) -> None:
    """The oldest hole: the token must not choose how it is checked."""
    credential = forged({"alg": alg, "typ": "JWT"}).rpartition(".")[0] + f".{signature}"

    for tokens in (by_secret(), by_key_set(public_jwk(rsa_key(), "k1"))):
        await refused(tokens, credential)


async def test_a_public_key_is_no_shared_secret() -> None:
    """HS256 with the public key as its secret: the key's type says which algorithm it is for."""
    entry = public_jwk(rsa_key(), "k1")
    pem = rsa_key().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    der = rsa_key().public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    both = Tokens(
        auth_settings(hs256_secret=SECRET, jwks_url="https://issuer.example/keys"),
        KeySet(MadeUpSource(entry), auth_settings()),
    )

    for tokens in (by_key_set(entry), both):
        for secret in (pem, pem.strip(), der, entry["n"].encode()):
            await refused(tokens, forged({"alg": "HS256", "kid": "k1"}, hmac_key=secret))


async def test_a_key_of_one_type_does_not_check_tokens_of_another() -> None:
    """The `kid` of an RSA key in a token signed with ES256, and the other way round."""
    tokens = by_key_set(public_jwk(rsa_key(), "rsa"), public_jwk(ec_key(), "ec"))

    await refused(tokens, token(ec_key(), "ES256", kid="rsa"))
    await refused(tokens, token(rsa_key(), "RS256", kid="ec"))
    await refused(tokens, token(rsa_key(), "PS256", kid="rsa"))
    await refused(tokens, token(rsa_key(), "RS512", kid="rsa"))
    await tokens.caller(token(ec_key(), "ES256", kid="ec"))


async def test_a_shared_secret_checks_no_longer_hash_than_its_own() -> None:
    """One secret, one algorithm."""
    assert "algorithm" in await refused(by_secret(), token(SECRET * 2, "HS512"))


async def test_a_token_brings_no_key_of_its_own() -> None:
    """`jwk`, `jku` and `x5u` in the header are the attacker's."""
    attacker = rsa_key("attacker")
    header = {"jwk": public_jwk(attacker), "jku": "https://evil.example/keys", "x5u": "https://evil.example/x"}
    credential = jwt.encode(claims(), attacker, algorithm="RS256", headers={**header, "kid": "k1"})

    assert "signature" in await refused(by_key_set(public_jwk(rsa_key(), "k1")), credential)


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"exp": int(time.time()) - 60}, "expired"),
        ({"nbf": int(time.time()) + 86_400}, "not valid yet"),
        ({"iat": int(time.time()) + 86_400}, "not valid yet"),
        ({"aud": "another-service"}, "another audience"),
        ({"aud": [f"{AUDIENCE}-staging", "x"]}, "another audience"),
        ({"aud": {AUDIENCE: 1}}, "another audience"),
        ({"iss": "https://evil.example"}, "another issuer"),
        ({"iss": f"{ISSUER}/"}, "another issuer"),
        ({"exp": None}, "no claim 'exp'"),
        ({"nbf": None}, "no claim 'nbf'"),
        ({"aud": None}, "no claim 'aud'"),
        ({"iss": None}, "no claim 'iss'"),
        ({"exp": "soon"}, "neither"),
        ({"exp": float("inf")}, "neither"),
        ({"nbf": [1]}, "neither"),
    ],
)
async def test_a_token_for_another_time_audience_or_issuer_is_refused(changed: dict[str, Any], said: str) -> None:
    """Required and checked, each of them; the answer says which, as the caller has to mend it."""
    assert said in await refused(by_secret(), token(**changed))


async def test_an_issuer_that_leaves_out_nbf_can_be_allowed_and_is_still_checked_where_it_is_there() -> None:
    """A setting, not the default."""
    tokens = by_secret(require_nbf=False)

    await tokens.caller(token(nbf=None))
    await refused(tokens, token(nbf=int(time.time()) + 600))


@pytest.mark.parametrize(
    "tenant",
    [
        None,
        "",
        7,
        True,
        ["acme"],
        {"id": "acme"},
        "a b",
        "a\r\nb",
        "acme\n",
        "\u0430cme",
        "{acme}",
        "..",
        "a" * 129,
        "a%00",
    ],
)
async def test_a_tenant_that_is_not_a_plain_name_is_refused(tenant: Any) -> None:
    """It becomes part of keys, headers and log lines."""
    credential = forged({"alg": "HS256"}, {**claims(), "tenant": tenant}, hmac_key=SECRET.encode())

    assert "must name a tenant" in await refused(by_secret(), credential)


async def test_one_changed_character_spoils_a_token() -> None:
    """Of any part."""
    good = token()
    for place in (5, len(good) // 2, len(good) - 10):
        changed = "A" if good[place] != "A" else "B"
        await refused(by_secret(), good[:place] + changed + good[place + 1 :])


async def test_a_critical_header_that_nobody_understands_is_refused() -> None:
    """RFC 7515, 4.1.11."""
    await refused(by_secret(), forged({"alg": "HS256", "crit": ["exp2"], "exp2": 1}, hmac_key=SECRET.encode()))


def all_of(kinds: Any) -> list[type[Exception]]:
    found = [kind for _, kind in inspect.getmembers(kinds, inspect.isclass) if issubclass(kind, Exception)]
    assert len(found) > 10
    return found


@pytest.mark.parametrize("kind", [*all_of(exceptions), ValueError, RecursionError])
async def test_whatever_the_library_raises_becomes_unauthorized(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says nothing of what was in the token."""

    def fails(*_: object, **__: object) -> None:
        raise kind("what the token said")

    monkeypatch.setattr(jwt, "decode", fails)

    if kind is not exceptions.MissingRequiredClaimError:  # names a claim that we asked for
        assert "what the token said" not in await refused(by_secret(), token())
