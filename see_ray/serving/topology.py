"""How a query gets from the ingress to the experts, in either topology.

per_expert   the chain is walked here, over a deployment handle to each expert's application
shared       one call; the replica that takes it walks the chain inside
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

import ray
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from see_ray.config import ServeConfig
from see_ray.observability.tracing import walk_span
from see_ray.routing.chain import GENERALIST, ChainEntry, ExpertUnavailable, Trace, walk
from see_ray.serving.deployer import Live
from see_ray.serving.openai_requests import Sampling
from see_ray.serving.replica import GENERALIST_APP

GONE = (DeploymentUnavailableError, ray.exceptions.ActorDiedError, ray.exceptions.NodeDiedError)


class Topology(Protocol):
    """Finds who answers a prompt (token ids), and has it answered.

    `who` names an expert or the generalist; None: the chain decides. `live` is one version of the sequence, the
    same for walk and answer, whatever joins or leaves meanwhile.
    """

    async def live(self) -> Live:
        """What can be asked now."""
        ...

    async def route(self, live: Live, prompt: list[int], who: str | None) -> Trace:
        """Who answers, and why."""
        ...

    async def answer(
        self, live: Live, prompt: list[int], who: str | None, max_tokens: int, sampling: Sampling, stream: bool = True
    ) -> tuple[Trace, AsyncIterator[Any]]:
        """The same, and the answer as pieces of text (see `engine.text.Piece`), as they come or, where it is not to
        be streamed, in few."""
        ...


class PerExpert:
    """Each expert is a Serve application of its own."""

    def __init__(self, config: ServeConfig, deployer: DeploymentHandle):
        self._config, self._deployer = config, deployer
        self._handles: dict[str, DeploymentHandle] = {}

    async def live(self) -> Live:
        found: Live = await self._deployer.live.remote()
        return found

    async def route(self, live: Live, prompt: list[int], who: str | None) -> Trace:
        return (await self._walk(live, prompt, who))[0]

    async def answer(
        self, live: Live, prompt: list[int], who: str | None, max_tokens: int, sampling: Sampling, stream: bool = True
    ) -> tuple[Trace, AsyncIterator[Any]]:
        trace, read = await self._walk(live, prompt, who)
        apps = {GENERALIST: GENERALIST_APP, **{expert.name: expert.app for expert in live.experts}}
        handle = self._handle(apps[trace.answered_by]).options(stream=True)
        response = handle.generate.remote(prompt, max_tokens, sampling, stream, read)
        return trace, _within(response, self._config.request_timeout_s)

    async def _walk(self, live: Live, prompt: list[int], who: str | None) -> tuple[Trace, Any]:
        """The trace; and what the generalist has read of the prompt, to be handed on, if it was asked to."""
        if who is not None:
            return Trace.named_by_request(who, live.version), None
        # A response that is passed on without being awaited goes from replica to replica through the object store.
        generalist = self._handle(GENERALIST_APP)
        shares = self._config.share_prefix and self._config.engine == "embedded" and live.shares_prefix
        read = generalist.read.remote(prompt) if shares else None
        apps = {expert.name: expert.app for expert in live.experts}

        async def decide(name: str) -> float:
            try:
                return float(await self._handle(apps[name]).decide.remote(prompt, read))
            except GONE as error:
                raise ExpertUnavailable(f"{name} cannot be asked: {error}") from error

        links = [ChainEntry(expert.name, expert.threshold) for expert in live.experts]
        with walk_span() as span:
            trace = await walk(links, decide, lookahead=self._config.lookahead, sequence_version=live.version)
            span.ended(trace)
        return trace, read

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
        found: Live = await self._handle.live.remote()
        return found

    async def route(self, live: Live, prompt: list[int], who: str | None) -> Trace:
        trace: Trace = await self._handle.route.remote(prompt, who)
        return trace

    async def answer(
        self, live: Live, prompt: list[int], who: str | None, max_tokens: int, sampling: Sampling, stream: bool = True
    ) -> tuple[Trace, AsyncIterator[Any]]:
        response = self._handle.options(stream=True).answer.remote(prompt, who, max_tokens, sampling, stream)
        items = _within(response, self._config.request_timeout_s)
        return await anext(items), items


async def _within(response: Any, seconds: float) -> AsyncIterator[Any]:
    """The items of a streamed response, all of them before a deadline."""
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
        response.cancel()  # a client that is gone frees its place at the replica
