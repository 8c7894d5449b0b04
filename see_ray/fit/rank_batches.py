"""A rank's part of each batch: micro-batches, forward and backward, one optimizer step.

    kept prefixes + suffixes (the tokens after the activation point) ─► loss ─► gradients ─► optimizer step

The loss is normalized over the examples of the whole batch, on all ranks, so an adapter does not depend on how
many ranks there were.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from see_ray.config import FitConfig
from see_ray.data.reconstruct import Example
from see_ray.errors import FitError
from see_ray.fit.loss import Loss
from see_ray.fit.prefix_cache import PrefixCache
from see_ray.fit.rank_model import RankModel
from see_ray.fit.schedule import Schedule
from see_ray.models.attention_override import supports_packing

MAX_ROWS_NAMED = 16
"""Most rows that an error message names."""


class RankBatches:
    """One rank's part of every batch.

    Args:
        model: what is fitted.
        examples: of the whole fit.
        schedule: says which rank reads which examples.
        prefixes: of this rank's examples.
        config: of the fit.
    """

    def __init__(
        self,
        model: RankModel,
        examples: Sequence[Example],
        schedule: Schedule,
        prefixes: PrefixCache,
        config: FitConfig,
    ):
        self._model, self._examples, self._schedule = model, examples, schedule
        self._prefixes, self._config = prefixes, config
        self._tokens = self._padded_tokens = 0

    def train_step(self, batch: Sequence[int], checkpoint_due: bool = False) -> tuple[Loss, bool]:
        """One optimizer step over all ranks' examples. Collective.

        Args:
            batch: indices of its examples.
            checkpoint_due: whether this rank asks for a checkpoint after the step.

        Returns:
            The loss, and whether any rank asked for a checkpoint; the same on all ranks.

        Raises:
            FitError: the loss is not finite; the step is not taken.
        """
        engine, rank, world_size = self._model.engine, self._model.rank, self._model.world_size
        if self._config.lora_dropout:  # the seed follows from the step, so that a resumed fit draws the same
            torch.manual_seed(hash((self._config.seed, engine.global_steps, rank)))
        micro_batches = [self._micro_batches(batch, r) for r in range(world_size)]
        rounds = max(map(len, micro_batches))
        response_tokens = sum(len(self._examples[index].target) - 1 for index in batch)
        # Means over the whole batch. The engine averages gradients over ranks, hence the factor `world_size`.
        factors = world_size / len(batch), world_size / max(1, response_tokens)
        totals = torch.zeros(3, device=self._model.transformer.device)  # indicators' loss, responses' loss, flags
        totals[2] = checkpoint_due
        for number in range(rounds):
            if rounds > 1:
                engine.set_gradient_accumulation_boundary(number == rounds - 1)
            loss, parts = self._forward(micro_batches, number, factors)
            totals[:2] += parts / world_size
            engine.backward(loss)
        indicator, response, flags = self._model.all_reduce(totals).tolist()
        if not math.isfinite(indicator + response):
            raise FitError(self._not_finite(batch, indicator + response))
        engine.step()
        return Loss(indicator, response), flags > 0

    def padding_share(self) -> float:
        """Share of padding among the tokens of all steps' forwards."""
        return round(1 - self._tokens / self._padded_tokens, 4) if self._padded_tokens else 0.0

    def _micro_batches(self, batch: Sequence[int], rank: int) -> list[list[int]]:
        """A rank's part of a batch, cut where it would have more than `max_tokens_per_micro_batch`."""
        micro_batches: list[list[int]] = []
        tokens = 0
        for index in self._schedule.part(batch, rank):
            example = self._examples[index]
            length = len(example.prompt) - self._schedule.prefix_lengths[index] + len(example.target) - 1
            tokens += length
            if not micro_batches or tokens > self._config.max_tokens_per_micro_batch:
                micro_batches.append([])
                tokens = length
            micro_batches[-1].append(index)
        return micro_batches

    def _forward(
        self, micro_batches: Sequence[list[list[int]]], number: int, factors: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """This rank's `number`-th micro-batch through `see_ray.fit.loss.ExpertLoss`.

        A rank that has fewer of them reads one example without effect, since `backward` is collective.

        Args:
            micro_batches: of each rank.
            number: which of them, from 0.
            factors: of each indicator's and of each response token's loss.
        """
        of_ranks = [
            of_rank[number] if number < len(of_rank) else [self._schedule.stand_in(rank)]
            for rank, of_rank in enumerate(micro_batches)
        ]
        indices = of_ranks[self._model.rank]
        all_planned = all(self._prefixes.is_planned(index) for part in of_ranks for index in part)
        examples = [self._examples[index] for index in indices]
        suffixes = [self._model.split(example)[1] for example in examples]
        has_effect = number < len(micro_batches[self._model.rank])
        if has_effect:
            self._count(suffixes, examples)
        per_indicator, per_token = factors if has_effect else (0.0, 0.0)
        loss, parts = self._model.engine(
            self._prefixes.get(indices, all_planned),
            suffixes,
            [example.target for example in examples],
            per_indicator=per_indicator,
            per_token=per_token,
        )
        return loss, parts

    def _count(self, suffixes: Sequence[list[int]], examples: Sequence[Example]) -> None:
        lengths = [len(suffix) + len(example.target) - 1 for suffix, example in zip(suffixes, examples, strict=True)]
        self._tokens += sum(lengths)
        self._padded_tokens += (
            sum(lengths) if supports_packing(self._model.transformer) else max(lengths) * len(lengths)
        )

    def _not_finite(self, batch: Sequence[int], loss: float) -> str:
        rows = [self._examples[index].row for index in batch]
        more = f" and {len(rows) - MAX_ROWS_NAMED} more" if len(rows) > MAX_ROWS_NAMED else ""
        return (
            f"the loss became {loss} at step {self._model.engine.global_steps + 1}, whose rows are "
            f"{', '.join(rows[:MAX_ROWS_NAMED])}{more}; lower fit.learning_rate, or look at these rows"
        )
