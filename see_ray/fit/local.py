"""One fit in this process, on a base model that is loaded already: for experiments with many small fits.

`launch.fit_expert` takes half a minute to start processes, Ray Train and DeepSpeed, which is too long for a comparison
of methods, with dozens of small fits. Here PyTorch's AdamW takes the same steps (`schedule`, `rank_batches`) on one
rank, with float32 copies of the weights and DeepSpeed's learning rates; `tests/unit/fit/test_local.py` checks that both
give the same adapter. Checkpoints, several workers, early stopping and `fit.deepspeed` are not supported.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from see_ray.config import FitConfig
from see_ray.fit.report import Comparison
from see_ray.fit.spec import FitSpec
from see_ray.models.activation import Activation


@dataclass(frozen=True)
class LocalFit:
    """What a fit gives besides the adapter.

    Attributes:
        decisions: P(accept) of each held-out row.
        losses: of each step.
        tokens: prompt and response tokens of all examples read, all epochs together.
        seconds: of prefixes, steps and the evaluation on held-out rows.
        comparison: with the base model alone on held-out rows of the task; None without any.
    """

    decisions: list[float]
    losses: list[float]
    tokens: int
    seconds: float
    comparison: Comparison | None


def fit_local(
    spec: FitSpec,
    model: Any,
    folder: Path,
    *,
    start: Path | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> LocalFit:
    """Fit an adapter and write it to `folder` as a PEFT folder.

    Args:
        spec: what is fitted, and how; settings of workers are ignored.
        model: the loaded base model; has the adapter during the fit, and is unchanged after it.
        folder: gets the adapter; created if absent.
        start: a PEFT folder of the same rank and targets to continue from; None starts a new adapter.
        on_step: called after every step with (steps done, steps in all).

    Raises:
        FitError: the settings do not fit the base model, or the loss is not finite.
    """
    import torch

    from see_ray.fit.held_out import HeldOutRows
    from see_ray.fit.peft_adapter import save_adapter, with_adapter
    from see_ray.fit.prefix_cache import PrefixCache
    from see_ray.fit.rank_batches import RankBatches
    from see_ray.fit.rank_model import RankModel
    from see_ray.fit.schedule import Schedule

    examples, activation, config = spec.examples, spec.activation, spec.config
    torch.manual_seed(config.seed)
    peft = with_adapter(model, config)
    try:
        schedule = Schedule(spec.prefix_lengths(), config, 1)
        engine = _TorchEngine(peft, activation, config, schedule.steps, start)
        rank_model = RankModel(engine, activation)
        prefixes = PrefixCache(rank_model, examples, schedule, config)
        batches = RankBatches(rank_model, examples, schedule, prefixes, config)
        held_out = HeldOutRows(rank_model, spec.held_out, prefixes.free_tokens)
        began = time.perf_counter()
        prefixes.fill(lambda progress: None)
        losses: list[float] = []
        for batch in schedule:
            loss, _ = batches.train_step(batch)
            losses.append(loss.total(config.indicator_weight))
            on_step(len(losses), schedule.steps)
        decisions = held_out.evaluate(lambda progress: None).decisions if spec.held_out else []
        comparison = held_out.compare()
        seconds = time.perf_counter() - began
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(engine.weights(), peft, activation, spec.base, folder)
    finally:
        peft.unload()
    tokens = config.num_train_epochs * sum(len(example.prompt) + len(example.target) for example in examples)
    return LocalFit(decisions, losses, tokens, seconds, comparison)


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Factor of the peak learning rate at a step (from 0), as DeepSpeed's WarmupCosineLR has it.

    It sets the rate after each step, so the first two steps are taken at 0.
    """
    done, warmup = step - 1, max(2, warmup)
    if done < 0:
        return 0.0
    if done < warmup:
        return done / warmup
    progress = min(1.0, (done - warmup + 1) / max(1, steps - warmup))
    return 0.0001 + 0.9999 * (1 + math.cos(math.pi * progress)) / 2


class _TorchEngine:
    """A training engine of PyTorch alone: `see_ray.fit.rank_model.TrainingEngine`."""

    def __init__(self, peft: Any, activation: Activation, config: FitConfig, steps: int, start: Path | None):
        import torch

        from see_ray.fit.loss import ExpertLoss

        self.module = ExpertLoss(peft, activation, config)
        self.global_steps = 0
        self._config = config
        self._parameters = {name: p for name, p in peft.named_parameters() if p.requires_grad}
        # In half precision small updates would be rounded away: the optimizer works on these copies.
        self._copies = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        if start is not None:
            self._load(start)
        self._optimizer = torch.optim.AdamW(
            list(self._copies.values()), config.learning_rate, weight_decay=config.weight_decay
        )
        warmup = max(1, math.ceil(config.warmup_ratio * steps))
        total = max(steps, warmup + 1)
        self._scheduler = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: learning_rate_factor(step, warmup, total)
        )

    def _load(self, folder: Path) -> None:
        """Start from the weights of a PEFT folder."""
        from safetensors.torch import load_file

        saved = load_file(folder / "adapter_model.safetensors")
        for name, copy in self._copies.items():
            copy.copy_(saved[name.replace(".default.", ".")])
            self._parameters[name].data.copy_(copy)

    def weights(self) -> dict[str, Any]:
        """The adapter in float32, by parameter name."""
        return self._copies

    def zero_optimization_stage(self) -> int:
        return 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Gradients of a step's micro-batches accumulate anyway."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Any) -> None:
        loss.backward()

    def step(self) -> None:
        import torch

        for name, parameter in self._parameters.items():
            self._copies[name].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self._copies.values(), self._config.max_grad_norm)
        self._optimizer.step()
        self._scheduler.step()
        for name, parameter in self._parameters.items():
            parameter.data.copy_(self._copies[name])
        self.global_steps += 1
