"""The routes of OpenAI's responses. A thin shell: `responses` reads and answers, `response_events` tells.

    POST /v1/responses               a response: whole, as a stream, or at once with `background`
    GET  /v1/responses/{id}          as it is; `?stream=true&starting_after=N` follows it from there
    POST /v1/responses/{id}/cancel   ask for its end

Every response is a job and can be read by its id for as long as the job's record lives, from any gateway.
Called by: openai.surface.
"""

from fastapi import Request, Response

from codeyard.producer.gateway import requests
from codeyard.producer.gateway.merged import Merged
from codeyard.producer.gateway.openai.calls import Call, as_json, early_error, finals, submitted
from codeyard.producer.gateway.openai.convert import PREFIXES, Asked
from codeyard.producer.gateway.openai.errors import ApiError
from codeyard.producer.gateway.openai.parameters import Api
from codeyard.producer.gateway.openai.response_events import told
from codeyard.producer.gateway.openai.responses import continued, read_response, response_of
from codeyard.producer.gateway.problems import Refused
from codeyard.producer.gateway.surface import Kit, Route
from codeyard.producer.gateway.tenancy import TenantJobs
from codeyard.shared.access.keys import Scope
from codeyard.shared.claims import redeem
from codeyard.shared.errors import BlobMissing, JobNotFound, MalformedMessage
from codeyard.shared.job import Claim, JobId
from codeyard.shared.record import Record
from codeyard.shared.store.port import CancelVerdict

CANCEL_S = 5.0  # for a worker to stop, so that the answer says so
MOST_EVENTS = 10**9


class Responses:
    def __init__(self, kit: Kit) -> None:
        self._kit = kit

    def routes(self) -> list[Route]:
        one = "/v1/responses/{response_id}"
        return [
            Route("/v1/responses", "POST", Scope.SUBMIT, self.create),
            Route(one, "GET", Scope.READ, self.retrieve),
            Route(f"{one}/cancel", "POST", Scope.CANCEL, self.cancel),
        ]

    async def create(self, request: Request, jobs: TenantJobs) -> Response:
        async def reading(body: bytes) -> Asked:
            read = read_response(body)
            if read.previous is None:
                return read.asked
            try:
                before = await self._record(jobs, _job_id(read.previous))
            except JobNotFound as error:
                raise Refused("job-not-found", str(error), field="previous_response_id") from None
            return continued(read.asked, before)

        call = await submitted(self._kit, request, jobs, reading)
        job_id = call.jobs[0].job.id
        if call.asked.stream:
            return await self._streamed(request, jobs, call)
        if not call.asked.background:
            statuses = await finals(self._kit, request, jobs, call)
            if isinstance(statuses, ApiError):
                return statuses.response(call.headers)
        return as_json(response_of(await self._own(job_id)), call.headers)

    async def retrieve(self, request: Request, jobs: TenantJobs) -> Response:
        job_id = _job_id(request.path_params["response_id"])
        stream = request.query_params.get("stream", "false")
        if stream not in ("true", "false"):
            raise Refused("invalid-parameter", "true or false", field="stream")
        after = None
        if "starting_after" in request.query_params:
            after = requests.whole_number(request, "starting_after", default=0, least=0, most=MOST_EVENTS)
        record = await self._record(jobs, job_id)
        if stream == "false" or request.method == "HEAD":
            return as_json(response_of(record), {"x-request-id": job_id})
        return self._follow(record, Merged([jobs.stream(job_id)]), starting_after=after)

    async def cancel(self, request: Request, jobs: TenantJobs) -> Response:
        job_id = _job_id(request.path_params["response_id"])
        if await jobs.cancel(job_id) is CancelVerdict.REQUESTED:
            await self._kit.final_within(request, jobs, job_id, CANCEL_S, resumable=False)
        return as_json(response_of(await self._record(jobs, job_id)), {"x-request-id": job_id})

    async def _streamed(self, request: Request, jobs: TenantJobs, call: Call) -> Response:
        job_id = call.jobs[0].job.id
        events = Merged([jobs.stream(job_id)])
        error = None
        try:
            if not call.asked.background:
                error = await early_error(self._kit, request, jobs, call, events)
            record = await self._own(job_id)
        except BaseException:
            await events.aclose()
            raise
        if error is not None:
            await events.aclose()
            return error.response(call.headers)
        answer = self._follow(record, events)
        answer.headers.update(call.headers)
        return answer

    def _follow(self, record: Record, events: Merged, *, starting_after: int | None = None) -> Response:
        async def final() -> Record:
            return await self._own(record.id)

        return self._kit.event_stream(told(record, events, final, starting_after=starting_after), resumable=False)

    async def _record(self, jobs: TenantJobs, job_id: JobId) -> Record:
        """With its prompt, wherever that lies. Raises JobNotFound, also of another tenant's."""
        await jobs.status(job_id)
        return await self._own(job_id)

    async def _own(self, job_id: JobId) -> Record:
        """Of a job that is known to be the caller's."""
        [record] = await self._kit.store.read([job_id])
        if record is None:
            raise JobNotFound(job_id)
        prompt, shelves = record.job.prompt, self._kit.shelves
        if not isinstance(prompt, Claim) or shelves is None:
            return record
        try:
            redeemed = await redeem(shelves.blobs, record.job.tenant, prompt)
        except (BlobMissing, MalformedMessage):
            return record  # its answer is still there
        return record.model_copy(update={"job": record.job.model_copy(update={"prompt": redeemed})})


def _job_id(response_id: str) -> JobId:
    """Raises JobNotFound for what cannot be the id of a response."""
    return requests.known_form(response_id.removeprefix(PREFIXES[Api.RESPONSES]))
