"""Memory for keys and values: bounded, shared by slots of several sizes, mapped as it is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from see_ray.engine.kv_cache import MIN_SLOT_TOKENS, KVCache

LIKE = [(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_slot_is_taken_only_as_it_is_written_to() -> None:
    def anonymous_kb() -> int:
        """Kilobytes of memory that belong to this process alone."""
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    like = [(torch.zeros(1, 4, 1, 64),) * 2] * 8
    written = [(torch.ones(1, 4, 1000, 64),) * 2] * 8  # 16 MB of a block of 128
    before = anonymous_kb()
    slot = KVCache(1 << 20, like).allocate(1024)
    assert slot is not None
    assert anonymous_kb() - before < 4_000
    slot.append(written)
    assert 12_000 < anonymous_kb() - before < 24_000


def test_a_slot_grows_by_what_is_appended() -> None:
    slot = KVCache(1024, LIKE).allocate(10)
    assert slot is not None
    slot.append([(torch.full((1, 2, 3, 4), 1.0), torch.full((1, 2, 3, 4), 2.0))])
    slot.append([(torch.full((2, 2, 2, 4), 3.0), torch.full((2, 2, 2, 4), 4.0))], row=1)
    keys, values = slot.block.layers[0]
    assert slot.length == 5
    assert keys[slot.row, 0, :6, 0].tolist() == [1, 1, 1, 3, 3, 0]
    assert values[slot.row, 0, :6, 0].tolist() == [2, 2, 2, 4, 4, 0]


def test_slots_never_take_more_than_there_is() -> None:
    kv_cache = KVCache(4 * MIN_SLOT_TOKENS, LIKE)
    slots = []
    while (slot := kv_cache.allocate(10)) is not None:
        slots.append(slot)
    assert len(slots) == 4
    assert kv_cache.allocated_tokens == 4 * MIN_SLOT_TOKENS
    assert len({(id(slot.block), slot.row) for slot in slots}) == 4
    kv_cache.free(slots[0])
    assert kv_cache.allocate(10) is not None


def test_unused_blocks_give_way_to_slots_of_another_size() -> None:
    kv_cache = KVCache(4 * MIN_SLOT_TOKENS, LIKE)
    small = [kv_cache.allocate(10) for _ in range(4)]
    assert kv_cache.allocate(4 * MIN_SLOT_TOKENS) is None
    for slot in small:
        assert slot is not None
        kv_cache.free(slot)
    large = kv_cache.allocate(4 * MIN_SLOT_TOKENS)
    assert large is not None
    assert large.block.slot_tokens == 4 * MIN_SLOT_TOKENS


def test_what_can_never_have_a_slot_is_known() -> None:
    kv_cache = KVCache(2 * MIN_SLOT_TOKENS, LIKE)
    assert kv_cache.fits(2 * MIN_SLOT_TOKENS)
    assert not kv_cache.fits(2 * MIN_SLOT_TOKENS + 1)
