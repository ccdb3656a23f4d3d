"""Which APIs the gateway speaks beside its own: the one place that knows them all. Called by: gateway.serve, tests."""

from collections.abc import Sequence

from codeyard.producer.gateway.anthropic.handlers import anthropic_surface
from codeyard.producer.gateway.batches.surfaces import batch_surfaces
from codeyard.producer.gateway.openai.surface import openai_surface
from codeyard.producer.gateway.surface import Kit, Surface


def surfaces(kit: Kit) -> Sequence[Surface]:
    return (
        openai_surface(kit),
        anthropic_surface(kit),
        *batch_surfaces(kit),
    )
