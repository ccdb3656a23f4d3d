"""The drill's TCP proxy, under the name that tests know it by, and the ways in which a server is away behind it."""

import itertools
from enum import StrEnum

from codeyard.cli.drill.proxy import TcpProxy

__all__ = ["Away", "TcpProxy", "gaps_s"]


class Away(StrEnum):
    """How a server is not there."""

    REFUSED = "refused"  # every link reset, each new one too
    STALLED = "stalled"  # links are open, and carry nothing
    CLIENT_ENDED = "client ended"  # clients read a FIN; the server believes them there
    SERVER_ENDED = "server ended"  # the server reads a FIN, and hangs up
    BOTH_ENDED = "both ended"

    def begin(self, proxy: TcpProxy) -> None:
        match self:
            case Away.REFUSED:
                proxy.refuse()
            case Away.STALLED:
                proxy.stall()
            case Away.CLIENT_ENDED:
                proxy.half_close("client")
            case Away.SERVER_ENDED:
                proxy.half_close("server")
            case Away.BOTH_ENDED:
                proxy.half_close("both")

    def end(self, proxy: TcpProxy) -> None:
        if self is Away.STALLED:
            proxy.resume()
        else:
            proxy.accept()


def gaps_s(proxy: TcpProxy, *, since_s: float) -> list[float]:
    """Seconds between the connections that were asked for, by the loop's clock."""
    tried = [at for at in proxy.tried_s if at >= since_s]
    return [later - earlier for earlier, later in itertools.pairwise(tried)]
