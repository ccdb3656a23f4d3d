"""OpenAI's API over durable jobs: chat completions, completions, responses and models, as its SDKs use them.

    parameters   the table: what each parameter of a body becomes
    messages     conversations, tools and formats, from OpenAI's words into ours
    convert      a body -> what to submit; what came of it -> OpenAI's objects. Pure; batches use it too
    chunks       the events of jobs -> the chunks of a stream
    responses    the same two for /v1/responses
    errors       every refusal in OpenAI's error body
    routes, response_routes   the handlers; `surface` is what the gateway registers

docs/openai.md is the reference.
"""
