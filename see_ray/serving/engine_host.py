"""A Serve replica's process: the base model in an engine, and experts from the store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any

from see_ray.config import Config, ServeConfig
from see_ray.cpus import available_cpus
from see_ray.engine.detokenize import TextChunk, coalesce_after_first, detokenize
from see_ray.engine.interface import Engine, Expert, GenerateRequest
from see_ray.errors import FingerprintError
from see_ray.models.base_model import find, load_tokenizer
from see_ray.models.cache import cache_dir
from see_ray.observability import metrics
from see_ray.store.expert_files import activation_of_manifest
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, Manifest

NICE = 5
"""Niceness of the engine's thread, so that the rest of Serve on the same cores goes first."""


class EngineHost(ABC):
    """Base of the replicas that hold an engine.

    Args:
        config: the whole configuration, as JSON.
    """

    def __init__(self, config: dict[str, Any]):
        self._config = Config.model_validate(config)
        self._base = find(self._config.base_model)
        self._tokenizer = load_tokenizer(self._base)
        self._engine = self.build_engine()

    @property
    @abstractmethod
    def metrics_label(self) -> str:
        """Value of the label `expert` in this process's metrics."""

    def build_engine(self) -> Engine:
        """Load the base model into the engine that `serve.engine` names.

        Raises:
            ServingError: the engine cannot run this base model, or vLLM is missing.
        """
        settings = self._config.serve
        if settings.engine == "vllm":
            from see_ray.engine.vllm.engine import VllmEngine

            arguments = {"threads": settings.replica_threads, **settings.vllm}
            return VllmEngine(self._base, self._config.base_model, **arguments)
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
            on_stats=self._record_stats,
        )

    async def check_health(self) -> None:
        """Called by Serve, which restarts a replica where this raises."""
        self._engine.check_health()

    def _record_stats(self, name: str, value: float) -> None:
        if name == "rows":
            metrics.observe("see_batch_rows", value, expert=self.metrics_label)
        else:
            metrics.count("see_prefix_tokens_total", value, expert=self.metrics_label, result=name)

    def _load_expert(self, ref: ExpertRef) -> Manifest:
        """Fetch an expert from the store and load it into the engine.

        Raises:
            FingerprintError: the expert was fitted on another base model.
            StoreError: the expert cannot be read.
            ServingError: the engine refuses its adapter.
        """
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

    async def _generate_text(self, request: GenerateRequest) -> AsyncIterator[TextChunk]:
        """The answer as text: chunk by chunk if `request.stream`, else in at most two chunks."""
        tokens = self._engine.generate(request)
        chunks = detokenize(tokens, self._tokenizer, request.sampling.max_tokens, request.sampling.stop)
        async for chunk in chunks if request.stream else coalesce_after_first(chunks):
            yield chunk


def replica_options(config: ServeConfig) -> dict[str, Any]:
    """Options of a Serve deployment whose replicas hold an engine."""
    options: dict[str, Any] = {
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
        "max_constructor_retry_count": 2,  # an expert that does not load will not load later either
        "graceful_shutdown_timeout_s": 20,
        "logging_config": {"encoding": config.log_encoding},
        "ray_actor_options": {"num_cpus": config.replica_cpus, "num_gpus": config.replica_gpus},
    }
    tensor_parallel_size = int(config.vllm.get("tensor_parallel_size", 1)) if config.engine == "vllm" else 1
    if tensor_parallel_size > 1:
        # One bundle for the replica, one for each of vLLM's workers, which join the replica's placement group.
        workers = [{"GPU": 1.0, "CPU": 0.1}] * tensor_parallel_size
        options["placement_group_bundles"] = [{"CPU": config.replica_cpus}, *workers]
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
