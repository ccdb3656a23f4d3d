"""The drill's servers, under the name that tests know them by."""

from codeyard.cli.drill.servers import Guarded, RabbitServer, RedisServer, ServerFailed, free_port

__all__ = ["Guarded", "RabbitServer", "RedisServer", "ServerFailed", "free_port"]
