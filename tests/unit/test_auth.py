"""From headers to a caller: which credential counts, and that nothing a caller sends is more than a refusal."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tokens import SECRET, STATIC, MadeUpKeys, auth_settings, some_key, token

from codeyard.producer.gateway.auth import Credentials, Development, credential_of
from codeyard.producer.gateway.grouped import Grouped
from codeyard.producer.gateway.keys import ApiKeys
from codeyard.producer.gateway.tokens import Tokens
from codeyard.shared.access.keys import ApiKey, Scope, presented
from codeyard.shared.errors import Forbidden, SettingsError, StoreUnavailable, Unauthorized


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


def credentials_over(store: MadeUpKeys, *, clock: Clock | None = None, **given: Any) -> Credentials:
    auth = auth_settings(**given)
    return Credentials(
        auth,
        ApiKeys(store, cache_s=auth.key_cache_s, monotonic=clock or Clock()),
        Tokens(auth, None) if auth.accepts_jwt else None,
    )


# Which credential ----------------------------------------------------------------------------------


async def test_a_key_is_taken_from_either_header() -> None:
    """OpenAI's SDK sends `Authorization: Bearer`, Anthropic's `x-api-key`."""
    made = some_key(Scope.SUBMIT)
    credentials = credentials_over(MadeUpKeys(made.key))

    for authorization, api_key in (
        ([f"Bearer {made.text}"], list[str]()),
        ([f"bearer  {made.text} "], []),
        ([], [made.text]),
    ):
        caller = await credentials.caller(authorization, api_key)
        assert (caller.tenant, caller.scopes) == ("acme", frozenset({Scope.SUBMIT}))
        assert made.text not in caller.name


async def test_a_token_and_a_static_key_are_taken_from_either_header_too() -> None:
    """A caller does not have to know what it was given."""
    credentials = credentials_over(MadeUpKeys(), hs256_secret=SECRET, static_key=STATIC, static_tenant="ops")

    assert (await credentials.caller([f"Bearer {token()}"], [])).tenant == "acme"
    assert (await credentials.caller([], [token()])).tenant == "acme"
    assert (await credentials.caller([], [STATIC])).tenant == "ops"
    assert (await credentials.caller([f"Bearer {STATIC}"], [STATIC])).scopes == frozenset(Scope)


@pytest.mark.parametrize(
    "authorization, api_key",
    [
        ([], []),
        ([""], []),
        ([], [""]),
        (["Bearer"], []),
        (["Bearer "], []),
        (["Basic dXNlcjpwYXNz"], []),
        ([STATIC], []),
        (["Bearer a", "Bearer a"], []),
        ([], ["a", "a"]),
        *(([f"Bearer {STATIC}"], [other]) for other in "bcdefgh"),
        ([f"Bearer {STATIC}", f"Bearer {STATIC}"], []),
        (["Bearer " + "a" * 8_193], []),
        (["Bearer k\u00e9y"], []),
        (["Bearer a b"], []),
    ],
)
async def test_no_credential_several_or_one_in_another_form_is_refused(
    authorization: list[str], api_key: list[str]
) -> None:
    """Two that differ could be one for a proxy and one for us."""
    credentials = credentials_over(MadeUpKeys(), hs256_secret=SECRET, static_key=STATIC)

    with pytest.raises(Unauthorized):
        await credentials.caller(authorization, api_key)


@pytest.mark.parametrize(
    "bearer", [STATIC[:-1], STATIC + "x", STATIC.upper(), token("another-secret-of-forty-characters-xxxxx")]
)
async def test_nearly_the_right_one_is_refused(bearer: str) -> None:
    """Compared whole."""
    with pytest.raises(Unauthorized):
        await credentials_over(MadeUpKeys(), static_key=STATIC).caller([f"Bearer {bearer}"], [])


@settings(max_examples=400, deadline=None)
@given(
    authorization=st.lists(
        st.one_of(
            st.text(max_size=60),
            st.text(max_size=60).map(lambda text: f"Bearer {text}"),
            st.binary(max_size=60).map(lambda raw: f"Bearer {raw.decode('latin-1')}"),
            st.from_regex(r"Bearer [A-Za-z0-9_-]{0,40}\.[A-Za-z0-9_-]{0,60}\.[A-Za-z0-9_-]{0,40}", fullmatch=True),
            st.from_regex(r"Bearer cy_[0-9a-z]{10,14}_[0-9A-Za-z]{40,46}", fullmatch=True),
        ),
        max_size=2,
    ),
    api_key=st.lists(st.text(max_size=60), max_size=2),
)
async def test_whatever_is_sent_is_refused_and_nothing_else(authorization: list[str], api_key: list[str]) -> None:
    """Never an error of ours: the header is the first thing an attacker can write."""
    credentials = credentials_over(MadeUpKeys(), hs256_secret=SECRET, static_key=STATIC)

    with pytest.raises(Unauthorized) as caught:
        await credentials.caller(authorization, api_key)

    for value in (*authorization, *api_key):
        credential = value.removeprefix("Bearer ").strip()
        assert len(credential) < 12 or credential not in str(caught.value)


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, 400), character=st.characters(codec="latin-1"))
async def test_a_token_changed_anywhere_is_refused(place: int, character: str) -> None:
    """Or it is the same token, written with other spare bits in its last character."""
    good = token()
    place %= len(good)
    changed = good[:place] + character + good[place + 1 :]
    credentials = credentials_over(MadeUpKeys(), hs256_secret=SECRET)

    if changed == good or place == len(good) - 1:
        return
    with pytest.raises(Unauthorized):
        await credentials.caller([f"Bearer {changed}"], [])


async def test_in_development_everyone_is_one_tenant_with_every_scope() -> None:
    """Whatever they send."""
    caller = await Development().caller(["Bearer nonsense"], [])

    assert caller.tenant == "default"
    for scope in Scope:
        caller.require(scope)


@pytest.mark.parametrize("scope", list(Scope))
async def test_a_scope_that_was_not_given_is_forbidden_and_admin_has_all(scope: Scope) -> None:
    """Least privilege: a dashboard's key reads and nothing more."""
    store = MadeUpKeys()
    credentials = credentials_over(store)
    for given_scope in Scope:
        made = some_key(given_scope)
        await store.put([made.key])
        caller = await credentials.caller([], [made.text])
        if given_scope in (scope, Scope.ADMIN):
            caller.require(scope)
        else:
            with pytest.raises(Forbidden, match=scope.value):
                caller.require(scope)


