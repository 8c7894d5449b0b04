"""One Serve replica: the base model with one expert beside it, or alone as the generalist.

Every expert is a Serve application of its own, so that adding or removing one leaves all other
replicas as they are. Replicas on one host map the same base model file. A *spare* has loaded the base
model and waits for an expert, so that one that is published is live without waiting for imports.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from see_ray.config import Config, ServeConfig
from see_ray.cpus import available_cpus
from see_ray.engine.interface import Engine
from see_ray.errors import FingerprintError, SeeError, ServingError
from see_ray.models.activation import Activation
from see_ray.observability import metrics
from see_ray.serving.openai_requests import Sampling
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, Manifest

INGRESS_APP = "see"
GENERALIST_APP = "see-generalist"
NICE = 5
"""Niceness of the thread that computes, beside that of the rest of Serve on the same cores."""

ASK_EVERY_S = 0.5
"""Seconds between a spare's questions which expert it is for."""


def activation_of_manifest(manifest: Manifest) -> Activation:
    """Where a stored expert applies, and its indicator tokens."""
    return Activation(manifest.generation_prompt, manifest.activation_tokens, *manifest.indicator_tokens)


class EngineHost:
    """A process that holds a base model in an engine, and experts of the store beside it.

    Args:
        config: the whole configuration, as JSON.
    """

    def __init__(self, config: dict[str, Any]):
        from see_ray.models.base_model import find, load_tokenizer

        self._config = Config.model_validate(config)
        self._serve = self._config.serve
        self._base = find(self._config.base_model)
        self._tokenizer = load_tokenizer(self._base)
        self._engine = self._made_engine()

    def _made_engine(self) -> Engine:
        settings = self._serve
        if settings.engine == "vllm":
            from see_ray.engine.vllm.engine import VllmEngine

            return VllmEngine(
                self._base, self._config.base_model, **{"threads": settings.replica_threads, **settings.vllm}
            )
        import torch

        from see_ray.engine.engine import EmbeddedEngine

        torch.set_num_threads(settings.replica_threads or max(1, available_cpus() // 2))
        return EmbeddedEngine(
            self._base,
            self._config.base_model,
            prefix_tokens=settings.prefix_tokens,
            kv_gb=settings.kv_gb,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            nice=NICE,
            on_stats=self._measured,
        )

    async def check_health(self) -> None:
        """Fails when the engine's processes died, so that Serve starts this replica anew."""
        if not getattr(self._engine, "running", True):
            raise RuntimeError("the engine's processes ended")

    @property
    def _called(self) -> str:
        """Whose figures this process reports."""
        return "ensemble"

    def _measured(self, what: str, value: float) -> None:
        if what == "rows":
            metrics.observe("see_batch_rows", value, expert=self._called)
        else:
            metrics.count("see_prefix_tokens_total", value, expert=self._called, result=what)

    def _load(self, ref: ExpertRef) -> Manifest:
        """Raises FingerprintError if the expert was fitted on another base model, StoreError, ServingError."""
        from see_ray.engine.interface import Expert
        from see_ray.models.cache import cache_dir

        store = ExpertStore.open(self._config.store.url)
        manifest = store.manifest(ref)
        if manifest.fingerprint != self._base.fingerprint:
            raise FingerprintError(
                f"{manifest.id} was fitted on the base model {manifest.base_model} ({manifest.fingerprint[:12]}); "
                f"this endpoint serves {self._base.name} ({self._base.fingerprint[:12]})"
            )
        folder = store.fetch(manifest.ref, cache_dir(self._config.base_model) / "experts")
        self._engine.load(Expert(manifest.name, folder, activation_of_manifest(manifest)))
        return manifest

    async def _pieces(
        self, prompt: list[int], expert: str | None, max_tokens: int, sampling: Sampling, stream: bool
    ) -> AsyncIterator[Any]:
        """An answer as pieces of text (see `engine.text.Piece`), in two of them where it is not streamed."""
        from see_ray.engine.detokenize import first_and_rest, pieces
        from see_ray.engine.interface import GenerateRequest, SamplingParams

        temperature = self._serve.temperature if sampling.temperature is None else sampling.temperature
        params = SamplingParams(
            max_tokens, temperature, sampling.top_p, (), sampling.seed, sampling.logprobs, sampling.ignore_eos
        )
        tokens = self._engine.generate(GenerateRequest(tuple(prompt), expert, params))
        answer = pieces(tokens, self._tokenizer, max_tokens, sampling.stop)
        async for piece in answer if stream else first_and_rest(answer):
            yield piece


class Replica(EngineHost):
    """Decides and answers for one expert, or answers as the generalist.

    Args:
        config: the whole configuration, as JSON.
        ref: name and version of the expert; None for the generalist.
        spare: name of this application, if it is to ask the deployer which expert it is for.
    """

    def __init__(self, config: dict[str, Any], ref: tuple[str, int] | None, spare: str | None = None):
        self._ref: tuple[str, int] | None = None
        super().__init__(config)
        self._error: SeeError | None = None
        self._ready = asyncio.Event()
        if ref is not None:
            self._become(ref)
        if spare is None:
            self._ready.set()
        else:
            self._waiting = asyncio.get_running_loop().create_task(self._wait_for_expert(spare))

    @property
    def _called(self) -> str:
        return self._ref[0] if self._ref else "generalist"

    def _become(self, ref: tuple[str, int]) -> None:
        self._load(ExpertRef(name=ref[0], version=ref[1]))
        self._ref = ref

    async def _wait_for_expert(self, spare: str) -> None:
        deployer = serve.get_deployment_handle("Deployer", INGRESS_APP)
        while self._ref is None and self._error is None:
            try:
                ref = await deployer.expert_of.remote(spare)
                if ref is not None:
                    await asyncio.to_thread(self._become, ref)
            except SeeError as error:
                self._error = error
            except Exception:  # the deployer is being started anew: it will answer again
                await asyncio.sleep(1)
            await asyncio.sleep(ASK_EVERY_S)
        self._ready.set()

    def about(self) -> dict[str, Any]:
        """Which process this is (a replica that was not restarted keeps its number), whose, and what is wrong."""
        return {"expert": self._ref, "pid": os.getpid(), "error": self._error and str(self._error)}

    async def _name(self) -> str | None:
        """The expert's name, once there is one."""
        await self._ready.wait()
        if self._error is not None:
            raise ServingError(str(self._error))
        return self._ref and self._ref[0]

    async def read(self, prompt: list[int]) -> list[Any]:
        """Keys and values of a prompt (token ids), as arrays, for the replicas that are asked about it."""
        engine: Any = self._engine  # the embedded one: see serve.share_prefix
        return list(await engine.read(prompt))

    def _adopt(self, prompt: list[int], read: list[Any] | None) -> None:
        if read:
            engine: Any = self._engine
            engine.adopt(prompt, read)

    async def decide(self, prompt: list[int], read: list[Any] | None = None) -> float:
        """P(accept) of this expert for a prompt (token ids), of which another replica may have `read` the prefix."""
        name = await self._name()
        assert name is not None, "the generalist decides nothing"
        self._adopt(prompt, read)
        return (await self._engine.decide(prompt, [name]))[0]

    async def generate(
        self, prompt: list[int], max_tokens: int, sampling: Sampling, stream: bool, read: list[Any] | None = None
    ) -> AsyncIterator[Any]:
        """The answer to a prompt (token ids) as pieces of text; see `engine.text.Piece`."""
        name = await self._name()
        self._adopt(prompt, read)
        async for piece in self._pieces(prompt, name, max_tokens, sampling, stream):
            yield piece


def replica_app(config: Config, ref: ExpertRef | None, spare: str | None = None) -> serve.Application:
    """The Serve application of one expert, of the generalist, or of a spare with that name."""
    deployment = serve.deployment(Replica, name="Generalist" if ref is None and spare is None else "Expert")
    options = deployment.options(**replica_options(config.serve))
    return options.bind(config.model_dump(mode="json"), None if ref is None else (ref.name, ref.version), spare)


def replica_options(config: ServeConfig) -> dict[str, Any]:
    """Serve's options for a replica of the base model."""
    options: dict[str, Any] = {
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
        "max_constructor_retry_count": 2,  # what is wrong with an expert does not mend by waiting
        "graceful_shutdown_timeout_s": 20,
        "logging_config": {"encoding": config.log_encoding},
        "ray_actor_options": {"num_cpus": config.replica_cpus, "num_gpus": config.replica_gpus},
    }
    parallel = int(config.vllm.get("tensor_parallel_size", 1)) if config.engine == "vllm" else 1
    if parallel > 1:
        # The replica, and a bundle for each of vLLM's workers, which find themselves in this placement group.
        options["placement_group_bundles"] = [{"CPU": config.replica_cpus}, *[{"GPU": 1.0, "CPU": 0.1}] * parallel]
        options["ray_actor_options"] = {"num_cpus": config.replica_cpus, "num_gpus": 0}
    if config.max_replicas > config.min_replicas:
        options["autoscaling_config"] = {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
            "look_back_period_s": config.look_back_period_s,
            "metrics_interval_s": min(10.0, config.look_back_period_s / 3),
            "upscale_delay_s": config.upscale_delay_s,
            "downscale_delay_s": config.downscale_delay_s,
        }
    else:
        options["num_replicas"] = config.min_replicas
    return options
