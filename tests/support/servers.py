"""The drill's servers, under the name that tests know them by."""

from codeyard.cli.drill.servers import (
    ROOT_VARIABLE,
    Guarded,
    RabbitServer,
    RedisServer,
    ServerFailed,
    as_run,
    found,
    free_port,
    path,
    start_epmd,
)

__all__ = [
    "ROOT_VARIABLE",
    "Guarded",
    "RabbitServer",
    "RedisServer",
    "ServerFailed",
    "as_run",
    "found",
    "free_port",
    "path",
    "start_epmd",
]
