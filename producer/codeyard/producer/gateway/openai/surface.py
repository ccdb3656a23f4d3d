"""OpenAI's API as the gateway registers it. Called by: gateway.surfaces."""

from codeyard.producer.gateway.openai.errors import refuse
from codeyard.producer.gateway.openai.response_routes import Responses
from codeyard.producer.gateway.openai.routes import Completions, Models
from codeyard.producer.gateway.surface import Kit, Surface


def openai_surface(kit: Kit) -> Surface:
    return Surface([*Completions(kit).routes(), *Models(kit).routes(), *Responses(kit).routes()], refuse)
