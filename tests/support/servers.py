"""The drill's servers, under the name that tests know them by."""

from codeyard.cli.drill.servers import (
    ROOT_VARIABLE,
    Guarded,
    RabbitServer,
    RedisServer,
    ServerFailed,
    as_run,
    free_port,
    path,
)

__all__ = ["ROOT_VARIABLE", "Guarded", "RabbitServer", "RedisServer", "ServerFailed", "as_run", "free_port", "path"]
