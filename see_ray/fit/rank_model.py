"""The model as one rank of a fit sees it: the training engine, its place among the ranks, where prompts are split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from see_ray.data.reconstruct import Example
from see_ray.fit.loss import ExpertLoss
from see_ray.models.activation import Activation
from see_ray.models.prefix_kv import Prefix, prefill


class TrainingEngine(Protocol):
    """What a fit uses of DeepSpeed's engine; `see_ray.fit.local` has one of PyTorch alone."""

    module: ExpertLoss
    global_steps: int

    def zero_optimization_stage(self) -> int: ...

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def backward(self, loss: Tensor) -> Any: ...

    def step(self) -> None: ...


@dataclass(frozen=True)
class RankModel:
    """One rank's model.

    Attributes:
        engine: around `see_ray.fit.loss.ExpertLoss`.
        activation: where prompts are split.
        rank: of this worker, from 0.
        world_size: number of workers.
    """

    engine: TrainingEngine
    activation: Activation
    rank: int = 0
    world_size: int = 1

    @property
    def peft(self) -> Any:
        """The PEFT model: the base model with the adapter."""
        return self.engine.module.model

    @property
    def transformer(self) -> Any:
        """The causal language model inside the PEFT model; runs with the adapter unless PEFT has disabled it."""
        return self.peft.get_base_model()

    @property
    def forward_is_collective(self) -> bool:
        """Whether all ranks must run equally many forwards, as under ZeRO 3, which gathers sharded weights."""
        return self.world_size > 1 and self.engine.zero_optimization_stage() == 3

    def split(self, example: Example) -> tuple[list[int], list[int]]:
        """A prompt's token ids as (prefix, suffix); the adapter applies to the suffix."""
        return self.activation.split(list(example.prompt))

    def prefill(self, rows: Sequence[Sequence[int]]) -> Prefix:
        """Keys and values of prefixes (token ids), computed by the base model alone."""
        with self.peft.disable_adapter():
            return prefill(self.transformer, rows)

    def all_reduce(self, values: Tensor, maximum: bool = False) -> Tensor:
        """Sum, or maximum, over all ranks; `values` may be overwritten. Collective."""
        if self.world_size == 1:
            return values
        on_device = values.to(self.transformer.device)
        operation = torch.distributed.ReduceOp.MAX if maximum else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(on_device, op=operation)
        return on_device.cpu()
