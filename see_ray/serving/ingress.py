"""The ingress: HTTP requests in, answers out, the chain in between.

    HTTP ──► Ingress ──► topology ──► expert, expert, …
                │                         └─ none accepts ─► generalist
                └─ twice a second: what is live

It checks and tokenizes the request, has it routed and answered (`topology`), and passes the answer on piece by
piece.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from see_ray.config import Config
from see_ray.engine.detokenize import token_texts
from see_ray.errors import RequestError
from see_ray.models.activation import encode_prompt
from see_ray.models.base_model import context_length, find, load_tokenizer
from see_ray.observability import metrics
from see_ray.routing.chain import GENERALIST, Trace
from see_ray.serving.admission_control import AdmissionController
from see_ray.serving.api_keys import ApiKeys
from see_ray.serving.deployer import Live
from see_ray.serving.ensemble import ENSEMBLE_APP
from see_ray.serving.openai_requests import (
    ChatRequest,
    CompletionRequest,
    Json,
    RouteRequest,
    Sampling,
    parse,
    parse_model,
    unknown_model,
)
from see_ray.serving.openai_responses import (
    SSE_DONE,
    Choice,
    Head,
    ModelEntry,
    chat_body,
    chat_chunk,
    chat_logprobs,
    completion_body,
    completion_chunk,
    completion_logprobs,
    error_body,
    models_body,
    new_id,
    sse,
    usage_body,
    usage_chunk,
)
from see_ray.serving.topology import PerExpert, Shared, Topology

logger = logging.getLogger("ray.serve")

LIVE_EVERY_S = 0.5
"""Seconds between the ingress's questions what is live."""

T = TypeVar("T")

web = FastAPI(title="see_ray", docs_url=None, redoc_url=None, openapi_url=None)


@dataclass(frozen=True)
class EndpointFormat:
    """How the two endpoints dress an answer."""

    path: str
    kind: Literal["chatcmpl", "cmpl"]
    body: Callable[..., Json]
    chunk: Callable[..., Json]
    logprobs: Callable[[list[Any], int], Json]


CHAT = EndpointFormat(
    "/v1/chat/completions",
    "chatcmpl",
    chat_body,
    chat_chunk,
    lambda tokens, _: chat_logprobs(tokens),
)
COMPLETION = EndpointFormat(
    "/v1/completions",
    "cmpl",
    completion_body,
    completion_chunk,
    completion_logprobs,
)


class ChoiceAccumulator:
    """One answer, put together of its pieces."""

    def __init__(self) -> None:
        self.tokens = 0
        self._pieces: list[Choice] = []

    def add(self, piece: Choice, tokens: int) -> None:
        self._pieces.append(piece)
        self.tokens = tokens

    def choice(self, index: int, shape: EndpointFormat) -> Choice:
        text = "".join(piece.text for piece in self._pieces)
        parts = [piece.logprobs for piece in self._pieces if piece.logprobs is not None]
        logprobs = {
            key: [item for part in parts for item in part[key]] if isinstance(parts[0][key], list) else parts[0][key]
            for key in (parts[0] if parts else ())
        }
        return Choice(text, self._pieces[-1].finish_reason, index, logprobs or None)


