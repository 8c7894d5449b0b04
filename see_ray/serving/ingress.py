"""The ingress: HTTP requests in, answers out.

    HTTP ──► Ingress ──► topology ──► experts, generalist
                ▲
                └── what is live, every LIVE_POLL_S

It authenticates, validates and tokenizes a request, has it routed and answered by the topology, and returns the answer
in OpenAI's format.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from see_ray.config import Config
from see_ray.engine.detokenize import TextChunk
from see_ray.engine.interface import GenerateRequest, SamplingParams
from see_ray.errors import RequestError
from see_ray.models.activation import encode_prompt
from see_ray.models.base_model import context_length, find, load_tokenizer
from see_ray.observability import metrics
from see_ray.routing.chain import GENERALIST, Trace
from see_ray.serving.admission_control import AdmissionController
from see_ray.serving.answer_stream import CHAT, COMPLETION, AnswerStream, EndpointFormat, choice_chunks, merge
from see_ray.serving.api_keys import ApiKeys
from see_ray.serving.app_names import ENSEMBLE_APP
from see_ray.serving.http_errors import as_request_error, error_response, unknown_url
from see_ray.serving.live import Live
from see_ray.serving.openai_requests import (
    ChatRequest,
    CompletionRequest,
    GenerationBody,
    RouteRequest,
    parse,
    parse_model,
    unknown_model,
)
from see_ray.serving.openai_responses import Head, ModelEntry, models_body, new_id
from see_ray.serving.request_stats import RequestStats, record_walk
from see_ray.serving.topology import PerExpert, Shared, Topology

logger = logging.getLogger("ray.serve")

LIVE_POLL_S = 0.5
"""Seconds after which the ingress asks again what is live."""

web = FastAPI(title="see_ray", docs_url=None, redoc_url=None, openapi_url=None)
web.add_exception_handler(HTTPException, unknown_url)


def guarded(endpoint: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
    """Wrap an endpoint of `Ingress`: authenticate, answer exceptions in OpenAI's format, count the request."""

    @functools.wraps(endpoint)
    async def wrapper(self: Ingress, request: Request, **path_params: str) -> Response:
        request_id = request.headers.get("x-request-id", "")  # Serve sets it, and returns it to the client
        try:
            self.keys.check(request.headers.get("authorization"))
            response = await endpoint(self, request, **path_params)
        except Exception as error:
            response = error_response(as_request_error(error, request_id))
        path = request.scope["route"].path  # as declared, since what a client sends would make endless labels
        metrics.count("see_requests_total", path=path, status=str(response.status_code))
        return response

    return wrapper


