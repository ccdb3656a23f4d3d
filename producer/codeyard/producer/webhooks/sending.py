"""One request to somebody else's server, which may be slow, hostile, or not who it seems.

Promise: it is over within `timeout_s`; the name is resolved once, every address it has is checked, and the
connection goes to a checked address, whatever the name stands for a moment later. Redirects are not followed,
proxies of the environment not used, no more than MAX_ANSWER_BYTES of the answer are read, and no connection is
kept. TLS is checked against the name. Called by: webhooks.delivery.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import httpx

from codeyard.producer.webhooks.policy import Policy, Target
from codeyard.shared.errors import InvalidJob

MAX_ANSWER_BYTES = 4_096
MAX_ADDRESSES = 4  # tried one after the other

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""The addresses of a name, as text. Raises OSError."""


class Fate(StrEnum):
    ARRIVED = "arrived"
    FAILED = "failed"  # it may arrive later
    HOPELESS = "hopeless"  # it will not, or must not


@dataclass(frozen=True, slots=True)
class Answer:
    fate: Fate
    reason: str = ""  # for the log; holds nothing that the other side said but a status


class Sender:
    def __init__(
        self,
        policy: Policy,
        *,
        timeout_s: float,
        resolve: Resolve | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._policy = policy
        self._timeout_s = timeout_s
        self._resolve = resolve or resolved
        self._tls = tls or ssl.create_default_context()

    async def send(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        try:
            target = self._policy.target(url)
        except InvalidJob as error:
            return Answer(Fate.HOPELESS, error.reason)
        try:
            async with asyncio.timeout(self._timeout_s):
                addresses = await self._resolve(target.host, target.port)
                for address in addresses:
                    if reason := self._policy.refused(ipaddress.ip_address(address.partition("%")[0])):
                        return Answer(Fate.HOPELESS, reason)
                return await self._ask(target, addresses[:MAX_ADDRESSES], headers, body)
        except TimeoutError:
            return Answer(Fate.FAILED, f"no answer within {self._timeout_s:g} s")
        except (OSError, UnicodeError) as error:  # the second: a name that no resolver would be asked for
            return Answer(Fate.FAILED, f"the name was not resolved ({type(error).__name__})")

    async def _ask(self, target: Target, addresses: Sequence[str], headers: Mapping[str, str], body: bytes) -> Answer:
        answer = Answer(Fate.FAILED, "the name has no address")
        limits = httpx.Limits(max_keepalive_connections=0)  # a kept one would be another name's, at the same address
        # The transport alone: httpx's client would write the whole URL into the log.
        async with httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False, limits=limits) as http:
            for address in addresses:
                try:
                    request = _request(target, address, headers, body, connect_s=self._timeout_s / len(addresses))
                    response = await http.handle_async_request(request)
                except (httpx.ConnectError, httpx.ConnectTimeout):
                    answer = Answer(Fate.FAILED, "no connection")
                    continue
                except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
                    return Answer(Fate.FAILED, f"no answer ({type(error).__name__})")
                try:
                    await _read_some(response)
                finally:
                    await response.aclose()
                return _judged(response.status_code)
        return answer


def _request(
    target: Target, address: str, headers: Mapping[str, str], body: bytes, *, connect_s: float
) -> httpx.Request:
    """To the address; Host header and TLS have the name. The whole is bounded by the caller."""
    extensions = {"sni_hostname": target.host, "timeout": {"connect": connect_s}}
    named = {**headers, "host": target.authority, "accept-encoding": "identity"}
    return httpx.Request("POST", target.at(address), headers=named, content=body, extensions=extensions)


async def resolved(host: str, port: int) -> list[str]:
    """By the system's resolver, each address once, in its order."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(sockaddr[0]) for _, _, _, _, sockaddr in found))


async def _read_some(response: httpx.Response) -> None:
    """So that a server that writes its answer slowly is not cut off in the middle; what it says is not kept."""
    left = MAX_ANSWER_BYTES
    try:
        async for chunk in response.aiter_raw():
            left -= len(chunk)
            if left <= 0:
                return
    except (httpx.HTTPError, httpx.StreamError):
        pass  # the status is what counts


def _judged(status: int) -> Answer:
    if 200 <= status < 300:
        return Answer(Fate.ARRIVED)
    if status == 410:  # "gone": the receiver wants no more of them
        return Answer(Fate.HOPELESS, "the receiver answered 410")
    return Answer(Fate.FAILED, f"the receiver answered {status}")