class Ingress:
    """Answers HTTP requests; see the module's docstring.

    `serving` makes a Serve ingress of it. Doing that here, as a decorator, would have Serve pickle
    the routes by value, before the functions below exist.

    Args:
        config: the whole configuration, as JSON.
        keys: of which a request must bring one, if there are any.
        deployer: handle of the :class:`Deployer`; None in the `shared` topology.
    """

    def __init__(self, config: dict[str, Any], keys: ApiKeys, deployer: DeploymentHandle | None):
        self._config = Config.model_validate(config)
        self._keys = keys
        self._base = find(self._config.base_model)
        self._context = context_length(self._base, self._config.base_model)
        self._tokenizer = load_tokenizer(self._base)
        settings = self._config.serve
        self._topology: Topology = PerExpert(settings, deployer) if deployer else Shared(settings, ENSEMBLE_APP)
        self._live = Live()
        self._line = AdmissionController(self._config.serve.max_wait_s)
        self._follow = asyncio.get_running_loop().create_task(self._follow_live())

    async def _follow_live(self) -> None:
        while True:
            try:
                self._live = (await self._topology.live()).after(self._live)
                self._show_state()
            except (RayServeException, ray.exceptions.RayError) as error:
                logger.warning("cannot ask what is live, going on with what was: %s", error)
            await asyncio.sleep(LIVE_EVERY_S if self._live.version >= 0 else 0.1)

    def _show_state(self) -> None:
        metrics.show("see_sequence_version", self._live.version)
        metrics.show("see_live_experts", len(self._live.experts))
        metrics.show("see_failed_experts", len(self._live.failed))
        metrics.show("see_waiting_requests", self._line.waiting)
        metrics.show("see_expected_wait_seconds", self._line.expected_wait_s())

    # --- endpoints -----------------------------------------------------------------------

    @web.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        return await self._guarded(request, self._chat)

    @web.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._guarded(request, self._completion)

    @web.post("/v1/route")
    async def route(self, request: Request) -> Response:
        return await self._guarded(request, self._route)

    @web.get("/v1/models")
    async def models(self, request: Request) -> Response:
        return await self._guarded(request, self._list)

    @web.get("/v1/models/{model:path}")
    async def model(self, request: Request, model: str) -> Response:
        return await self._guarded(request, self._show)

    @web.get("/health")
    async def health(self) -> Response:
        live = self._live
        body = {
            "status": "ok" if live.version >= 0 else "starting",
            "base_model": self._base.name,
            "sequence_version": live.version,
            "experts": [{"name": e.name, "version": e.version, "threshold": e.threshold} for e in live.experts],
            "failed": live.failed,
            "pending": live.pending,
            "spare": live.spare,
            "store_error": live.store_error,
        }
        return JSONResponse(body, status_code=200 if live.version >= 0 else 503)

    @web.get("/metrics")
    async def metrics(self, request: Request) -> Response:
        return await self._guarded(request, self._metrics)

    # --- what they do --------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        body = parse(ChatRequest, await self._body(request), self._config.serve.max_body_bytes)
        return await self._answer(body, body.chat(), CHAT)

    async def _completion(self, request: Request) -> Response:
        body = parse(CompletionRequest, await self._body(request), self._config.serve.max_body_bytes)
        # Experts know chats only, so a bare prompt is one user turn.
        chat = [{"role": "user", "content": body.prompt}]
        return await self._answer(body, chat, COMPLETION)

    async def _answer(self, body: Any, chat: list[dict[str, str]], shape: EndpointFormat) -> Response:
        began = time.perf_counter()
        with self._line.admit():
            prompt = self._encode(chat)
            sampling = body.sampling()
            max_tokens = self._room(len(prompt), sampling.max_tokens)
            live = self._live  # one version for walk and answer
            who = self._named(live, body.model)
            trace, first_answer = await self._topology.answer(live, prompt, who, max_tokens, sampling, body.stream)
            answers = [first_answer]
            for number in range(1, body.n):  # more answers, all by whom the chain has found
                seeded = sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + number)
                answerer = trace.answered_by
                again = await self._topology.answer(live, prompt, answerer, max_tokens, seeded, body.stream)
                answers.append(again[1])
            choices = _together([self._choices(answer, i, sampling, shape) for i, answer in enumerate(answers)])
            first = await anext(choices)  # what fails before the first piece is an HTTP error, not half an answer
        _count(trace)
        metrics.observe("see_time_to_first_token_seconds", time.perf_counter() - began, answered_by=trace.answered_by)
        head: Head = {
            "id": new_id(shape.kind),
            "model": body.model,
            "created": int(time.time()),
        }
        headers = {"x-see-expert": trace.answered_by}
        if body.stream:
            events = self._events(first, choices, trace, len(prompt), shape, head, body.include_usage, began)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        whole = {index: ChoiceAccumulator() for index in range(body.n)}
        whole[first[0].index].add(*first)
        async for choice, tokens in choices:
            whole[choice.index].add(choice, tokens)
        written = sum(one.tokens for one in whole.values())
        self._finished(trace, len(prompt), written, shape.path, began)
        usage = usage_body(prompt_tokens=len(prompt), completion_tokens=written)
        made = [one.choice(index, shape) for index, one in whole.items()]
        return JSONResponse(shape.body(choices=made, usage=usage, see=trace.body(), **head), headers=headers)

    async def _choices(
        self, answer: AsyncIterator[Any], index: int, sampling: Sampling, shape: EndpointFormat
    ) -> AsyncIterator[tuple[Choice, int]]:
        """The pieces of one answer as choices, each with the tokens of the answer so far."""
        length = 0
        async for piece in answer:
            logprobs = None
            if sampling.logprobs is not None:
                logprobs = shape.logprobs(token_texts(piece.chosen, self._tokenizer), length)
            yield Choice(piece.text, piece.finish_reason, index, logprobs), piece.tokens
            length += len(piece.text)

    async def _events(
        self, first: tuple[Choice, int], choices: AsyncIterator[tuple[Choice, int]], trace: Trace,
        prompt_tokens: int, shape: EndpointFormat, head: Head, include_usage: bool, began: float,
    ) -> AsyncIterator[str]:  # fmt: skip
        last = shape.chunk(first[0], see=trace.body(), **head)
        tokens = {first[0].index: first[1]}
        try:
            yield sse(last)
            async for choice, count in choices:
                last = shape.chunk(choice, see=None if choice.index in tokens else trace.body(), **head)
                tokens[choice.index] = count
                yield sse(last)
            if include_usage:
                usage = usage_body(prompt_tokens=prompt_tokens, completion_tokens=sum(tokens.values()))
                yield sse(usage_chunk(last, usage))
        except Exception as error:
            yield sse(error_body(_as_request_error(error)))
        finally:
            self._finished(trace, prompt_tokens, sum(tokens.values()), shape.path, began)
        yield SSE_DONE

    async def _route(self, request: Request) -> Response:
        body = parse(RouteRequest, await self._body(request), self._config.serve.max_body_bytes)
        with self._line.admit():
            prompt = self._encode(body.chat() or [{"role": "user", "content": body.prompt or ""}])
            live = self._live
            trace = await self._topology.route(live, prompt, self._named(live, body.model))
        _count(trace)
        content = {"object": "see.trace", "model": body.model, "prompt_tokens": len(prompt), "see": trace.body()}
        return JSONResponse(content, headers={"x-see-expert": trace.answered_by})

    async def _metrics(self, request: Request) -> Response:
        return Response(await metrics.scrape(), media_type="text/plain; version=0.0.4")

    async def _list(self, request: Request) -> Response:
        return JSONResponse(models_body(self._entries()))

    async def _show(self, request: Request) -> Response:
        wanted = request.path_params["model"]
        for entry in models_body(self._entries())["data"]:
            if entry["id"] == wanted:
                return JSONResponse(entry)
        raise unknown_model(wanted)

    def _entries(self) -> list[ModelEntry]:
        base = self._base.name
        created = max((expert.created for expert in self._live.experts), default=0)
        experts = [ModelEntry(f"see:{e.name}", e.created, base, "see:generalist") for e in self._live.experts]
        return [
            ModelEntry("see", created, base),
            *experts,
            ModelEntry("see:generalist", 0, base),
        ]

    def _finished(self, trace: Trace, prompt_tokens: int, tokens: int, path: str, began: float) -> None:
        """An answer is over: count it, and leave a line in the log, which Serve gives the request's id."""
        seconds = time.perf_counter() - began
        metrics.observe("see_request_duration_seconds", seconds, path=path)
        metrics.count("see_prompt_tokens_total", prompt_tokens, answered_by=trace.answered_by)
        metrics.count("see_completion_tokens_total", tokens, answered_by=trace.answered_by)
        logger.info(
            "answered by %s (%s), sequence version %d: %d experts asked, %d prompt tokens, %d tokens, %.0f ms",
            trace.answered_by, trace.reason, trace.sequence_version, len(trace.asked), prompt_tokens, tokens,
            seconds * 1000,
        )  # fmt: skip

    def _named(self, live: Live, model: str) -> str | None:
        """Who is to answer, if the model id says so; None: the chain decides."""
        target = parse_model(model)
        if live.version < 0:
            raise RequestError("the endpoint is still starting; try again in a few seconds", 503, "server_error")
        if target.kind == "generalist":
            return GENERALIST
        if target.expert is not None and target.expert not in [expert.name for expert in live.experts]:
            raise unknown_model(model)
        return target.expert

    # --- requests ---------------------------------------------------------------------------

    def _encode(self, chat: list[dict[str, str]]) -> list[int]:
        prompt = encode_prompt(self._tokenizer, chat)
        if len(prompt) >= self._context:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; this model reads at most {self._context}, answer included",
                param="messages",
                code="context_length_exceeded",
            )
        return prompt

    def _room(self, prompt_tokens: int, asked: int | None) -> int:
        room = self._context - prompt_tokens
        if asked is None:
            return min(self._config.serve.max_tokens, room)
        if asked > room:
            raise RequestError(
                f"max_tokens is {asked}, but the prompt's {prompt_tokens} tokens leave {room} of {self._context}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return asked

    async def _body(self, request: Request) -> bytes:
        limit = self._config.serve.max_body_bytes
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:  # no need to hold more than it takes to know
                break
        return bytes(body)

    async def _guarded(self, request: Request, act: Callable[[Request], Awaitable[Response]]) -> Response:
        """Authenticate, act, and turn whatever fails into an OpenAI error with a request id."""
        request_id = request.headers.get("x-request-id", "")  # Serve gives every request one, and sends it back
        try:
            self._keys.check(request.headers.get("authorization"))
            response = await act(request)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            response = _error_response(_as_request_error(error, request_id))
        path = request.scope["route"].path  # as declared, without what a client wrote into it
        metrics.count("see_requests_total", path=path, status=str(response.status_code))
        return response


async def _together(answers: list[AsyncIterator[T]]) -> AsyncIterator[T]:
    """What several iterators give, as it comes."""
    waiting = {asyncio.ensure_future(anext(answer)): answer for answer in answers}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                answer = waiting.pop(task)
                if isinstance(task.exception(), StopAsyncIteration):
                    continue
                item = task.result()
                waiting[asyncio.ensure_future(anext(answer))] = answer
                yield item
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for answer in answers:
            await answer.aclose()  # type: ignore[attr-defined]


@web.exception_handler(HTTPException)
async def _no_such_page(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}; GET /v1/models and POST /v1/chat/completions exist"
    return _error_response(RequestError(message, error.status_code, code="unknown_url"))


def _count(trace: Trace) -> None:
    """Report a walk to the metrics."""
    metrics.count("see_answers_total", answered_by=trace.answered_by, reason=trace.reason)
    for asked in trace.asked:
        metrics.count("see_decisions_total", expert=asked.expert, decision=asked.decision)
        if asked.p_accept is not None:
            metrics.observe("see_p_accept", asked.p_accept, expert=asked.expert)


def _as_request_error(error: Exception, request_id: str = "") -> RequestError:
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, RequestError):
        return error
    if isinstance(error, BackPressureError):
        return RequestError(
            "too many requests are waiting; try again in a second", 429, "rate_limit_error", code="overloaded"
        )
    if isinstance(error, TimeoutError):
        return RequestError("the request took longer than serve.request_timeout_s", 408, "timeout_error")
    if isinstance(error, DeploymentUnavailableError | ray.exceptions.RayActorError):
        return RequestError("who should answer is not available now; try again", 503, "server_error")
    logger.exception("request %s failed", request_id, exc_info=error)
    return RequestError(f"something failed on the server; its log has the request id {request_id}", 500, "server_error")


def _error_response(error: RequestError) -> Response:
    headers = {"Retry-After": str(error.retry_after_s or 1)} if error.status in (429, 503) else {}
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)
