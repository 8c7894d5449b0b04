"""The ingress: HTTP requests in, answers out, the chain in between.

    HTTP ──► Ingress ──► chain ──► expert, expert, … (each a Serve application of its own)
                │                      └─ none accepts ─► generalist
                └─ every second: Deployer.live() ─ in step with the expert store

It checks and tokenizes the request, walks the chain over deployment handles, and passes the
answer on piece by piece.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import ray
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from see_ray import api
from see_ray.activation import encode_prompt
from see_ray.base_model import context_length, find, load_tokenizer
from see_ray.chain import GENERALIST, ExpertUnavailable, Link, Trace, named, walk
from see_ray.config import Config
from see_ray.deployer import Live
from see_ray.errors import RequestError
from see_ray.replica import GENERALIST_APP

logger = logging.getLogger("ray.serve")

LIVE_EVERY_S = 0.5
"""Seconds between the ingress's questions to the deployer."""

web = FastAPI(title="see_ray", docs_url=None, redoc_url=None, openapi_url=None)


class Ingress:
    """Answers HTTP requests; see the module's docstring.

    `serving` makes a Serve ingress of it. Doing that here, as a decorator, would have Serve pickle
    the routes by value, before the functions below exist.

    Args:
        config: the whole configuration, as JSON.
        keys: of which a request must bring one, if there are any.
        deployer: handle of the :class:`Deployer`.
    """

    def __init__(self, config: dict[str, Any], keys: api.ApiKeys, deployer: DeploymentHandle):
        self._config = Config.model_validate(config)
        self._keys = keys
        self._base = find(self._config.base_model)
        self._context = context_length(self._base, self._config.base_model)
        self._tokenizer = load_tokenizer(self._base)
        self._deployer = deployer
        self._live = Live()
        self._handles: dict[str, DeploymentHandle] = {}
        self._follow = asyncio.get_running_loop().create_task(self._follow_deployer())

    async def _follow_deployer(self) -> None:
        while True:
            try:
                self._live = await self._deployer.live.remote()
            except (RayServeException, ray.exceptions.RayError) as error:
                logger.warning("the deployer does not answer, going on with what is live: %s", error)
            await asyncio.sleep(LIVE_EVERY_S if self._live.version >= 0 else 0.1)

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

    # --- what they do --------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        body = api.parse(api.ChatRequest, await self._body(request), self._config.serve.max_body_bytes)
        return await self._answer(body, body.chat(), "chatcmpl", api.chat_chunk, api.chat_body)

    async def _completion(self, request: Request) -> Response:
        body = api.parse(api.CompletionRequest, await self._body(request), self._config.serve.max_body_bytes)
        # Experts know chats only, so a bare prompt is one user turn.
        chat = [{"role": "user", "content": body.prompt}]
        return await self._answer(body, chat, "cmpl", api.completion_chunk, api.completion_body)

    async def _answer(self, body: Any, chat: list[dict[str, str]], kind: Any, chunk: Any, whole: Any) -> Response:
        prompt = self._encode(chat)
        sampling = body.sampling()
        max_tokens = self._room(len(prompt), sampling.max_tokens)
        live = self._live  # one version for walk and answer, whatever joins or leaves meanwhile
        trace = await self._find(live, api.parse_model(body.model), prompt, body.model)
        answer = self._generate(live, trace.answered_by, prompt, max_tokens, sampling)
        first = await anext(answer)  # what fails before the first piece is an HTTP error, not half an answer
        head: api.Head = {"id": api.new_id(kind), "model": body.model, "created": int(time.time())}
        headers = {"x-see-expert": trace.answered_by}
        if body.stream:
            events = self._events(first, answer, trace, len(prompt), chunk, head, body.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        text, last = first.text, first
        async for piece in answer:
            text, last = text + piece.text, piece
        usage = api.usage_body(prompt_tokens=len(prompt), completion_tokens=last.tokens)
        content = whole(text=text, finish_reason=last.finish_reason, usage=usage, see=trace.body(), **head)
        return JSONResponse(content, headers=headers)

    async def _events(
        self, first: Any, answer: AsyncIterator[Any], trace: Trace, prompt_tokens: int, chunk: Any, head: api.Head,
        include_usage: bool,
    ) -> AsyncIterator[str]:  # fmt: skip
        last = chunk(first.text, first.finish_reason, see=trace.body(), **head)
        tokens = first.tokens
        try:
            yield api.sse(last)
            async for piece in answer:
                last, tokens = chunk(piece.text, piece.finish_reason, **head), piece.tokens
                yield api.sse(last)
            if include_usage:
                usage = api.usage_body(prompt_tokens=prompt_tokens, completion_tokens=tokens)
                yield api.sse(api.usage_chunk(last, usage))
        except Exception as error:
            yield api.sse(api.error_body(_as_request_error(error)))
        yield api.SSE_DONE

    async def _route(self, request: Request) -> Response:
        body = api.parse(api.RouteRequest, await self._body(request), self._config.serve.max_body_bytes)
        prompt = self._encode(body.chat() or [{"role": "user", "content": body.prompt or ""}])
        trace = await self._find(self._live, api.parse_model(body.model), prompt, body.model)
        content = {"object": "see.trace", "model": body.model, "prompt_tokens": len(prompt), "see": trace.body()}
        return JSONResponse(content, headers={"x-see-expert": trace.answered_by})

    async def _list(self, request: Request) -> Response:
        return JSONResponse(api.models_body(self._entries()))

    async def _show(self, request: Request) -> Response:
        wanted = request.path_params["model"]
        for entry in api.models_body(self._entries())["data"]:
            if entry["id"] == wanted:
                return JSONResponse(entry)
        raise api.unknown_model(wanted)

    def _entries(self) -> list[api.ModelEntry]:
        base = self._base.name
        created = max((expert.created for expert in self._live.experts), default=0)
        experts = [api.ModelEntry(f"see:{e.name}", e.created, base, "see:generalist") for e in self._live.experts]
        return [api.ModelEntry("see", created, base), *experts, api.ModelEntry("see:generalist", 0, base)]

    # --- the walk and the answer ------------------------------------------------------------

    async def _find(self, live: Live, target: api.Target, prompt: list[int], model: str) -> Trace:
        if live.version < 0:
            raise RequestError("the endpoint is still starting; try again in a few seconds", 503, "server_error")
        if target.kind == "generalist":
            return named(GENERALIST, live.version)
        if target.expert is not None:
            if target.expert not in [expert.name for expert in live.experts]:
                raise api.unknown_model(model)
            return named(target.expert, live.version)
        links = [Link(expert.name, expert.threshold) for expert in live.experts]
        apps = {expert.name: expert.app for expert in live.experts}

        async def decide(name: str) -> float:
            try:
                return float(await self._handle(apps[name]).decide.remote(prompt))
            except (DeploymentUnavailableError, ray.exceptions.ActorDiedError, ray.exceptions.NodeDiedError) as error:
                raise ExpertUnavailable(f"{name} cannot be asked: {error}") from error

        lookahead = self._config.serve.lookahead
        return await walk(links, decide, lookahead=lookahead, sequence_version=live.version)

    async def _generate(
        self, live: Live, who: str, prompt: list[int], max_tokens: int, sampling: api.Sampling
    ) -> AsyncIterator[Any]:
        apps = {GENERALIST: GENERALIST_APP, **{expert.name: expert.app for expert in live.experts}}
        handle = self._handle(apps[who]).options(stream=True)
        response = handle.generate.remote(prompt, max_tokens, sampling)
        deadline = time.monotonic() + self._config.serve.request_timeout_s
        try:
            while True:
                async with asyncio.timeout(deadline - time.monotonic()):
                    try:
                        piece = await anext(response)
                    except StopAsyncIteration:
                        return
                yield piece
        finally:
            response.cancel()  # a client that is gone frees its place at the replica

    def _handle(self, app: str) -> DeploymentHandle:
        if app not in self._handles:
            self._handles[app] = serve.get_app_handle(app)
        return self._handles[app]

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
            return await act(request)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            return _error_response(_as_request_error(error, request_id))


@web.exception_handler(HTTPException)
async def _no_such_page(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}; GET /v1/models and POST /v1/chat/completions exist"
    return _error_response(RequestError(message, error.status_code, code="unknown_url"))


def _as_request_error(error: Exception, request_id: str = "") -> RequestError:
    if isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    if isinstance(error, RequestError):
        return error
    if isinstance(error, BackPressureError):
        return RequestError("too many requests are waiting; try again in a second", 429, "rate_limit_error")
    if isinstance(error, TimeoutError):
        return RequestError("the request took longer than serve.request_timeout_s", 408, "timeout_error")
    if isinstance(error, DeploymentUnavailableError | ray.exceptions.RayActorError):
        return RequestError("who should answer is not available now; try again", 503, "server_error")
    logger.exception("request %s failed", request_id, exc_info=error)
    return RequestError(f"something failed on the server; its log has the request id {request_id}", 500, "server_error")


def _error_response(error: RequestError) -> Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
    return JSONResponse(api.error_body(error), status_code=error.status, headers=headers)
