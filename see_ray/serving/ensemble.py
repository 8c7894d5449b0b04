"""The replica of the `shared` topology: the base model with all experts of the sequence.

It keeps in step with the expert store by itself, decides for all experts in one batch, and the winner, or the
generalist, goes on from the same keys and values. Replicas are alike; Serve adds and removes them with the load.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from see_ray.config import Config
from see_ray.errors import SeeError
from see_ray.observability.tracing import walk_span
from see_ray.routing.chain import GENERALIST, ChainEntry, Trace, named, walk
from see_ray.serving.deployer import LINGER_S, Live, LiveExpert
from see_ray.serving.openai_requests import Sampling
from see_ray.serving.replica import EngineHost, replica_options
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, ExpertSequence

logger = logging.getLogger("ray.serve")

ENSEMBLE_APP = "see-ensemble"


class Ensemble(EngineHost):
    """All experts, and the generalist, in one process.

    Args:
        config: the whole configuration, as JSON.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__(config)
        self._live = Live()
        self._loaded: dict[str, LiveExpert] = {}  # by name
        self._ids: dict[str, str] = {}  # name: id of the version that is loaded
        self._unneeded: dict[str, float] = {}
        self._looked = asyncio.Event()
        self._loop = asyncio.get_running_loop().create_task(self._keep_up())

    async def live(self) -> Live:
        """What this replica walks now; version -1 as long as it has not read the store."""
        return self._live

    def about(self) -> dict[str, Any]:
        """Which process this is."""
        return {"pid": os.getpid()}

    async def route(self, prompt: list[int], expert: str | None = None) -> Trace:
        """Who answers a prompt (token ids), and why; `expert` names one, or the generalist."""
        await self._looked.wait()  # a replica that has just started would pass everything to the generalist
        if expert is not None:
            return named(expert, self._live.version)
        live = self._live
        names = [one.name for one in live.experts]
        together = asyncio.ensure_future(self._engine.decide(prompt, names, fallback=True))

        async def decide(name: str) -> float:
            return (await together)[names.index(name)]

        links = [ChainEntry(one.name, one.threshold) for one in live.experts]
        try:
            with walk_span() as span:
                # All are asked at once; the walk reads their decisions in order.
                trace = await walk(links, decide, sequence_version=live.version)
                span.ended(trace)
            return trace
        finally:
            together.cancel()

    async def answer(
        self, prompt: list[int], expert: str | None, max_tokens: int, sampling: Sampling, stream: bool
    ) -> AsyncIterator[Any]:
        """The trace, then the answer as pieces of text; see `engine.text.Piece`."""
        trace = await self.route(prompt, expert)
        yield trace
        who = None if trace.answered_by == GENERALIST else trace.answered_by
        async for piece in self._pieces(prompt, who, max_tokens, sampling, stream):
            yield piece

    async def check_health(self) -> None:
        """Fails when the loop or the engine died, so that Serve starts this replica anew."""
        await super().check_health()
        if self._loop.done():
            raise RuntimeError("the loop that follows the expert store ended")

    async def _keep_up(self) -> None:
        while True:
            try:
                await self._look()
            except SeeError as error:  # what is loaded goes on answering; the store may come back
                logger.warning("expert store: %s", error)
                self._live = self._live.with_(store_error=str(error))
            except Exception:
                logger.exception("could not keep in step with the expert store")
            await asyncio.sleep(self._serve.poll_s)

    async def _look(self) -> None:
        store = await asyncio.to_thread(ExpertStore.open, self._config.store.url)
        head = await asyncio.to_thread(store.head)
        if head.version != self._live.version:
            self._live = self._live.with_(pending=head.version)
            await self._adopt(head)
        elif self._live.store_error:
            self._live = self._live.with_(store_error=None)
        now = asyncio.get_running_loop().time()
        for name, since in list(self._unneeded.items()):
            if now - since > LINGER_S:  # no walk of an older version can still be at it
                await asyncio.to_thread(self._engine.unload, name)
                del self._unneeded[name], self._ids[name]

    async def _adopt(self, head: ExpertSequence) -> None:
        failed: dict[str, str] = {}
        for ref in head.experts:
            self._unneeded.pop(ref.name, None)
            if self._ids.get(ref.name) != ref.id:
                try:
                    await self._take_in(ref)
                except SeeError as error:
                    failed[ref.id] = str(error)
        experts = [self._loaded[ref.name] for ref in head.newest_first() if ref.id not in failed]
        self._live = Live(head.version, tuple(experts), failed)
        self._looked.set()
        now, names = asyncio.get_running_loop().time(), {ref.name for ref in head.experts}
        self._unneeded |= dict.fromkeys(self._ids.keys() - names - self._unneeded.keys(), now)

    async def _take_in(self, ref: ExpertRef) -> None:
        manifest = await asyncio.to_thread(self._load, ref)
        created = int(manifest.created_at.timestamp())
        self._loaded[ref.name] = LiveExpert(ref.name, ref.version, manifest.threshold, created, ENSEMBLE_APP)
        self._ids[ref.name] = ref.id


def ensemble_app(config: Config) -> serve.Application:
    """The Serve application of the `shared` topology's replicas."""
    deployment = serve.deployment(Ensemble, name="Ensemble").options(**replica_options(config.serve))
    return deployment.bind(config.model_dump(mode="json"))
