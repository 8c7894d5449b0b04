"""DeepSpeed for a fit: its configuration, and its engine around the loss."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import torch

from see_ray.config import FitConfig

if TYPE_CHECKING:
    from see_ray.fit.loss import ExpertLoss


def deepspeed_config(config: FitConfig, dtype: torch.dtype, world_size: int, steps: int) -> dict[str, Any]:
    """The DeepSpeed JSON of a fit; `fit.deepspeed` is merged over it.

    Args:
        config: of the fit.
        dtype: of the base model.
        world_size: number of ranks.
        steps: optimizer steps in all, for the learning rate.
    """
    warmup = max(1, math.ceil(config.warmup_ratio * steps))
    settings: dict[str, Any] = {
        # Only for DeepSpeed's own bookkeeping: Schedule deals each rank its part, and parts need not be even.
        "train_micro_batch_size_per_gpu": max(1, math.ceil(config.train_batch_size / world_size)),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        # DeepSpeed keeps no float32 copies at stage 0.
        "zero_optimization": {"stage": max(config.zero_stage, int(dtype != torch.float32))},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.learning_rate,
                "weight_decay": config.weight_decay,
                "torch_adam": True,  # PyTorch's own, which needs no compiler
            },
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": max(steps, warmup + 1), "warmup_num_steps": warmup, "warmup_type": "linear"},
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": 1 << 30,
    }
    return _merged(settings, config.deepspeed)


def select_accelerator() -> None:
    """Set DeepSpeed to the CPU where there is no GPU. DeepSpeed reads this once, when it is first imported."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"


def initialize_engine(module: ExpertLoss, config: dict[str, Any]) -> tuple[Any, Any]:
    """DeepSpeed's engine around a loss, and its learning-rate scheduler. Collective.

    Args:
        module: its trainable parameters are optimized.
        config: of `deepspeed_config`.
    """
    import deepspeed

    # DeepSpeed would compile a shared-memory reduction for CPU hosts. Adapters' gradients are small enough for gloo,
    # and a fresh machine may have no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, _, _, scheduler = deepspeed.initialize(model=module, model_parameters=trainable, config=config)
    return engine, scheduler


def _merged(defaults: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries merged key by key."""
    result = dict(defaults)
    for key, value in overrides.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if nested else value
    return result
