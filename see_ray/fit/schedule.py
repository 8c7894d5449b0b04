"""Which examples each step of a fit reads, and on which worker, for any number of workers.

Examples are dealt to as many *lanes* as a step has places. A lane belongs to one worker for
the whole fit, so its prefixes stay there, and is shuffled within itself every epoch. The
examples of a step are thus the same whether one worker takes them or eight: each example is
read exactly once an epoch, and shares differ by one example at most.

Pure arithmetic on numbers of examples; every worker computes the same schedule by itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from see_ray.config import FitConfig

PREFILL_TOKENS = 2048
"""Tokens, padding included, of one prefix batch; enough to keep a processor's units busy."""


class Schedule:
    """The steps of one fit. Iterating gives each step's example numbers over all workers.

    Args:
        prefix_lengths: tokens of each example's prefix; 0 in the full form.
        config: batch size, epochs and seed.
        world: number of workers.

    Attributes:
        steps: number of optimizer steps in all.
        steps_per_epoch: of which so many read every example once.
    """

    def __init__(self, prefix_lengths: Sequence[int], config: FitConfig, world: int):
        self._config = config
        self.world = world
        self.prefix_lengths = list(prefix_lengths)
        order = list(range(len(prefix_lengths)))
        random.Random(f"lanes {config.seed}").shuffle(order)
        width = min(config.train_batch_size, len(order))
        self._lanes = [order[lane::width] for lane in range(width)]
        self._worker = {number: index % world for index, lane in enumerate(self._lanes) for number in lane}
        self.steps_per_epoch = len(self._lanes[0])
        self.steps = config.num_train_epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        for epoch in range(self._config.num_train_epochs):
            lanes = [list(lane) for lane in self._lanes]
            for number, lane in enumerate(lanes):
                random.Random(f"epoch {self._config.seed} {epoch} {number}").shuffle(lane)
            for step in range(len(lanes[0])):
                yield [lane[step] for lane in lanes if step < len(lane)]

    def share(self, step: Sequence[int], rank: int) -> list[int]:
        """The part of a step's examples that a worker reads."""
        return [number for number in step if self._worker[number] == rank]

    def stand_in(self, rank: int) -> int:
        """The example with which a worker without a share takes part in collective operations."""
        return next((number for number, worker in self._worker.items() if worker == rank), 0)

    def prefill_batches(self, rank: int, budget_tokens: int) -> list[list[int]]:
        """Batches of similar length, of a worker's prefixes that are read ahead and kept.

        Args:
            rank: the worker.
            budget_tokens: most tokens to keep; the shortest prefixes come first.
        """
        batches: list[list[int]] = []
        kept = 0
        owned = (number for number, worker in self._worker.items() if worker == rank)
        for number in sorted(owned, key=lambda n: self.prefix_lengths[n]):
            length = self.prefix_lengths[number]
            kept += length
            if kept > budget_tokens:
                break
            if not batches or (len(batches[-1]) + 1) * length > PREFILL_TOKENS:
                batches.append([])
            batches[-1].append(number)
        return batches