class Ingress:
    """The HTTP endpoints.

    `endpoint.ingress_app` makes a Serve ingress of this class. As a decorator here, Serve would pickle the routes by
    value before this module is complete.

    Args:
        config: the whole configuration, as JSON.
        keys: API keys of the endpoint.
        deployer: handle of the `serving.deployer.Deployer`; None in the `shared` topology.
    """

    def __init__(self, config: dict[str, Any], keys: ApiKeys, deployer: DeploymentHandle | None):
        self.keys = keys
        parsed = Config.model_validate(config)
        self._settings = parsed.serve
        self._base = find(parsed.base_model)
        self._context_length = context_length(self._base, parsed.base_model)
        self._tokenizer = load_tokenizer(self._base)
        self._topology: Topology = (
            PerExpert(self._settings, deployer) if deployer else Shared(self._settings, ENSEMBLE_APP)
        )
        self._live = Live()
        self._admission = AdmissionController(self._settings.max_wait_s)
        self._polling = asyncio.get_running_loop().create_task(self._poll_live())

    async def _poll_live(self) -> None:
        while True:
            try:
                self._live = (await self._topology.live()).or_earlier(self._live)
                self._report_gauges()
            except (RayServeException, ray.exceptions.RayError) as error:
                logger.warning("cannot ask what is live, continuing with sequence %d: %s", self._live.version, error)
            await asyncio.sleep(LIVE_POLL_S if self._live.version >= 0 else 0.1)

    def _report_gauges(self) -> None:
        metrics.set_gauge("see_sequence_version", self._live.version)
        metrics.set_gauge("see_live_experts", len(self._live.experts))
        metrics.set_gauge("see_failed_experts", len(self._live.failed))
        metrics.set_gauge("see_waiting_requests", self._admission.waiting)
        metrics.set_gauge("see_expected_wait_seconds", self._admission.expected_wait_s())

    # --- endpoints -----------------------------------------------------------------------

    @web.post("/v1/chat/completions")
    @guarded
    async def chat_completions(self, request: Request) -> Response:
        body = parse(ChatRequest, await self._read_body(request), self._settings.max_body_bytes)
        return await self._answer(body, body.chat(), CHAT)

    @web.post("/v1/completions")
    @guarded
    async def completions(self, request: Request) -> Response:
        body = parse(CompletionRequest, await self._read_body(request), self._settings.max_body_bytes)
        return await self._answer(body, body.chat(), COMPLETION)

    @web.post("/v1/route")
    @guarded
    async def route(self, request: Request) -> Response:
        body = parse(RouteRequest, await self._read_body(request), self._settings.max_body_bytes)
        with self._admission.admit():
            prompt = self._encode(body.chat())
            live = self._live
            trace = await self._topology.route(live, prompt, self._named_answerer(live, body.model))
        record_walk(trace)
        content = {"object": "see.trace", "model": body.model, "prompt_tokens": len(prompt), "see": trace.body()}
        return JSONResponse(content, headers={"x-see-expert": trace.answered_by})

    @web.get("/v1/models")
    @guarded
    async def models(self, request: Request) -> Response:
        return JSONResponse(models_body(self._model_entries()))

    @web.get("/v1/models/{model:path}")
    @guarded
    async def model(self, request: Request, model: str) -> Response:
        for entry in models_body(self._model_entries())["data"]:
            if entry["id"] == model:
                return JSONResponse(entry)
        raise unknown_model(model)

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
    @guarded
    async def metrics(self, request: Request) -> Response:
        return Response(await metrics.scrape(), media_type="text/plain; version=0.0.4")

    # --- answering -----------------------------------------------------------------------

    async def _answer(self, body: GenerationBody, chat: list[dict[str, str]], format: EndpointFormat) -> Response:
        started = time.perf_counter()
        with self._admission.admit():
            prompt = self._encode(chat)
            sampling = self._sampling_params(body, len(prompt))
            live = self._live  # one version for walk and answer
            request = GenerateRequest(prompt, sampling=sampling, stream=body.stream)
            answerer = self._named_answerer(live, body.model)
            trace, answers = await self._start_answers(live, request, answerer, body.n)
            logprobs = None if sampling.logprobs is None else format.logprobs
            chunks = [choice_chunks(answer, i, self._tokenizer, logprobs) for i, answer in enumerate(answers)]
            merged = merge(chunks)
            first = await anext(merged)  # a failure before the first chunk has an HTTP status of its own
        stats = RequestStats(format.path, started, trace, len(prompt))
        stats.first_chunk_arrived()
        head: Head = {"id": new_id(format.id_prefix), "model": body.model, "created": int(time.time())}
        stream = AnswerStream(first, merged, format, head, stats)
        headers = {"x-see-expert": trace.answered_by}
        if body.stream:
            events = stream.events(body.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        return JSONResponse(await stream.body(), headers=headers)

    async def _start_answers(
        self, live: Live, request: GenerateRequest, answerer: str | None, n: int
    ) -> tuple[Trace, list[AsyncGenerator[TextChunk, None]]]:
        """Route a request and start `n` answers to it, all by the same expert, each with a seed of its own."""
        trace, answer = await self._topology.answer(live, request, answerer)
        answers = [answer]
        for index in range(1, n):
            seed = None if request.sampling.seed is None else request.sampling.seed + index
            again = replace(request, sampling=replace(request.sampling, seed=seed))
            answers.append((await self._topology.answer(live, again, trace.answered_by))[1])
        return trace, answers

    def _encode(self, chat: list[dict[str, str]]) -> tuple[int, ...]:
        """Token ids of a chat.

        Raises:
            RequestError: 400, they do not fit into the context.
        """
        prompt = encode_prompt(self._tokenizer, chat)
        if len(prompt) >= self._context_length:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; this model's context length is {self._context_length}, "
                "answer included",
                param="messages",
                code="context_length_exceeded",
            )
        return tuple(prompt)

    def _sampling_params(self, body: GenerationBody, prompt_tokens: int) -> SamplingParams:
        """How the answer is sampled, with the server's defaults for what the body leaves out.

        Raises:
            RequestError: 400, prompt and answer do not fit into the context.
        """
        room = self._context_length - prompt_tokens
        max_tokens = body.token_limit
        if max_tokens is None:
            max_tokens = min(self._settings.max_tokens, room)
        elif max_tokens > room:
            raise RequestError(
                f"max_tokens is {max_tokens}, but the prompt's {prompt_tokens} tokens leave {room} of "
                f"{self._context_length}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        return body.to_sampling_params(max_tokens, self._settings.temperature)

    def _named_answerer(self, live: Live, model: str) -> str | None:
        """The expert, or the generalist, that a model id names; None: the chain decides.

        Raises:
            RequestError: 503 while the endpoint starts, 404 for an unknown model.
        """
        target = parse_model(model)
        if live.version < 0:
            raise RequestError("the endpoint is still starting; try again in a few seconds", 503, "server_error")
        if target.kind == "generalist":
            return GENERALIST
        if target.expert is not None and target.expert not in [expert.name for expert in live.experts]:
            raise unknown_model(model)
        return target.expert

    def _model_entries(self) -> list[ModelEntry]:
        base, experts = self._base.name, self._live.experts
        return [
            ModelEntry("see", max((expert.created for expert in experts), default=0), base),
            *(ModelEntry(f"see:{expert.name}", expert.created, base, "see:generalist") for expert in experts),
            ModelEntry("see:generalist", 0, base),
        ]

    async def _read_body(self, request: Request) -> bytes:
        """The body; reading stops beyond `max_body_bytes`, where `parse` rejects it."""
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self._settings.max_body_bytes:
                break
        return bytes(body)
