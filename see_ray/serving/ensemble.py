"""The replica of the `shared` topology: the base model with all experts of the sequence.

Each replica polls the expert store. It decides for all experts in one batch; the expert that answers, or the
generalist, continues from the same keys and values. All replicas hold the same experts, so Serve can add and remove
replicas with the load.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

from ray import serve

from see_ray.config import Config
from see_ray.engine.detokenize import TextChunk
from see_ray.engine.interface import GenerateRequest
from see_ray.errors import SeeError
from see_ray.observability.tracing import walk_span
from see_ray.routing.chain import GENERALIST, ChainEntry, Trace, walk
from see_ray.serving.app_names import ENSEMBLE_APP
from see_ray.serving.engine_host import EngineHost, replica_options
from see_ray.serving.live import LINGER_S, Live, LiveExpert
from see_ray.serving.store_follower import StoreFollower
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, ExpertSequence


class Ensemble(EngineHost):
    """All experts, and the generalist, in one process.

    Args:
        config: the whole configuration, as JSON.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self._loaded: dict[str, LiveExpert] = {}  # by name
        self._ids: dict[str, str] = {}  # name: id of the version that is loaded
        self._unneeded: dict[str, float] = {}  # name: since when no live version lists it
        self._follower = StoreFollower(
            self._config.store.url, self._config.serve.poll_s, self._load_version, self._unload_unneeded
        )
        self._following = asyncio.get_running_loop().create_task(self._follower.run())

    @property
    def metrics_label(self) -> str:
        return "ensemble"

    async def live(self) -> Live:
        """What this replica serves; version -1 until it has read the store."""
        return self._follower.live

    def about(self) -> dict[str, Any]:
        """This process's id."""
        return {"pid": os.getpid()}

    async def route(self, prompt: Sequence[int], answerer: str | None = None) -> Trace:
        """Who answers a prompt, and why.

        Args:
            prompt: token ids.
            answerer: an expert, or `generalist`, that the request names; None: the chain decides.
        """
        # A replica that has just started knows no experts yet, and the generalist would answer everything.
        await self._follower.ready.wait()
        live = self._follower.live
        if answerer is not None:
            return Trace.named_by_request(answerer, live.version)
        names = [expert.name for expert in live.experts]
        decisions = asyncio.ensure_future(self._engine.decide(prompt, names, fallback=True))

        async def decide(name: str) -> float:
            return (await decisions)[names.index(name)]

        entries = [ChainEntry(expert.name, expert.threshold) for expert in live.experts]
        try:
            with walk_span() as span:
                # All experts are asked in one batch; the walk reads their decisions in order.
                trace = await walk(entries, decide, sequence_version=live.version)
                span.record(trace)
            return trace
        finally:
            decisions.cancel()

    async def answer(self, request: GenerateRequest, answerer: str | None) -> AsyncIterator[Trace | TextChunk]:
        """The trace, then the answer as text; `answerer` is as in `route`, and `request.expert` is ignored."""
        trace = await self.route(request.prompt, answerer)
        yield trace
        expert = None if trace.answered_by == GENERALIST else trace.answered_by
        async for chunk in self._generate_text(replace(request, expert=expert)):
            yield chunk

    async def check_health(self) -> None:
        await super().check_health()
        if self._following.done():
            raise RuntimeError("the task that follows the expert store ended")

    async def _load_version(self, head: ExpertSequence, store: ExpertStore) -> Live:
        """Load the experts of a sequence version that are not loaded yet."""
        failed: dict[str, str] = {}
        for ref in head.experts:
            self._unneeded.pop(ref.name, None)
            if self._ids.get(ref.name) != ref.id:
                try:
                    await self._add_expert(ref)
                except SeeError as error:
                    failed[ref.id] = str(error)
        now, names = asyncio.get_running_loop().time(), {ref.name for ref in head.experts}
        self._unneeded |= dict.fromkeys(self._ids.keys() - names - self._unneeded.keys(), now)
        experts = [self._loaded[ref.name] for ref in head.newest_first() if ref.id not in failed]
        return Live(head.version, tuple(experts), failed)

    async def _add_expert(self, ref: ExpertRef) -> None:
        manifest = await asyncio.to_thread(self._load_expert, ref)
        created = int(manifest.created_at.timestamp())
        self._loaded[ref.name] = LiveExpert(ref.name, ref.version, manifest.threshold, created, ENSEMBLE_APP)
        self._ids[ref.name] = ref.id

    async def _unload_unneeded(self) -> None:
        """Unload experts that no live version has listed for LINGER_S, when no query can still need them."""
        now = asyncio.get_running_loop().time()
        for name, since in list(self._unneeded.items()):
            if now - since > LINGER_S:
                await asyncio.to_thread(self._engine.unload, name)
                del self._unneeded[name], self._ids[name]


def ensemble_app(config: Config) -> serve.Application:
    """Serve application of the `shared` topology's replicas."""
    deployment = serve.deployment(Ensemble, name="Ensemble").options(**replica_options(config.serve))
    return deployment.bind(config.model_dump(mode="json"))
