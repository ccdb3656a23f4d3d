"""What a job asks for, in vLLM's words: its SamplingParams, structured outputs among them.

Called by: vllm_engine, in the worker; vLLM is imported when the first job comes. Pinned, as all that is called
of vLLM, by tests/integration/test_engine_vllm.py.
"""

from typing import Any

from codeyard.shared.chat import Chat, TokenLogprob
from codeyard.shared.job import OutputFormat
from codeyard.worker.engines.completion import Decode, token_logprob
from codeyard.worker.engines.forced import forced_schema
from codeyard.worker.engines.port import EngineJob

OURS = {"stop", "max_tokens", "output_format"}  # fields of a job's sampling that vLLM does not get by their names


def sampling_params(job: EngineJob, *, room: int) -> Any:
    """`room`: tokens it may still take. A call that is demanded goes before the job's own format."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    asked = job.sampling
    form = _form(job)
    return SamplingParams(
        **{"temperature": 0.0, **asked.model_dump(exclude_none=True, exclude=OURS)},
        max_tokens=room,
        detokenize=False,
        structured_outputs=StructuredOutputsParams(**form) if form else None,
        # Stop strings need every token: they are looked for here.
        output_kind=RequestOutputKind.DELTA if job.stream or asked.stop else RequestOutputKind.FINAL_ONLY,
    )


def forces_form(job: EngineJob) -> bool:
    """Whether the model may not write what it likes: then what vLLM refuses is that form."""
    return bool(_form(job))


def logprobs_of(output: Any, decode: Decode, *, num_top: int) -> list[TokenLogprob]:
    """Of a CompletionOutput: each of its tokens', with the `num_top` likeliest in its place. With no new token
    vLLM 0.25.1 gives those of all earlier ones again."""
    odds = output.logprobs[-len(output.token_ids) :] if output.token_ids else []
    return [
        token_logprob(
            decode,
            token,
            at[token].logprob,
            [(other, one.logprob) for other, one in at.items() if one.rank is not None and one.rank <= num_top],
        )
        for token, at in zip(output.token_ids, odds, strict=True)
    ]


def _form(job: EngineJob) -> dict[str, Any]:
    """Arguments of StructuredOutputsParams; none where the answer is free."""
    forced = forced_schema(job.prompt) if isinstance(job.prompt, Chat) and job.prompt.offers_tools else None
    if forced is not None:
        return {"json": forced}
    match job.sampling.output_format:
        case None:
            return {}
        case OutputFormat(json_schema={} as schema) if not schema:
            return {"json_object": True}
        case OutputFormat(type="json_schema", json_schema=schema):
            return {"json": schema}
        case OutputFormat(type="regex", regex=regex):
            return {"regex": regex}
        case OutputFormat(choice=choice):
            return {"choice": list(choice or ())}
