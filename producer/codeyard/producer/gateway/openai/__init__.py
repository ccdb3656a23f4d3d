"""OpenAI's API over durable jobs: chat completions, completions, responses and models, as its SDKs use them.

    parameters        the table: what each parameter of a body becomes
    messages          conversations, tools and formats, from OpenAI's words into ours
    convert           a body -> what to submit; what came of it -> OpenAI's objects. Pure; batches use it too
    responses         the same two for /v1/responses
    merged, chunks    the events of a request's jobs in one line -> the chunks of a stream
    response_events   the events of a job -> the numbered events of a response
    errors            every refusal in OpenAI's error body
    calls             submit a request's jobs, wait for their ends
    routes, response_routes   the handlers; `surface` is what the gateway registers, `described` what OpenAPI says

docs/openai.md is the reference.
"""