# API keys ------------------------------------------------------------------------------------------


async def test_a_revoked_key_stops_working_within_the_cache_time() -> None:
    """And not before the store was asked again: that is what the cache is for."""
    made, clock = some_key(), Clock()
    store = MadeUpKeys(made.key)
    credentials = credentials_over(store, clock=clock, key_cache_s=5)
    await credentials.caller([], [made.text])

    await store.put([made.key.model_copy(update={"revoked_at": time.time()})])
    clock.now += 4.9
    await credentials.caller([], [made.text])
    assert store.num_reads == 1

    clock.now += 0.1
    with pytest.raises(Unauthorized, match="revoked"):
        await credentials.caller([], [made.text])


async def test_an_expired_key_is_refused_though_it_is_remembered() -> None:
    """Its end is known, nobody needs to be asked."""
    made = some_key(expires_in_s=-1)

    with pytest.raises(Unauthorized, match="expired"):
        await credentials_over(MadeUpKeys(made.key)).caller([], [made.text])


async def test_a_new_key_works_at_once_though_it_was_unknown_a_moment_ago() -> None:
    """Refusals are not remembered."""
    made, store = some_key(), MadeUpKeys()
    credentials = credentials_over(store)
    with pytest.raises(Unauthorized):
        await credentials.caller([], [made.text])

    await store.put([made.key])

    await credentials.caller([], [made.text])


async def test_the_right_id_with_another_secret_is_refused_in_the_same_words_as_an_unknown_id() -> None:
    """Ids are no secret, but there is no need to confirm them."""
    made, other = some_key(), some_key()
    credentials = credentials_over(MadeUpKeys(made.key))
    wrong = made.text[:16] + other.text[16:]

    said = []
    for text in (wrong, other.text):
        with pytest.raises(Unauthorized) as caught:
            await credentials.caller([], [text])
        said.append(str(caught.value))
    assert said[0] == said[1]


