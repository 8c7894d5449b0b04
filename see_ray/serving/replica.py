"""A replica of the `per_expert` topology: the base model with one expert, or alone as the generalist.

Each expert is a Serve application of its own, so that adding or removing one leaves all other replicas running.
Replicas on one host map the same base model file. A *spare* has loaded the base model and waits for an expert, so that
a newly published expert is live without waiting for imports.
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
from see_ray.engine.interface import GenerateRequest, PrefixArrays
from see_ray.errors import SeeError, ServingError
from see_ray.routing.chain import GENERALIST
from see_ray.serving.app_names import INGRESS_APP
from see_ray.serving.engine_host import EngineHost, replica_options
from see_ray.store.records import ExpertRef

ASSIGNMENT_POLL_S = 0.5
"""Seconds after which a spare asks the deployer again for its expert."""


class Replica(EngineHost):
    """Decides and answers for one expert, or answers as the generalist.

    Args:
        config: the whole configuration, as JSON.
        ref: name and version of the expert; None for the generalist and for a spare.
        spare: name of this application if it is a spare, which asks the deployer for its expert.
    """

    def __init__(self, config: dict[str, Any], ref: tuple[str, int] | None, spare: str | None = None):
        self._ref: tuple[str, int] | None = None
        super().__init__(config)
        self._error: SeeError | None = None
        self._assigned = asyncio.Event()
        if ref is not None:
            self.assign_expert(ref)
        if spare is None:
            self._assigned.set()
        else:
            self._polling = asyncio.get_running_loop().create_task(self._poll_assignment(spare))

    @property
    def metrics_label(self) -> str:
        """Name of the expert, or `generalist`."""
        return self._ref[0] if self._ref else GENERALIST

    def assign_expert(self, ref: tuple[str, int]) -> None:
        """Load the expert that this replica serves from now on; `ref` is its name and version."""
        self._load_expert(ExpertRef(name=ref[0], version=ref[1]))
        self._ref = ref

    async def _poll_assignment(self, spare: str) -> None:
        deployer = serve.get_deployment_handle("Deployer", INGRESS_APP)
        while self._ref is None and self._error is None:
            try:
                ref = await deployer.expert_of.remote(spare)
                if ref is not None:
                    await asyncio.to_thread(self.assign_expert, ref)
            except SeeError as error:
                self._error = error
            except Exception:  # the deployer is restarting
                await asyncio.sleep(1)
            await asyncio.sleep(ASSIGNMENT_POLL_S)
        self._assigned.set()

    def about(self) -> dict[str, Any]:
        """This process's id, its expert (name and version) if it has one, and why that could not be loaded."""
        return {"expert": self._ref, "pid": os.getpid(), "error": self._error and str(self._error)}

    async def _expert_name(self) -> str | None:
        """Name of the expert, once it is assigned; None for the generalist.

        Raises:
            ServingError: the expert could not be loaded.
        """
        await self._assigned.wait()
        if self._error is not None:
            raise ServingError(str(self._error))
        return self._ref and self._ref[0]

    async def export_prefix(self, prompt: Sequence[int]) -> PrefixArrays:
        """Keys and values of a prompt (token ids), to hand on to the experts' replicas."""
        return await self._engine.export_prefix(prompt)

    async def decide(self, prompt: Sequence[int], prefix: PrefixArrays | None = None) -> float:
        """P(accept) of this expert for a prompt.

        Args:
            prompt: token ids.
            prefix: the prompt's keys and values, if the generalist has exported them.
        """
        name = await self._expert_name()
        assert name is not None, "the generalist makes no decisions"
        if prefix:
            self._engine.import_prefix(prompt, prefix)
        return (await self._engine.decide(prompt, [name]))[0]

    async def generate(self, request: GenerateRequest, prefix: PrefixArrays | None = None) -> AsyncIterator[TextChunk]:
        """The answer of this replica's expert as text. `request.expert` is ignored; `prefix` is as in `decide`."""
        request = replace(request, expert=await self._expert_name())
        if prefix:
            self._engine.import_prefix(request.prompt, prefix)
        async for chunk in self._generate_text(request):
            yield chunk


def replica_app(config: Config, ref: ExpertRef | None, spare: str | None = None) -> serve.Application:
    """Serve application of an expert, of a spare (`spare` is its name), or else of the generalist."""
    deployment = serve.deployment(Replica, name="Generalist" if ref is None and spare is None else "Expert")
    options = deployment.options(**replica_options(config.serve))
    return options.bind(config.model_dump(mode="json"), None if ref is None else (ref.name, ref.version), spare)
