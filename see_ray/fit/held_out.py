"""Evaluation of the adapter on held-out rows, while it is still loaded.

    evaluate:  P(accept) of every row, and the loss of a response token
    compare:   the adapter and the base model alone, on rows of the task

Rows are read in batches of similar length, dealt to the ranks in rounds: one batch a rank and round.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from see_ray.data.reconstruct import Example
from see_ray.fit.loss import target_logits
from see_ray.fit.rank_model import RankModel
from see_ray.fit.report import Comparison, Progress, Report
from see_ray.models.activation import p_accept
from see_ray.models.prefix_kv import Prefix

EVAL_BATCH_ROWS = 16
"""Held-out rows in one forward."""

COMPARED_ROWS = 32
"""Held-out rows of the task on which the fitted adapter is compared with the base model alone."""


@dataclass(frozen=True)
class EvalResult:
    """The adapter on the held-out rows.

    Attributes:
        decisions: P(accept) of each row.
        response_loss: mean loss of a response token, in nats.
    """

    decisions: list[float]
    response_loss: float

    def accuracy(self, rows: Sequence[Example]) -> tuple[float, float]:
        """Shares of (own, foreign) rows decided rightly at P(accept) 0.5; 1 where there are none."""
        right: dict[bool, list[bool]] = {True: [], False: []}
        for row, decision in zip(rows, self.decisions, strict=True):
            right[row.is_own].append((decision >= 0.5) == row.is_own)
        own, foreign = (sum(of_kind) / len(of_kind) if of_kind else 1.0 for of_kind in (right[True], right[False]))
        return own, foreign


@dataclass(frozen=True)
class _Scores:
    """Results of one forward over held-out rows.

    Attributes:
        indicator_logits: of (accept, pass) after each row's prompt.
        losses: of each target token, all rows' tokens one after another.
        is_first: whether a token is the first of its row's target.
    """

    indicator_logits: list[list[float]]
    losses: list[float]
    is_first: list[bool]

    def response_losses(self) -> list[float]:
        """Losses of the tokens after the indicators."""
        return [loss for loss, is_first in zip(self.losses, self.is_first, strict=True) if not is_first]


class HeldOutRows:
    """The held-out rows of a fit, as one rank reads them.

    Args:
        model: with the adapter that is evaluated.
        rows: own and foreign ones.
        kept_tokens: keep the rows' prefixes on the model's device if they are at most so many tokens.
    """

    def __init__(self, model: RankModel, rows: Sequence[Example], kept_tokens: int):
        self._model, self._rows = model, rows
        order = sorted(range(len(rows)), key=lambda row: len(rows[row].prompt))
        batches = [order[start : start + EVAL_BATCH_ROWS] for start in range(0, len(order), EVAL_BATCH_ROWS)]
        world_size = model.world_size
        self._rounds = [batches[start : start + world_size] for start in range(0, len(batches), world_size)]
        self._keep = sum(len(row.prompt) for row in rows) <= kept_tokens
        self._prefixes: dict[int, Prefix] = {}

    @torch.no_grad()
    def evaluate(self, report: Report) -> EvalResult:
        """Decisions and response loss of the adapter as it stands. Collective."""
        model = self._model
        model.peft.eval()
        decisions, response = torch.zeros(len(self._rows)), torch.zeros(2)  # response: sum of losses, tokens
        for number, batches in enumerate(self._rounds):
            report(Progress("held-out", number, len(self._rounds)))
            has_batch = model.rank < len(batches)
            if not has_batch and not model.forward_is_collective:
                continue
            batch = batches[model.rank] if has_batch else batches[0][:1]
            scores = self._adapter_scores(number, batch)
            if has_batch:
                decisions[batch] = torch.tensor([p_accept(*logits) for logits in scores.indicator_logits])
                losses = scores.response_losses()
                response += torch.tensor([sum(losses), len(losses)])
        model.peft.train()
        *p_accepts, loss, tokens = model.all_reduce(torch.cat([decisions, response])).tolist()
        return EvalResult(p_accepts, loss / max(1.0, tokens))

    @torch.no_grad()
    def compare(self) -> Comparison | None:
        """The adapter and the base model alone on the first own rows; None without any. Collective."""
        own = [row for row, example in enumerate(self._rows) if example.is_own]
        compared = set(own[:COMPARED_ROWS])
        if not compared:
            return None
        model = self._model
        began = time.perf_counter()
        model.peft.eval()
        sums, change = torch.zeros(3), 0.0  # sums: expert's losses, generalist's losses, tokens
        for number, batches in enumerate(self._rounds):
            has_batch = model.rank < len(batches)
            batch = batches[model.rank] if has_batch else batches[0][:1]
            places = [place for place, row in enumerate(batch) if has_batch and row in compared]
            if not places and not model.forward_is_collective:
                continue
            batch_sums, batch_change = self._compare_batch(number, batch, places or [0])
            if places:
                sums += batch_sums
                change = max(change, batch_change)
        model.peft.train()
        expert_loss, generalist_loss, tokens = model.all_reduce(sums).tolist()
        change = model.all_reduce(torch.tensor([change], dtype=torch.float64), maximum=True).item()
        seconds = round(time.perf_counter() - began, 3)
        return Comparison(len(compared), expert_loss / tokens, generalist_loss / tokens, change, seconds)

    def _compare_batch(self, number: int, batch: list[int], places: list[int]) -> tuple[Tensor, float]:
        """Some rows of a batch, with the adapter and without.

        Args:
            number: of the round.
            batch: rows that are read together.
            places: which of them are compared.

        Returns:
            [sum of the expert's losses, sum of the generalist's, response tokens]; the largest change of a row's
            log odds of accept against pass.
        """
        suffixes = [self._model.split(self._rows[row])[1] for row in batch]
        prefix = _select_rows(self._prefix(number, batch), places)
        suffixes = [suffixes[place] for place in places]
        targets = [self._rows[batch[place]].target for place in places]
        expert = self._scores(prefix, suffixes, targets)
        with self._model.peft.disable_adapter():
            # The base model writes no indicator. A row that only stands in may have nothing else.
            generalist = self._scores(prefix, suffixes, [target[1:] or target for target in targets])
        sums = [sum(expert.response_losses()), sum(generalist.losses), len(generalist.losses)]
        log_odds = ([a - p for a, p in scores.indicator_logits] for scores in (expert, generalist))
        return torch.tensor(sums), max(abs(x - y) for x, y in zip(*log_odds, strict=True))

    def _adapter_scores(self, number: int, batch: list[int]) -> _Scores:
        rows = [self._rows[row] for row in batch]
        suffixes = [self._model.split(row)[1] for row in rows]
        return self._scores(self._prefix(number, batch), suffixes, [row.target for row in rows])

    def _scores(self, prefix: Prefix, suffixes: list[list[int]], targets: list[tuple[int, ...]]) -> _Scores:
        predicted = target_logits(self._model.transformer, prefix, suffixes, targets)
        activation = self._model.activation
        indicator_logits = predicted.logits[predicted.is_first][:, [activation.accept, activation.refuse]]
        losses = cross_entropy(predicted.logits, predicted.labels, reduction="none")
        return _Scores(indicator_logits.tolist(), losses.tolist(), predicted.is_first.tolist())

    def _prefix(self, number: int, batch: list[int]) -> Prefix:
        """Keys and values of a round's batch, by the base model alone."""
        if self._model.activation.tokens is None:
            return Prefix((), (0,) * len(batch))
        if number in self._prefixes:
            return self._prefixes[number]
        prefix = self._model.prefill([self._model.split(self._rows[row])[0] for row in batch])
        if self._keep:
            self._prefixes[number] = prefix
        return prefix


def _select_rows(prefix: Prefix, places: list[int]) -> Prefix:
    """Some rows of a batch of prefixes."""
    layers = tuple((keys[places], values[places]) for keys, values in prefix.layers)
    return Prefix(layers, tuple(prefix.lengths[place] for place in places))