async def test_while_the_store_is_away_nobody_gets_in_with_a_key() -> None:
    """Fails closed, and not as 401: the key may be as good as ever."""
    made, clock = some_key(), Clock()
    store = MadeUpKeys(made.key)
    credentials = credentials_over(store, clock=clock, static_key=STATIC)
    await credentials.caller([], [made.text])

    store.away = True
    clock.now += 5
    with pytest.raises(StoreUnavailable):
        await credentials.caller([], [made.text])

    await credentials.caller([], [STATIC])  # needs no store
    store.away = False
    await credentials.caller([], [made.text])


async def test_what_is_kept_of_a_key_does_not_contain_it() -> None:
    """A copy of the store opens nothing."""
    made = some_key()

    secret = made.text.split("_")[2]
    assert secret not in made.key.encode()
    assert secret not in repr(made)
    assert secret not in repr(made.key)
    assert ApiKey.decode(made.key.encode()) == made.key


def test_no_two_keys_are_alike_and_each_reads_back() -> None:
    """256 random bits."""
    texts = {some_key().text for _ in range(200)}

    assert len(texts) == 200
    assert all(presented(text) for text in texts)
    assert all(len(text.split("_")[2]) == 43 for text in texts)


@pytest.mark.parametrize("tenant", ["", "a b", "a\r\nX-Evil: 1", "a\x00", "\u00e4", "{a}", "-a", "a" * 129])
def test_no_key_is_made_for_a_tenant_with_odd_characters(tenant: str) -> None:
    """It becomes part of keys in the store, of headers and of log lines."""
    with pytest.raises(SettingsError, match="tenant"):
        some_key(tenant=tenant)


@pytest.mark.parametrize(
    "text", ["cy_", "cy_abc_def", "CY_" + "a" * 12 + "_" + "b" * 43, "cy_" + "a" * 12 + "_" + "b" * 43 + "\n"]
)
def test_what_has_not_the_form_of_a_key_is_none(text: str) -> None:
    """It goes to the tokens, which refuse it."""
    assert presented(text) is None


def test_header_values_are_stripped_and_nothing_more() -> None:
    """RFC 9110 allows blanks around a value."""
    assert credential_of(["  Bearer   abc  "], []) == "abc"


# Grouping ------------------------------------------------------------------------------------------


async def test_lookups_that_come_while_others_are_under_way_share_a_round_trip() -> None:
    """A burst of a hundred requests is not a hundred calls; a lone one never waits."""
    groups: list[list[int]] = []
    go = asyncio.Event()

    async def call(group: Sequence[int]) -> list[int]:
        groups.append(list(group))
        await go.wait()
        return [one * 2 for one in group]

    grouped = Grouped(call, in_flight=2, most=50)
    asking = [asyncio.create_task(grouped(n)) for n in range(100)]
    await asyncio.sleep(0)
    assert groups == [[0], [1]]

    go.set()

    assert await asyncio.gather(*asking) == [n * 2 for n in range(100)]
    assert [len(group) for group in groups] == [1, 1, 50, 48]
    await grouped.close()


async def test_a_failed_call_fails_those_in_it_and_the_next_goes_on() -> None:
    """And one that was given up while it waited is not sent."""
    calls: list[list[int]] = []
    go = asyncio.Event()

    async def call(group: Sequence[int]) -> list[int]:
        calls.append(list(group))
        await go.wait()
        if len(calls) == 2:
            raise StoreUnavailable("away")
        return list(group)

    grouped = Grouped(call, in_flight=1)
    asking = [asyncio.create_task(grouped(n)) for n in range(4)]
    await asyncio.sleep(0)
    asking[2].cancel()
    await asyncio.sleep(0)
    go.set()

    outcomes = await asyncio.gather(*asking, return_exceptions=True)

    assert outcomes[0] == 0
    assert [type(one) for one in outcomes[1:]] == [StoreUnavailable, asyncio.CancelledError, StoreUnavailable]
    assert calls == [[0], [1, 3]]
    assert await grouped(7) == 7
    await grouped.close()


async def test_closing_ends_those_who_wait() -> None:
    """Nobody waits for ever at a stop."""

    async def never(group: Sequence[int]) -> list[int]:
        await asyncio.Event().wait()
        return list(group)

    grouped = Grouped(never, in_flight=1)
    first = asyncio.create_task(grouped(1))
    await asyncio.sleep(0)
    second = asyncio.create_task(grouped(2))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.sleep(0)

    await grouped.close()

    assert [type(one) for one in await asyncio.gather(first, second, return_exceptions=True)] == [
        asyncio.CancelledError,
        asyncio.CancelledError,
    ]
