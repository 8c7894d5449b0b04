"""Keys and values of the prefixes of a rank's examples: computed once, kept in host memory, used in every epoch.

An adapter does not apply before the activation point, so a prefix's keys and values never change during a fit.
They are computed without gradient. Those that do not fit `fit.kv_store_gb` are computed again each time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from see_ray.config import FitConfig
from see_ray.data.reconstruct import Example
from see_ray.fit.rank_model import RankModel
from see_ray.fit.report import Progress, Report
from see_ray.fit.schedule import Schedule
from see_ray.models.prefix_kv import Prefix, kv_bytes_per_token


class PrefixCache:
    """Keys and values of one rank's prefixes.

    Args:
        model: reads them.
        examples: of the whole fit.
        schedule: says which rank reads which examples.
        config: gives the memory, and the number type of what is kept.

    Attributes:
        free_tokens: tokens that still fit the memory of the rank that keeps the most.
    """

    def __init__(self, model: RankModel, examples: Sequence[Example], schedule: Schedule, config: FitConfig):
        self._model, self._examples, self._schedule = model, examples, schedule
        transformer = model.transformer
        self._dtype = torch.bfloat16 if config.kv_store_dtype == "bfloat16" else transformer.dtype
        budget = int(config.kv_store_gb * 1e9 / kv_bytes_per_token(transformer, self._dtype))
        # Of all ranks, since every rank must know when another one has to read a prefix again.
        self._plans = [schedule.prefill_batches(rank, budget) for rank in range(schedule.world_size)]
        self._planned = {index for plan in self._plans for batch in plan for index in batch}
        used = (sum(schedule.prefix_lengths[index] for batch in plan for index in batch) for plan in self._plans)
        self.free_tokens = budget - max(used, default=0)
        self._kept: dict[int, Tensor] = {}
        self._hits = self._lookups = 0

    def fill(self, report: Report) -> None:
        """Read and keep the prefixes of this rank's examples, as many as the memory may hold. Collective."""
        activated = self._model.activation.tokens is not None
        plans = self._plans if activated else [[] for _ in self._plans]
        plan = plans[self._model.rank]
        rounds = max(map(len, plans)) if self._model.forward_is_collective else len(plan)
        for number in range(rounds):
            report(Progress("prefix", number, rounds))
            if number < len(plan):
                self._kept |= self._read(plan[number])
            else:
                self._read([self._schedule.stand_in(self._model.rank)])

    def is_planned(self, index: int) -> bool:
        """Whether the rank of an example keeps its prefix."""
        return index in self._planned

    def get(self, indices: Sequence[int], all_planned: bool) -> Prefix:
        """Prefixes of examples as one padded batch on the model's device. Collective under ZeRO 3.

        Args:
            indices: of this rank's examples.
            all_planned: whether all ranks keep all prefixes that they now ask for.
        """
        if self._model.activation.tokens is None:
            return Prefix((), (0,) * len(indices))
        missing = [index for index in indices if index not in self._kept]
        self._lookups += len(indices)
        self._hits += len(indices) - len(missing)
        packed = self._kept
        if missing or (self._model.forward_is_collective and not all_planned):
            packed = {**self._kept, **self._read(missing or indices[:1])}
        return self._unpack([packed[index] for index in indices])

    def hit_rate(self) -> float:
        """Share of prefixes that were kept and not read again."""
        return round(self._hits / self._lookups, 4) if self._lookups else 0.0

    def _read(self, indices: Sequence[int]) -> dict[int, Tensor]:
        prefix = self._model.prefill([self._model.split(self._examples[index])[0] for index in indices])
        return {index: self._pack(prefix, row) for row, index in enumerate(indices)}

    def _pack(self, prefix: Prefix, row: int) -> Tensor:
        """One row's keys and values in host memory, pinned if the model is on a GPU: [2 x layers, heads, tokens, head
        size]. PyTorch rounds the size of a pinned tensor up to a power of two."""
        length = prefix.lengths[row]
        packed = torch.stack([kv[row, :, :length] for layer in prefix.layers for kv in layer]).to(self._dtype)
        if packed.device.type == "cpu":
            return packed
        return torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True).copy_(packed)

    def _unpack(self, rows: list[Tensor]) -> Prefix:
        """Packed rows as one batch, padded on the model's device."""
        lengths = tuple(row.shape[2] for row in rows)
        kv_layers, heads, _, head_size = rows[0].shape
        device, dtype = self._model.transformer.device, self._model.transformer.dtype
        padded = torch.zeros(kv_layers, len(rows), heads, max(lengths), head_size, dtype=dtype, device=device)
        for index, row in enumerate(rows):
            padded[:, index, :, : row.shape[2]] = row.to(device, non_blocking=True)
        return Prefix(tuple((padded[i], padded[i + 1]) for i in range(0, padded.shape[0], 2)), lengths)
