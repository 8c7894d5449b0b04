"""What an expert's folder and manifest say about how to use it."""

from __future__ import annotations

from see_ray.models.activation import Activation
from see_ray.store.expert_store import Manifest


def activation_of_manifest(manifest: Manifest) -> Activation:
    """Where a stored expert's adapter applies, and its indicator tokens."""
    return Activation(manifest.generation_prompt, manifest.activation_tokens, *manifest.indicator_tokens)
