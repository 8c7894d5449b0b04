"""Bounded memory for the keys and values of running requests.

Each request has a *slot*: room for its prompt and for all tokens that it may generate. Slots of one size are rows of
one tensor per layer, a *block*, so that a decode step attends for many requests in one call and copies nothing. A
request for which there is no room waits until another one ends.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SLOT_TOKENS = 256
"""Tokens of the smallest slot. Larger ones are this times a power of two."""

BLOCK_TOKENS = 8192
"""Tokens of a block, unless a single slot is larger."""

MAX_BLOCK_SLOTS = 16
"""Most slots of a block."""

Layers = Sequence[tuple[Tensor, Tensor]]
"""One (key, value) pair per layer, each [rows, heads, tokens, head size]."""


class KVCacheBlock:
    """Slots of one size.

    Attributes:
        layers: one (key, value) pair per layer, each [slots, heads, slot tokens, head size].
        num_slots: slots of the block.
        slot_tokens: tokens of a slot.
        free_rows: rows that no slot occupies, ascending.
    """

    def __init__(self, like: Layers, num_slots: int, slot_tokens: int):
        # Zeros, not uninitialized memory: a masked NaN would still spoil the weighted sum.
        self.layers = [
            (
                _zeros(key, num_slots, key.shape[1], slot_tokens, key.shape[3]),
                _zeros(value, num_slots, value.shape[1], slot_tokens, value.shape[3]),
            )
            for key, value in like
        ]
        self.num_slots, self.slot_tokens = num_slots, slot_tokens
        self.free_rows = list(range(num_slots))


@dataclass
class KVCacheSlot:
    """One request's row of a block, and the number of tokens in it."""

    block: KVCacheBlock
    row: int
    length: int = 0

    def append(self, layers: Layers, row: int = 0) -> None:
        """Copy keys and values of further tokens, from one row of `layers`, after those in the slot."""
        end = self.length + layers[0][0].shape[2]
        for (keys, values), (key, value) in zip(self.block.layers, layers, strict=True):
            keys[self.row, :, self.length : end] = key[row]
            values[self.row, :, self.length : end] = value[row]
        self.length = end


class KVCache:
    """All slots.

    Args:
        max_tokens: most tokens of all blocks together.
        like: keys and values of the model, whose heads, head size, dtype and device the blocks take.
    """

    def __init__(self, max_tokens: int, like: Layers):
        self.max_tokens = max_tokens
        self._like = like
        self._blocks: list[KVCacheBlock] = []

    @property
    def allocated_tokens(self) -> int:
        """Tokens of the blocks that exist now."""
        return sum(block.num_slots * block.slot_tokens for block in self._blocks)

    def fits(self, num_tokens: int) -> bool:
        """Whether a request of that many tokens, prompt included, can ever have a slot."""
        return _slot_tokens(num_tokens) <= self.max_tokens

    def allocate(self, num_tokens: int) -> KVCacheSlot | None:
        """A slot for a request of at most `num_tokens` tokens, prompt included; None while there is no room."""
        size = _slot_tokens(num_tokens)
        for block in self._blocks:
            if block.slot_tokens == size and block.free_rows:
                return KVCacheSlot(block, block.free_rows.pop(0))
        # A block takes a quarter of the memory at most, so that slots of several sizes can exist side by side.
        num_slots = max(1, min(MAX_BLOCK_SLOTS, BLOCK_TOKENS // size, self.max_tokens // 4 // size))
        if self.allocated_tokens + num_slots * size > self.max_tokens:
            self._blocks = [block for block in self._blocks if len(block.free_rows) < block.num_slots]
        num_slots = min(num_slots, (self.max_tokens - self.allocated_tokens) // size)
        if num_slots < 1:
            return None
        block = KVCacheBlock(self._like, num_slots, size)
        self._blocks.append(block)
        return KVCacheSlot(block, block.free_rows.pop(0))

    def free(self, slot: KVCacheSlot) -> None:
        """Make a slot available to other requests."""
        slot.block.free_rows.append(slot.row)
        slot.block.free_rows.sort()  # low rows are taken first, so that those in use are next to each other


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros of the dtype and device of `like`. On a CPU they are mapped memory, which the operating system provides
    page by page as it is written to; `torch.zeros` would write all of it."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    memory = mmap.mmap(-1, math.prod(shape) * like.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def _slot_tokens(num_tokens: int) -> int:
    size = MIN_SLOT_TOKENS
    while size < num_tokens:
        size *= 2
    return size
