"""Memory for the keys and values of answers in progress.

Each answer has a *slot*: room for its prompt and for all tokens that it may have. Slots of one size stand side
by side in one tensor a layer, a *shelf*, so that a step attends over many answers in one call without copying
anything. The memory is bounded: an answer for which there is no room waits until another one ends.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

SMALLEST = 256
"""Tokens of the smallest slot; the others are larger by powers of two."""

SHELF_TOKENS = 8192
"""Tokens that a shelf holds together, one slot at least."""

MOST_ROWS = 16
"""Most slots of a shelf."""

Layers = Sequence[tuple[Tensor, Tensor]]


class KVCacheBlock:
    """Slots of one size.

    Attributes:
        layers: one (key, value) pair a layer, each [slots, heads, size, head size].
        size: tokens of a slot.
    """

    def __init__(self, like: Layers, rows: int, size: int):
        # Zeros, not whatever is there: a masked value that is not a number would still spoil the sum.
        self.layers = [
            (_zeros(k, rows, k.shape[1], size, k.shape[3]), _zeros(v, rows, v.shape[1], size, v.shape[3]))
            for k, v in like
        ]
        self.size = size
        self.free = list(range(rows))
        self.rows = rows


@dataclass
class Slot:
    """One answer's place: a row of a shelf, and how many tokens stand in it."""

    shelf: KVCacheBlock
    row: int
    length: int = 0

    def append(self, layers: Layers, row: int = 0) -> None:
        """Copy keys and values, each [rows, heads, tokens, head size], behind what stands here."""
        count = layers[0][0].shape[2]
        for (keys, values), (k, v) in zip(self.shelf.layers, layers, strict=True):
            keys[self.row, :, self.length : self.length + count] = k[row]
            values[self.row, :, self.length : self.length + count] = v[row]
        self.length += count


@dataclass
class SlotPool:
    """All slots.

    Attributes:
        tokens: most tokens of all shelves together.
    """

    tokens: int
    _shelves: list[KVCacheBlock] = field(default_factory=list)

    @property
    def reserved(self) -> int:
        """Tokens of all shelves that there are."""
        return sum(shelf.rows * shelf.size for shelf in self._shelves)

    def fits(self, length: int) -> bool:
        """Whether an answer of that many tokens, prompt included, can ever have a slot."""
        return _size(length) <= self.tokens

    def take(self, length: int, like: Layers) -> Slot | None:
        """A slot for `length` tokens; None while there is no room.

        Args:
            length: tokens of prompt and answer together, at most.
            like: keys and values whose shapes and type the slot's have.
        """
        size = _size(length)
        for shelf in self._shelves:
            if shelf.size == size and shelf.free:
                return Slot(shelf, shelf.free.pop(0))
        # A quarter of the memory at most, so that answers of all lengths find room beside each other.
        rows = max(1, min(MOST_ROWS, SHELF_TOKENS // size, self.tokens // 4 // size))
        if self.reserved + rows * size > self.tokens:
            self._shelves = [shelf for shelf in self._shelves if len(shelf.free) < shelf.rows]
        rows = min(rows, (self.tokens - self.reserved) // size)
        if rows < 1:
            return None
        self._shelves.append(KVCacheBlock(like, rows, size))
        return Slot(self._shelves[-1], self._shelves[-1].free.pop(0))

    def give_back(self, slot: Slot) -> None:
        """The answer has ended."""
        slot.shelf.free.append(slot.row)
        slot.shelf.free.sort()  # low rows first, so that those in use stand together


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """A tensor of zeros. On a CPU its memory is mapped, so that the operating system gives it only as it is written
    to; PyTorch's own zeros are all written."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    memory = mmap.mmap(-1, math.prod(shape) * like.element_size(), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def _size(length: int) -> int:
    size = SMALLEST
    while size < length:
        size *= 2
    return size


def bytes_per_token(layers: Layers) -> int:
    """Bytes of one token's keys and values in all layers."""
    return sum(t.shape[1] * t.shape[3] * t.element_size() for pair in layers for t in pair)


def of_tokens(layers: Layers, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
    """Some tokens' keys and values (views)."""
    return [(k[:, :, start:stop], v[:, :, start:stop]) for k, v in layers]


def joined(first: Layers | None, second: Layers) -> list[tuple[Tensor, Tensor]]:
    """Two runs of tokens as one (copies)."""
    if not first:
        return [(k.clone(), v.clone()) for k, v in second]
    return [(torch.cat([a, k], dim=2), torch.cat([b, v], dim=2)) for (a, b), (k, v) in zip(first, second, strict=True)]
