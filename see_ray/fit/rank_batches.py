"""The arithmetic of a fit: prefixes read once, steps over what follows them, looks at held-out rows.

    read_prefixes:  the base model alone reads each prefix once; keys and values are kept
    step:           prefix KV + the tokens behind the activation point ─► loss ─► DeepSpeed
    look:           P(accept) and response loss of held-out rows
    compare:        the same rows with the adapter and without

Gradients flow through the second line only. The loss of a step is normalized over the step's examples on
all workers, so an adapter does not depend on how many workers there were.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from see_ray.config import FitConfig
from see_ray.data.reconstruct import Example
from see_ray.errors import FitError
from see_ray.fit.report import Comparison, Progress
from see_ray.fit.schedule import Schedule
from see_ray.models.activation import Activation, p_accept
from see_ray.models.attention_override import supports_packing
from see_ray.models.prefix_kv import Prefix, forward_packed, kv_bytes_per_token, logits_of, prefill

LOOK_ROWS = 16
"""Held-out rows in one forward pass."""

COMPARED_ROWS = 32
"""Held-out rows of the task on which the fitted adapter is compared with the base model alone."""

ROWS_NAMED = 16
"""Rows that a message names at most."""

Report = Callable[[Progress], Any]


class ExpertLoss(torch.nn.Module):
    """The module that DeepSpeed drives: from a share of a step to its part of the loss.

    The cross-entropy of an indicator over the vocabulary is the sum of two: of accept against pass, which is the
    decision, and of the two together against all other tokens. Decisions are read between the two alone, so the
    second part has a small weight of its own.
    """

    def __init__(self, model: Any, activation: Activation, config: FitConfig):
        super().__init__()
        self.model = model
        self._indicators = [activation.accept, activation.refuse]
        self._indicator_weight, self._vocabulary_weight = config.indicator_weight, config.vocabulary_weight

    def forward(
        self,
        prefix: Prefix,
        rest: list[list[int]],
        targets: list[tuple[int, ...]],
        per_indicator: float,
        per_token: float,
    ) -> tuple[Tensor, Tensor]:
        """Weighted sum of token losses, and its parts.

        Args:
            prefix: keys and values before the activation point, a row each.
            rest: prompt tokens behind it.
            targets: supervised tokens of each row, the indicator first.
            per_indicator: weight of one indicator's loss.
            per_token: weight of one response token's loss.

        Returns:
            The loss; and [indicators' part, responses' part] of it without gradient, the former before
            `fit.indicator_weight`.
        """
        inner = self.model.get_base_model()
        rows = [[*left, *target[:-1]] for left, target in zip(rest, targets, strict=True)]
        hidden = forward_packed(inner, prefix, rows)
        # The last token of what is left of the prompt predicts the indicator, and so on.
        supervised = [i >= len(left) - 1 for left, row in zip(rest, rows, strict=True) for i in range(len(row))]
        logits = logits_of(inner, hidden[torch.tensor(supervised, device=hidden.device)])  # only where there is loss
        labels = torch.tensor([token for target in targets for token in target], device=hidden.device)
        is_indicator = torch.tensor([i == 0 for target in targets for i in range(len(target))], device=hidden.device)
        logits = logits.float()
        losses = cross_entropy(logits, labels, reduction="none")
        pair = logits[is_indicator][:, self._indicators]
        decisions = cross_entropy(pair, (labels[is_indicator] == self._indicators[1]).long(), reduction="none")
        mixed = (1 - self._vocabulary_weight) * decisions + self._vocabulary_weight * losses[is_indicator]
        indicators = mixed.sum() * per_indicator
        responses = losses[~is_indicator].sum() * per_token
        return self._indicator_weight * indicators + responses, torch.stack([indicators, responses]).detach()


@dataclass(frozen=True)
class Loss:
    """Of one step: mean over its indicators, and over its response tokens."""

    indicator: float
    response: float


@dataclass(frozen=True)
class EvalResult:
    """What held-out rows show: P(accept) of each, and the mean loss of a response token."""

    decisions: list[float]
    response_loss: float

    def accuracy(self, own: Sequence[bool]) -> tuple[float, float]:
        """Shares of (own, foreign) rows on the right side of 0.5; 1 where there are none."""
        right = [(p >= 0.5) == mine for p, mine in zip(self.decisions, own, strict=True)]
        shares = [[r for r, mine in zip(right, own, strict=True) if mine == wanted] for wanted in (True, False)]
        return tuple(sum(share) / len(share) if share else 1.0 for share in shares)  # type: ignore[return-value]


class RankBatches:
    """A worker's prefixes and its part of every step.

    Args:
        examples: of the whole fit.
        held_out: rows to look at; those that the expert should pass on have a target of one token.
        schedule: who reads what, when.
        engine: DeepSpeed's, around :class:`ExpertLoss`.
        rank: this worker's number.
        activation: where prompts are split.
        config: of the fit.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        held_out: Sequence[Example],
        schedule: Schedule,
        engine: Any,
        rank: int,
        activation: Activation,
        config: FitConfig,
    ):
        self._examples, self._schedule, self._activation, self._rank = examples, schedule, activation, rank
        self._config, self._engine, self._peft = config, engine, engine.module.model
        self._inner = self._peft.get_base_model()
        # Under ZeRO 3 every forward pass is collective: all workers must run equally many.
        self._collective = engine.zero_optimization_stage() == 3 and schedule.world > 1
        dtype = torch.bfloat16 if config.kv_store_dtype == "bfloat16" else self._inner.dtype
        self._kept_dtype = dtype
        budget = int(config.kv_store_gb * 1e9 / kv_bytes_per_token(self._inner, dtype))
        self._plans = [schedule.prefill_batches(rank, budget) for rank in range(schedule.world)]
        self._to_keep = {number for plan in self._plans for batch in plan for number in batch}
        self._kept: dict[int, Tensor] = {}
        self._hits = self._reads = self._real = self._padded = 0
        self._held_out = held_out
        self._batches = self._deal(held_out)
        used = max(
            (sum(schedule.prefix_lengths[n] for batch in plan for n in batch) for plan in self._plans), default=0
        )
        spare = sum(len(example.prompt) for example in held_out) <= budget - used
        self._held_prefixes: dict[int, Prefix] | None = {} if spare else None

    # --- prefixes ---------------------------------------------------------------------------

    def read_prefixes(self, report: Report) -> None:
        """Read and keep the prefixes of this worker's examples, as many as its memory may hold."""
        plan = self._plans[self._rank] if self._activation.tokens is not None else []
        rounds = max(len(plan) for plan in self._plans) if self._collective else len(plan)
        for number in range(rounds):
            report(Progress("prefix", number, rounds))
            if number < len(plan):
                self._kept.update(self._prefill(plan[number]))
            else:
                self._prefill([self._schedule.stand_in(self._rank)])

    def _prefix_of(self, numbers: list[int], missing_anywhere: bool) -> Prefix:
        if self._activation.tokens is None:
            return Prefix((), (0,) * len(numbers))
        missing = [number for number in numbers if number not in self._kept]
        self._reads += len(numbers)
        self._hits += len(numbers) - len(missing)
        found = self._kept
        if missing or (self._collective and missing_anywhere):
            found = {**self._kept, **self._prefill(missing or numbers[:1])}
        return self._unpack([found[number] for number in numbers])

    def _prefill(self, numbers: list[int]) -> dict[int, Tensor]:
        prefix = self._read([self._split(self._examples[number])[0] for number in numbers])
        return {number: self._pack(prefix, row) for row, number in enumerate(numbers)}

    def _read(self, rows: list[list[int]]) -> Prefix:
        with self._peft.disable_adapter():
            return prefill(self._inner, rows)

    def _split(self, example: Example) -> tuple[list[int], list[int]]:
        return self._activation.split(list(example.prompt))

    def _pack(self, prefix: Prefix, row: int) -> Tensor:
        """One row's keys and values in host memory: [2 x layers, heads, tokens, head size]."""
        length = prefix.lengths[row]
        return torch.stack([kv[row, :, :length] for layer in prefix.layers for kv in layer]).to("cpu", self._kept_dtype)

    def _unpack(self, rows: list[Tensor]) -> Prefix:
        """Packed rows as one padded batch on the model's device."""
        lengths = tuple(row.shape[2] for row in rows)
        both = rows[0].new_zeros(rows[0].shape[0], len(rows), rows[0].shape[1], max(lengths), rows[0].shape[3])
        for index, row in enumerate(rows):
            both[:, index, :, : row.shape[2]] = row
        both = both.to(self._inner.device, self._inner.dtype)
        return Prefix(tuple((both[i], both[i + 1]) for i in range(0, both.shape[0], 2)), lengths)

    # --- steps ------------------------------------------------------------------------------

    def step(self, step: Sequence[int], raised: bool = False) -> tuple[Loss, bool]:
        """One optimizer step over all workers' examples.

        Args:
            step: numbers of its examples.
            raised: this worker's flag.

        Returns:
            The loss, and whether any worker raised its flag; the same on all workers.

        Raises:
            FitError: the loss is not finite; the step is not taken.
        """
        world = self._schedule.world
        if self._config.lora_dropout:  # follows from where the fit stands, so that a resumed fit draws the same
            torch.manual_seed(hash((self._config.seed, self._engine.global_steps, self._rank)))
        plans = [self._passes(step, rank) for rank in range(world)]
        rounds = max(map(len, plans))
        responses = sum(len(self._examples[number].target) - 1 for number in step)
        told = torch.zeros(3, device=self._inner.device)
        told[2] = raised
        for number in range(rounds):
            if rounds > 1:
                self._engine.set_gradient_accumulation_boundary(number == rounds - 1)
            loss, parts = self._pass(plans, number, world / len(step), world / max(1, responses))
            told[:2] += parts / world
            self._engine.backward(loss)
        if world > 1:
            torch.distributed.all_reduce(told)
        indicator, response, flags = told.tolist()
        if not torch.isfinite(told).all():
            raise FitError(self._not_finite(step, indicator + response))
        self._engine.step()
        return Loss(indicator, response), flags > 0

    def _pass(self, plans: list[list[list[int]]], number: int, per_indicator: float, per_token: float) -> Any:
        mine = plans[self._rank]
        counts = number < len(mine)
        numbers = mine[number] if counts else [self._schedule.stand_in(self._rank)]
        now = [plan[number] if number < len(plan) else [self._schedule.stand_in(r)] for r, plan in enumerate(plans)]
        missing_anywhere = any(number not in self._to_keep for numbers in now for number in numbers)
        examples = [self._examples[number] for number in numbers]
        rest = [self._split(example)[1] for example in examples]
        if counts:
            lengths = [len(left) + len(example.target) - 1 for left, example in zip(rest, examples, strict=True)]
            self._real += sum(lengths)
            self._padded += sum(lengths) if supports_packing(self._inner) else max(lengths) * len(lengths)
        # Means over the whole step; DeepSpeed averages over workers, hence the factor `world` in both.
        return self._engine(
            self._prefix_of(numbers, missing_anywhere),
            rest,
            [example.target for example in examples],
            per_indicator=counts * per_indicator,
            per_token=counts * per_token,
        )

    def _passes(self, step: Sequence[int], rank: int) -> list[list[int]]:
        """A worker's part of a step, cut where a pass would have more than `max_tokens_per_micro_batch`."""
        passes: list[list[int]] = []
        tokens = 0
        for number in self._schedule.share(step, rank):
            example = self._examples[number]
            length = len(example.prompt) - self._schedule.prefix_lengths[number] + len(example.target) - 1
            tokens += length
            if not passes or tokens > self._config.max_tokens_per_micro_batch:
                passes.append([])
                tokens = length
            passes[-1].append(number)
        return passes

    def _not_finite(self, step: Sequence[int], loss: float) -> str:
        rows = [self._examples[number].row for number in step]
        more = f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else ""
        return (
            f"the loss became {loss} at step {self._engine.global_steps + 1}, whose rows are "
            f"{', '.join(rows[:ROWS_NAMED])}{more}; lower fit.learning_rate, or look at these rows"
        )

    # --- held-out rows ------------------------------------------------------------------------

    def _deal(self, held_out: Sequence[Example]) -> list[list[list[int]]]:
        """Length-sorted batches of held-out rows in rounds, one batch a worker and round."""
        order = sorted(range(len(held_out)), key=lambda number: len(held_out[number].prompt))
        batches = [order[start : start + LOOK_ROWS] for start in range(0, len(order), LOOK_ROWS)]
        world = self._schedule.world
        return [batches[start : start + world] for start in range(0, len(batches), world)]

    @torch.no_grad()
    def look(self, report: Report) -> EvalResult:
        """Decisions and response loss of the adapter as it stands. Collective."""
        self._peft.eval()
        found = torch.zeros(len(self._held_out) + 2)
        for number, batches in enumerate(self._batches):
            report(Progress("held-out", number, len(self._batches)))
            mine = self._rank < len(batches)
            if not mine and not self._collective:
                continue
            batch = batches[self._rank] if mine else batches[0][:1]
            decisions, losses = self._look_at(number, batch)
            if mine:
                found[batch] = torch.tensor(decisions)
                found[-2] += sum(losses)
                found[-1] += len(losses)
        self._peft.train()
        if self._schedule.world > 1:
            on_device = found.to(self._inner.device)
            torch.distributed.all_reduce(on_device)
            found = on_device.cpu()
        *each, loss, tokens = found.tolist()
        return EvalResult(each, loss / max(1.0, tokens))

    def _look_at(self, number: int, batch: list[int]) -> tuple[list[float], list[float]]:
        examples = [self._held_out[row] for row in batch]
        splits = [self._split(example) for example in examples]
        prefix = self._held_prefix(number, splits)
        odds, losses = self._losses(prefix, [right for _, right in splits], [example.target for example in examples])
        firsts = {sum(len(example.target) for example in examples[:row]) for row in range(len(examples))}
        return [p_accept(*pair) for pair in odds], [loss for i, loss in enumerate(losses) if i not in firsts]

    def _losses(
        self, prefix: Prefix, rest: list[list[int]], targets: list[tuple[int, ...]]
    ) -> tuple[list[list[float]], list[float]]:
        """Of each row the logits of (accept, pass) behind its prompt; and the loss of each target token, row by row."""
        rows = [[*right, *target[:-1]] for right, target in zip(rest, targets, strict=True)]
        hidden = forward_packed(self._inner, prefix, rows)
        supervised = [i >= len(right) - 1 for right, row in zip(rest, rows, strict=True) for i in range(len(row))]
        # Once for the whole batch: under ZeRO 3 this is a collective operation, too.
        logits = logits_of(self._inner, hidden[torch.tensor(supervised, device=hidden.device)]).float()
        labels = torch.tensor([token for target in targets for token in target], device=logits.device)
        firsts = [sum(map(len, targets[:row])) for row in range(len(targets))]
        odds = logits[firsts][:, [self._activation.accept, self._activation.refuse]].tolist()
        return odds, cross_entropy(logits, labels, reduction="none").tolist()

    @torch.no_grad()
    def compare(self) -> Comparison | None:
        """The adapter beside the base model alone, on the first own held-out rows; None without any. Collective."""
        own = [row for row, example in enumerate(self._held_out) if len(example.target) > 1]
        chosen = set(own[:COMPARED_ROWS])
        if not chosen:
            return None
        began = time.perf_counter()
        self._peft.eval()
        sums, change = torch.zeros(3), 0.0  # losses of the expert, of the generalist; tokens
        for number, batches in enumerate(self._batches):
            mine = self._rank < len(batches)
            batch = batches[self._rank] if mine else batches[0][:1]
            places = [place for place, row in enumerate(batch) if mine and row in chosen]
            if not places and not self._collective:
                continue
            splits = [self._split(self._held_out[row]) for row in batch]
            prefix = _rows_of(self._held_prefix(number, splits), places or [0])
            rest = [splits[place][1] for place in places or [0]]
            targets = [self._held_out[batch[place]].target for place in places or [0]]
            with_it, expert = self._losses(prefix, rest, targets)
            with self._peft.disable_adapter():
                without, generalist = self._losses(prefix, rest, [target[1:] or target for target in targets])
            if places:
                firsts = {sum(map(len, targets[:row])) for row in range(len(targets))}
                sums[0] += sum(loss for i, loss in enumerate(expert) if i not in firsts)
                sums[1] += sum(generalist)
                sums[2] += len(generalist)
                moved = [abs((a - r) - (b - s)) for (a, r), (b, s) in zip(with_it, without, strict=True)]
                change = max(change, *moved)
        self._peft.train()
        if self._schedule.world > 1:
            on_device, most = sums.to(self._inner.device), torch.tensor([change], device=self._inner.device)
            torch.distributed.all_reduce(on_device)
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
            sums, change = on_device.cpu(), float(most)
        expert_loss, generalist_loss, tokens = sums.tolist()
        seconds = round(time.perf_counter() - began, 3)
        return Comparison(len(chosen), expert_loss / tokens, generalist_loss / tokens, change, seconds)

    def _held_prefix(self, number: int, splits: list[tuple[list[int], list[int]]]) -> Prefix:
        if self._activation.tokens is None:
            return Prefix((), (0,) * len(splits))
        if self._held_prefixes is not None and number in self._held_prefixes:
            return self._held_prefixes[number]
        prefix = self._read([left for left, _ in splits])
        if self._held_prefixes is not None:
            self._held_prefixes[number] = prefix
        return prefix

    # --- figures ------------------------------------------------------------------------------

    def hit_rate(self) -> float:
        """Share of prefixes that a step found kept instead of reading them again."""
        return round(self._hits / self._reads, 4) if self._reads else 0.0

    def padding_share(self) -> float:
        """Share of padding among the tokens of all steps' forward passes."""
        return round(1 - self._real / self._padded, 4) if self._padded else 0.0


def _rows_of(prefix: Prefix, places: list[int]) -> Prefix:
    """Some rows of a batch of prefixes."""
    layers = tuple((keys[places], values[places]) for keys, values in prefix.layers)
    return Prefix(layers, tuple(prefix.lengths[place] for place in places))
