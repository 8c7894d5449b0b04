"""One fit in this process, on a base model that is loaded already: for experiments with many small fits.

`fit.fit_expert` starts processes, Ray Train and DeepSpeed, which pays off for a task and costs half a minute;
a comparison of methods fits dozens of adapters. Here the same steps (`schedule`, `fit_step`) are taken by
PyTorch's AdamW, with float32 copies of the weights and the learning rate that DeepSpeed would use, on one
worker. A test holds that both give the same adapter. What is left out is what a single small fit does not need:
checkpoints, several workers, early stopping, and `fit.deepspeed`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from see_ray.config import FitConfig
from see_ray.data.reconstruct import Example
from see_ray.fit.report import Comparison
from see_ray.models.activation import Activation
from see_ray.models.base_model import BaseModel


@dataclass(frozen=True)
class FittedHere:
    """What a fit gives besides the adapter.

    Attributes:
        decisions: P(accept) of each held-out row.
        losses: of each step.
        tokens: prompt and response tokens of all examples read, all epochs together.
        seconds: of prefixes, steps and the look at held-out rows.
        comparison: with the base model alone on held-out rows of the task; None without any.
    """

    decisions: list[float]
    losses: list[float]
    tokens: int
    seconds: float
    comparison: Comparison | None


def fit_here(
    examples: Sequence[Example],
    model: Any,
    base: BaseModel,
    activation: Activation,
    config: FitConfig,
    folder: Path,
    *,
    held_out: Sequence[Example] = (),
    start: Path | None = None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> FittedHere:
    """Fit an adapter on `examples` and write it to `folder` as a PEFT folder.

    Args:
        examples: accept and pass examples; every target begins with an indicator.
        model: the base model; carries an adapter meanwhile, and is as before in the end.
        base: names it in the adapter.
        activation: where prompts are split.
        config: of the fit; what is about workers is ignored.
        folder: gets the adapter; made if absent.
        held_out: rows on which the fitted adapter decides.
        start: a PEFT folder of the same rank and targets to go on from; None begins anew.
        on_step: hears of every step.

    Raises:
        FitError: the settings do not fit the base model, or the loss is not finite.
    """
    import torch

    from see_ray.fit.rank_batches import RankBatches
    from see_ray.fit.schedule import Schedule
    from see_ray.fit.trainer import save_adapter, with_adapter

    torch.manual_seed(config.seed)
    peft = with_adapter(model, config)
    try:
        schedule = Schedule([len(activation.split(list(e.prompt))[0]) for e in examples], config, 1)
        engine = _Engine(peft, activation, config, schedule.steps, start)
        share = RankBatches(examples, held_out, schedule, engine, 0, activation, config)
        began = time.perf_counter()
        share.read_prefixes(lambda progress: None)
        losses = []
        for step in schedule:
            loss, _ = share.step(step)
            losses.append(config.indicator_weight * loss.indicator + loss.response)
            on_step(len(losses), schedule.steps)
        decisions = share.look(lambda progress: None).decisions if held_out else []
        comparison = share.compare()
        seconds = time.perf_counter() - began
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(engine.weights(), peft, activation, base, folder)
    finally:
        peft.unload()
    tokens = config.num_train_epochs * sum(len(e.prompt) + len(e.target) for e in examples)
    return FittedHere(decisions, losses, tokens, seconds, comparison)


def learning_rate_share(step: int, warmup: int, steps: int) -> float:
    """Share of the peak learning rate at a step (from 0), as DeepSpeed's WarmupCosineLR has it.

    It sets the rate after each step, so the first two are taken at 0.
    """
    done, warmup = step - 1, max(2, warmup)
    if done < 0:
        return 0.0
    if done < warmup:
        return done / warmup
    progress = min(1.0, (done - warmup + 1) / max(1, steps - warmup))
    return 0.0001 + 0.9999 * (1 + math.cos(math.pi * progress)) / 2


class _Engine:
    """What :class:`see_ray.fit.rank_batches.RankBatches` asks of DeepSpeed, with PyTorch alone."""

    def __init__(self, peft: Any, activation: Activation, config: FitConfig, steps: int, start: Path | None):
        import torch

        from see_ray.fit.rank_batches import ExpertLoss

        self.module = ExpertLoss(peft, activation, config)
        self.global_steps = 0
        self._config = config
        self._params = {name: p for name, p in peft.named_parameters() if p.requires_grad}
        # In half precision small updates would be rounded away: the optimizer works on these copies.
        self._copies = {name: p.detach().float().clone() for name, p in self._params.items()}
        if start is not None:
            self._read(start)
        self._optimizer = torch.optim.AdamW(
            list(self._copies.values()), config.learning_rate, weight_decay=config.weight_decay
        )
        warmup = max(1, math.ceil(config.warmup_ratio * steps))
        total = max(steps, warmup + 1)
        self._rates = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: learning_rate_share(step, warmup, total)
        )

    def _read(self, folder: Path) -> None:
        from safetensors.torch import load_file

        saved = load_file(folder / "adapter_model.safetensors")
        for name, copy in self._copies.items():
            copy.copy_(saved[name.replace(".default.", ".")])
            self._params[name].data.copy_(copy)

    def weights(self) -> dict[str, Any]:
        """The adapter in float32, by parameter name."""
        return self._copies

    def zero_optimization_stage(self) -> int:
        return 0

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """A step of several passes adds up their gradients anyway."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def backward(self, loss: Any) -> None:
        loss.backward()

    def step(self) -> None:
        import torch

        for name, param in self._params.items():
            self._copies[name].grad = None if param.grad is None else param.grad.float()
            param.grad = None
        torch.nn.utils.clip_grad_norm_(self._copies.values(), self._config.max_grad_norm)
        self._optimizer.step()
        self._rates.step()
        for name, param in self._params.items():
            param.data.copy_(self._copies[name])
        self.global_steps += 1
