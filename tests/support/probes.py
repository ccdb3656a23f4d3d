"""The drill's probes, under the name that tests know them by."""

from codeyard.cli.drill.probes import amqp_answers, redis_answers

__all__ = ["amqp_answers", "redis_answers"]
