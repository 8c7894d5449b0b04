"""When a fit stops early, and which adapter it keeps then."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MIN_LOSS_IMPROVEMENT = 0.001
"""Share by which the response loss must fall to count as an improvement."""

Evaluation = dict[str, float]
"""One evaluation on held-out rows: step, own_accuracy, foreign_accuracy, response_loss."""


@dataclass(frozen=True)
class BestAdapter:
    """The adapter of the best evaluation so far.

    Attributes:
        step: after which it was evaluated.
        weights: float32, by parameter name.
    """

    step: int
    weights: dict[str, Tensor]

    def to_tensors(self) -> dict[str, Tensor]:
        """As tensors of a checkpoint: `best`, the step, and `best.<parameter name>`."""
        import torch

        return {"best": torch.tensor(self.step), **{f"best.{name}": value for name, value in self.weights.items()}}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> BestAdapter | None:
        """From a checkpoint's tensors; None if it has none."""
        if "best" not in tensors:
            return None
        prefix = "best."
        weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        return BestAdapter(int(tensors["best"]), weights)


def best_step(evaluations: Sequence[Evaluation]) -> int:
    """The step of the best evaluation: the most decisions right, then the lowest response loss."""
    best = max(evaluations, key=lambda evaluation: (_accuracy(evaluation), -evaluation["response_loss"]))
    return int(best["step"])


def patience_exhausted(evaluations: Sequence[Evaluation], patience: int) -> bool:
    """Whether the last `patience` evaluations improved neither decision accuracy nor response loss."""
    last_improvement, accuracy, loss = 0, -1.0, math.inf
    for number, evaluation in enumerate(evaluations):
        lower_loss = evaluation["response_loss"] < (1 - MIN_LOSS_IMPROVEMENT) * loss
        if _accuracy(evaluation) > accuracy or lower_loss:
            last_improvement = number
        accuracy, loss = max(accuracy, _accuracy(evaluation)), min(loss, evaluation["response_loss"])
    return len(evaluations) - 1 - last_improvement >= patience


def _accuracy(evaluation: Evaluation) -> float:
    return evaluation["own_accuracy"] + evaluation["foreign_accuracy"]
