"""The loss of an expert: cross-entropy of its indicators and its responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from see_ray.config import FitConfig
from see_ray.models.activation import Activation
from see_ray.models.prefix_kv import Prefix, forward_packed, logits_of


@dataclass(frozen=True)
class Loss:
    """The loss of one optimizer step: mean over its indicators, and mean over its response tokens."""

    indicator: float
    response: float

    def total(self, indicator_weight: float) -> float:
        """The loss that is minimized."""
        return indicator_weight * self.indicator + self.response


@dataclass(frozen=True)
class TargetLogits:
    """Predictions at the target tokens of a micro-batch, all rows' tokens one after another.

    Attributes:
        logits: float32 [target tokens, vocabulary].
        labels: the target tokens' ids [target tokens].
        is_first: whether a token is the first of its row's target [target tokens].
    """

    logits: Tensor
    labels: Tensor
    is_first: Tensor


def target_logits(
    transformer: Any, prefix: Prefix, suffixes: Sequence[list[int]], targets: Sequence[tuple[int, ...]]
) -> TargetLogits:
    """One forward over suffixes and targets; the output layer runs at target tokens only.

    Args:
        transformer: a causal language model of transformers.
        prefix: keys and values before the activation point, one row for each suffix.
        suffixes: prompt token ids after it, at least one a row.
        targets: token ids that follow the prompt, at least one a row.
    """
    rows = [[*suffix, *target[:-1]] for suffix, target in zip(suffixes, targets, strict=True)]
    hidden = forward_packed(transformer, prefix, rows)
    # The last token of a suffix predicts the first of the target, and so on.
    predicts = [
        column >= len(suffix) - 1 for suffix, row in zip(suffixes, rows, strict=True) for column in range(len(row))
    ]
    logits = logits_of(transformer, hidden[torch.tensor(predicts, device=hidden.device)])
    labels = torch.tensor([token for target in targets for token in target], device=hidden.device)
    is_first = torch.tensor([place == 0 for target in targets for place in range(len(target))], device=hidden.device)
    return TargetLogits(logits.float(), labels, is_first)


class ExpertLoss(torch.nn.Module):
    """The module that the training engine drives: from a micro-batch to its part of the batch's loss.

    The cross-entropy of an indicator over the vocabulary is the sum of two: of accept against pass, which is the
    decision, and of the two together against all other tokens. A decision is read between the two alone, so the
    second part has a small weight of its own (`fit.vocabulary_weight`).

    Args:
        model: the PEFT model.
        activation: gives the indicator tokens.
        config: gives the weights.
    """

    def __init__(self, model: Any, activation: Activation, config: FitConfig):
        super().__init__()
        self.model = model
        self._indicators = [activation.accept, activation.refuse]
        self._indicator_weight, self._vocabulary_weight = config.indicator_weight, config.vocabulary_weight

    def forward(
        self,
        prefix: Prefix,
        suffixes: list[list[int]],
        targets: list[tuple[int, ...]],
        per_indicator: float,
        per_token: float,
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of token losses, and its parts.

        Args:
            prefix: keys and values before the activation point, one row for each suffix.
            suffixes: prompt token ids after it.
            targets: supervised token ids of each row, the indicator first.
            per_indicator: factor of each indicator's loss.
            per_token: factor of each response token's loss.

        Returns:
            The loss; and [indicators' part, responses' part] of it without gradient, the former before
            `fit.indicator_weight`.
        """
        predicted = target_logits(self.model.get_base_model(), prefix, suffixes, targets)
        logits, labels, is_indicator = predicted.logits, predicted.labels, predicted.is_first
        losses = cross_entropy(logits, labels, reduction="none")
        pair = logits[is_indicator][:, self._indicators]
        decisions = cross_entropy(pair, (labels[is_indicator] == self._indicators[1]).long(), reduction="none")
        weighted = (1 - self._vocabulary_weight) * decisions + self._vocabulary_weight * losses[is_indicator]
        indicators = weighted.sum() * per_indicator
        responses = losses[~is_indicator].sum() * per_token
        return self._indicator_weight * indicators + responses, torch.stack([indicators, responses]).detach()
