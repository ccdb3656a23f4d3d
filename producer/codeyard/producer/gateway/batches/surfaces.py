"""Files and batches as the gateway registers them. Called by: gateway.surfaces."""

from collections.abc import Sequence

from codeyard.producer.gateway.anthropic.errors import refuse as refuse_as_anthropic
from codeyard.producer.gateway.batches.anthropic_routes import AnthropicBatches
from codeyard.producer.gateway.batches.openai_routes import OpenAiBatches, ResultFiles
from codeyard.producer.gateway.files.routes import Files
from codeyard.producer.gateway.openai.errors import refuse as refuse_as_openai
from codeyard.producer.gateway.surface import Kit, Surface


def batch_surfaces(kit: Kit) -> Sequence[Surface]:
    """None without a place to keep them."""
    shelves = kit.shelves
    if shelves is None:
        return ()
    files = Files(shelves, kit.settings, ResultFiles(shelves, kit))
    return (
        Surface([*files.routes(), *OpenAiBatches(shelves, kit).routes()], refuse_as_openai),
        Surface(AnthropicBatches(shelves, kit).routes(), refuse_as_anthropic),
    )
