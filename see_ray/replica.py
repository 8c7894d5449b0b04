"""One Serve replica: the base model with one expert beside it, or alone as the generalist.

Every expert is a Serve application of its own, so that adding or removing one leaves all other
replicas as they are. Replicas on one host map the same base model file.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from see_ray.activation import Activation
from see_ray.api import Sampling
from see_ray.config import Config, ServeConfig
from see_ray.errors import FingerprintError
from see_ray.store import ExpertRef, ExpertStore, Manifest


def activation_of_manifest(manifest: Manifest) -> Activation:
    """Where a stored expert applies, and its indicator tokens."""
    return Activation(manifest.generation_prompt, manifest.activation_tokens, *manifest.indicator_tokens)


class Replica:
    """Decides and answers for one expert, or answers as the generalist.

    Args:
        config: the whole configuration, as JSON.
        ref: name and version of the expert; None for the generalist.

    Raises:
        FingerprintError: the expert was fitted on another base model.
    """

    def __init__(self, config: dict[str, Any], ref: tuple[str, int] | None):
        import torch

        from see_ray.base_model import cache_dir, find, load_tokenizer
        from see_ray.engine.embedded import EmbeddedEngine, Expert

        settings = Config.model_validate(config)
        self._serve = settings.serve
        torch.set_num_threads(self._serve.replica_threads or max(1, (os.cpu_count() or 1) // 2))
        base = find(settings.base_model)
        self._expert: str | None = None
        if ref is not None:
            store = ExpertStore.open(settings.store.url)
            manifest = store.manifest(ExpertRef(name=ref[0], version=ref[1]))
            if manifest.fingerprint != base.fingerprint:
                raise FingerprintError(
                    f"{manifest.id} was fitted on the base model {manifest.base_model} "
                    f"({manifest.fingerprint[:12]}); this endpoint serves {base.name} ({base.fingerprint[:12]})"
                )
            folder = store.fetch(manifest.ref, cache_dir(settings.base_model) / "experts")
        self._tokenizer = load_tokenizer(base)
        self._engine = EmbeddedEngine(base, settings.base_model, prefix_tokens=self._serve.prefix_tokens)
        if ref is not None:
            self._expert = manifest.name
            self._engine.load(Expert(manifest.name, folder, activation_of_manifest(manifest)))

    def about(self) -> dict[str, Any]:
        """Which process this is; a replica that was not restarted keeps its number."""
        return {"expert": self._expert, "pid": os.getpid()}

    async def decide(self, prompt: list[int]) -> float:
        """P(accept) of this expert for a prompt (token ids)."""
        assert self._expert is not None, "the generalist decides nothing"
        return (await self._engine.decide(prompt, [self._expert]))[0]

    async def generate(self, prompt: list[int], max_tokens: int, sampling: Sampling) -> AsyncIterator[Any]:
        """The answer to a prompt (token ids) as pieces of text; see `engine.text.Piece`."""
        from see_ray.engine.embedded import Draw
        from see_ray.engine.text import pieces

        temperature = self._serve.temperature if sampling.temperature is None else sampling.temperature
        draw = Draw(temperature, sampling.top_p, sampling.seed)
        ids = self._engine.generate(prompt, self._expert, max_tokens, draw)
        async for piece in pieces(ids, self._tokenizer, max_tokens, sampling.stop):
            yield piece


def replica_app(config: Config, ref: ExpertRef | None) -> serve.Application:
    """The Serve application of one expert, or of the generalist."""
    deployment = serve.deployment(Replica, name="Generalist" if ref is None else "Expert")
    options = deployment.options(**replica_options(config.serve))
    return options.bind(config.model_dump(mode="json"), None if ref is None else (ref.name, ref.version))


def replica_options(config: ServeConfig) -> dict[str, Any]:
    """Serve's options for a replica of the base model."""
    options: dict[str, Any] = {
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": config.max_queued_requests,
        "max_constructor_retry_count": 2,  # what is wrong with an expert does not mend by waiting
        "graceful_shutdown_timeout_s": 20,
        "ray_actor_options": {"num_cpus": config.replica_cpus, "num_gpus": config.replica_gpus},
    }
    if config.max_replicas > config.min_replicas:
        options["autoscaling_config"] = {
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
        }
    else:
        options["num_replicas"] = config.min_replicas
    return options
