"""Memory of a fit worker: its peak use, and the message for a fit that ran out of memory."""

from __future__ import annotations

import math
import resource
from collections.abc import Sequence
from typing import Any

import torch

from see_ray.config import BaseModelConfig, FitConfig
from see_ray.data.reconstruct import Example
from see_ray.models.activation import Activation
from see_ray.models.base_model import BaseModel, dtype_of, find


def peak_memory_gb() -> float:
    """The most memory that this worker has used so far: of its GPU where it has one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def out_of_memory_message(
    error: BaseException, base_config: BaseModelConfig, micro_batch: int, config: FitConfig
) -> str:
    """What ran out, an estimate of what is needed, and which settings change it.

    Args:
        error: what was raised.
        base_config: of the base model.
        micro_batch: tokens of the largest micro-batch.
        config: of the fit.
    """
    base = find(base_config)
    itemsize = dtype_of(base_config).itemsize
    weights_gb = itemsize * _parameters(base) / 1e9
    activations_gb = micro_batch * _activation_bytes_per_token(base, itemsize) / 1e9
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return (
        f"out of memory: {reason}. One worker needs about {weights_gb:.1f} GB for the base model, up to "
        f"{config.kv_store_gb:g} GB for kept prefixes, and about {activations_gb:.1f} GB for one micro-batch of "
        f"{micro_batch} tokens; lower fit.max_tokens_per_micro_batch (now {config.max_tokens_per_micro_batch}), "
        f"fit.kv_store_gb (now {config.kv_store_gb:g}) or fit.max_length, or set fit.kv_store_dtype=bfloat16"
        + ("" if config.zero_stage == 3 else ", or shard the base model over workers with fit.zero_stage=3")
    )


def largest_micro_batch(examples: Sequence[Example], activation: Activation, config: FitConfig) -> int:
    """Tokens after the activation point in the largest micro-batch that a rank may get."""
    lengths = sorted(len(activation.split(list(e.prompt))[1]) + len(e.target) - 1 for e in examples)
    return max(lengths[-1], min(config.max_tokens_per_micro_batch, sum(lengths[-config.train_batch_size :])))


def _activation_bytes_per_token(base: BaseModel, itemsize: int) -> int:
    """Estimate of what the backward pass keeps for one token: hidden states of all layers, and float32 logits."""
    from transformers import AutoConfig

    shape: Any = AutoConfig.from_pretrained(base.folder).get_text_config()
    intermediate_size = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    layers = shape.num_hidden_layers * (16 * shape.hidden_size + 4 * intermediate_size) * itemsize
    return int(layers + 12 * shape.vocab_size)


def _parameters(base: BaseModel) -> int:
    """Parameters in the base model's files."""
    from safetensors import safe_open

    count = 0
    for path in base.folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count
