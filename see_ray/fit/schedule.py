"""Which examples each batch of a fit reads, and on which rank, for any number of ranks.

Examples are distributed over as many *lanes* as a batch has examples; a batch takes one example of each lane. A lane
belongs to one rank for the whole fit, so its prefixes stay on that rank, and the order within a lane is shuffled every
epoch. So a batch has the same examples for any number of ranks, each example is read exactly once an epoch, and the
ranks' parts of a batch differ by one example at most.

The schedule is computed from indices of examples alone; every rank computes the same one.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from see_ray.config import FitConfig

PREFILL_TOKENS = 2048
"""Most tokens, padding included, in one forward over prefixes; enough to keep a processor's units busy."""


class Schedule:
    """The batches of one fit. Iterating gives each batch's example indices, over all ranks.

    Args:
        prefix_lengths: tokens of each example's prefix; 0 in the full form.
        config: batch size, epochs and seed.
        world_size: number of ranks.

    Attributes:
        steps: number of batches in all; each is one optimizer step.
        steps_per_epoch: number of batches that together read every example once.
    """

    def __init__(self, prefix_lengths: Sequence[int], config: FitConfig, world_size: int):
        self._config = config
        self.world_size = world_size
        self.prefix_lengths = list(prefix_lengths)
        order = list(range(len(prefix_lengths)))
        random.Random(f"lanes {config.seed}").shuffle(order)
        width = min(config.train_batch_size, len(order))
        self._lanes = [order[lane::width] for lane in range(width)]
        self._rank = {index: number % world_size for number, lane in enumerate(self._lanes) for index in lane}
        self.steps_per_epoch = len(self._lanes[0])
        self.steps = config.num_train_epochs * self.steps_per_epoch

    def __iter__(self) -> Iterator[list[int]]:
        for epoch in range(self._config.num_train_epochs):
            lanes = [list(lane) for lane in self._lanes]
            for number, lane in enumerate(lanes):
                random.Random(f"epoch {self._config.seed} {epoch} {number}").shuffle(lane)
            for step in range(len(lanes[0])):
                yield [lane[step] for lane in lanes if step < len(lane)]

    def part(self, batch: Sequence[int], rank: int) -> list[int]:
        """A rank's part of a batch."""
        return [index for index in batch if self._rank[index] == rank]

    def stand_in(self, rank: int) -> int:
        """The example that a rank without a part reads, without effect, to take part in collective operations."""
        return next((index for index, reader in self._rank.items() if reader == rank), 0)

    def prefill_batches(self, rank: int, budget_tokens: int) -> list[list[int]]:
        """Batches of similar length, of those of a rank's prefixes that are read ahead and kept.

        Args:
            rank: that reads them.
            budget_tokens: most tokens to keep; the shortest prefixes come first.
        """
        batches: list[list[int]] = []
        kept = 0
        of_rank = (index for index, reader in self._rank.items() if reader == rank)
        for index in sorted(of_rank, key=lambda index: self.prefix_lengths[index]):
            length = self.prefix_lengths[index]
            kept += length
            if kept > budget_tokens:
                break
            if not batches or (len(batches[-1]) + 1) * length > PREFILL_TOKENS:
                batches.append([])
            batches[-1].append(index)
        return batches
