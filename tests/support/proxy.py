"""The drill's TCP proxy, under the name that tests know it by."""

from codeyard.cli.drill.proxy import TcpProxy

__all__ = ["TcpProxy"]
