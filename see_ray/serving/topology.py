"""How a query gets from the ingress to the experts, in either topology.

per_expert   the ingress walks the chain, over a deployment handle to each expert's application
shared       one call to the ensemble; the replica that takes it walks the chain
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import ray
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from see_ray.config import ServeConfig
from see_ray.engine.detokenize import TextChunk
from see_ray.engine.interface import GenerateRequest
from see_ray.observability.tracing import walk_span
from see_ray.routing.chain import GENERALIST, ChainEntry, ExpertUnavailable, Trace, walk
from see_ray.serving.app_names import GENERALIST_APP
from see_ray.serving.live import Live

UNAVAILABLE = (DeploymentUnavailableError, ray.exceptions.ActorDiedError, ray.exceptions.NodeDiedError)


class Topology(Protocol):
    """Routes a prompt, and has it answered.

    In both methods `answerer` is the expert, or `generalist`, that the request names; None: the chain decides. `live`
    is one version of the sequence; walk and answer use the same one, even if a newer version goes live in between.
    """

    async def live(self) -> Live:
        """What can be queried now."""
        ...

    async def route(self, live: Live, prompt: Sequence[int], answerer: str | None) -> Trace:
        """Who answers a prompt (token ids), and why."""
        ...

    async def answer(
        self, live: Live, request: GenerateRequest, answerer: str | None
    ) -> tuple[Trace, AsyncGenerator[TextChunk, None]]:
        """Route a request, and start its answer. `request.expert` is ignored.

        The generator raises TimeoutError where the whole answer takes longer than `serve.request_timeout_s`.
        """
        ...


class PerExpert:
    """Each expert is a Serve application of its own."""

    def __init__(self, config: ServeConfig, deployer: DeploymentHandle):
        self._config, self._deployer = config, deployer
        self._handles: dict[str, DeploymentHandle] = {}

    async def live(self) -> Live:
        live: Live = await self._deployer.live.remote()
        return live

    async def route(self, live: Live, prompt: Sequence[int], answerer: str | None) -> Trace:
        return (await self._walk(live, prompt, answerer))[0]

    async def answer(
        self, live: Live, request: GenerateRequest, answerer: str | None
    ) -> tuple[Trace, AsyncGenerator[TextChunk, None]]:
        trace, prefix = await self._walk(live, request.prompt, answerer)
        apps = {GENERALIST: GENERALIST_APP, **{expert.name: expert.app for expert in live.experts}}
        expert = None if trace.answered_by == GENERALIST else trace.answered_by
        handle = self._handle(apps[trace.answered_by]).options(stream=True)
        response = handle.generate.remote(replace(request, expert=expert), prefix)
        return trace, _with_deadline(response, self._config.request_timeout_s)

    async def _walk(
        self, live: Live, prompt: Sequence[int], answerer: str | None
    ) -> tuple[Trace, DeploymentResponse | None]:
        """The trace, and the prompt's keys and values if the generalist was asked to export them."""
        if answerer is not None:
            return Trace.named_by_request(answerer, live.version), None
        # A response that is passed on without being awaited goes from replica to replica through the object store.
        generalist = self._handle(GENERALIST_APP)
        shares = self._config.share_prefix and self._config.engine == "embedded" and live.shares_prefix
        prefix = generalist.export_prefix.remote(prompt) if shares else None
        apps = {expert.name: expert.app for expert in live.experts}

        async def decide(name: str) -> float:
            try:
                return float(await self._handle(apps[name]).decide.remote(prompt, prefix))
            except UNAVAILABLE as error:
                raise ExpertUnavailable(f"{name} is not available: {error}") from error

        entries = [ChainEntry(expert.name, expert.threshold) for expert in live.experts]
        with walk_span() as span:
            trace = await walk(entries, decide, lookahead=self._config.lookahead, sequence_version=live.version)
            span.record(trace)
        return trace, prefix

    def _handle(self, app: str) -> DeploymentHandle:
        if app not in self._handles:
            self._handles[app] = serve.get_app_handle(app)
        return self._handles[app]


class Shared:
    """Every replica holds all experts."""

    def __init__(self, config: ServeConfig, app: str):
        self._config = config
        self._handle = serve.get_app_handle(app)

    async def live(self) -> Live:
        live: Live = await self._handle.live.remote()
        return live

    async def route(self, live: Live, prompt: Sequence[int], answerer: str | None) -> Trace:
        trace: Trace = await self._handle.route.remote(prompt, answerer)
        return trace

    async def answer(
        self, live: Live, request: GenerateRequest, answerer: str | None
    ) -> tuple[Trace, AsyncGenerator[TextChunk, None]]:
        response = self._handle.options(stream=True).answer.remote(request, answerer)
        items = _with_deadline(response, self._config.request_timeout_s)
        trace: Trace = await anext(items)  # the ensemble streams it before the answer
        return trace, items


async def _with_deadline(response: Any, seconds: float) -> AsyncGenerator[Any, None]:
    """The items of a streamed response; TimeoutError if they take longer than `seconds` in all."""
    deadline = time.monotonic() + seconds
    try:
        while True:
            async with asyncio.timeout(deadline - time.monotonic()):
                try:
                    item = await anext(response)
                except StopAsyncIteration:
                    return
            yield item
    finally:
        response.cancel()  # the client may have gone: free the replica
