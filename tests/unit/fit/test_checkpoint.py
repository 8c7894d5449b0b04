"""Checkpoints of a fit: whole or not there, checked, bounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from see_ray.errors import StoreError
from see_ray.fit.checkpoint import KEPT, Checkpoints, TrainState

TENSORS = {"weights.a": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(4.0)}
STATE = TrainState(step=4, reads=[1, 2, 1], indicator_losses=[0.5], response_losses=[1.5], scheduler={"last": 3})


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(str(tmp_path), "checkpoints/sa-1234")


def nothing(note: str) -> None:
    raise AssertionError(note)


def loaded(checkpoints: Checkpoints, note: Callable[[str], None] = nothing) -> tuple[TrainState, dict[str, Tensor]]:
    found = checkpoints.load(note)
    assert found is not None
    return found


def test_what_is_saved_is_loaded(checkpoints: Checkpoints) -> None:
    checkpoints.save(STATE, TENSORS)
    state, tensors = loaded(checkpoints)
    assert state == STATE
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)


def test_there_is_none_at_first(checkpoints: Checkpoints) -> None:
    assert checkpoints.load(nothing) is None


def test_the_newest_is_loaded(checkpoints: Checkpoints) -> None:
    for step in (2, 30, 4):
        checkpoints.save(replace(STATE, step=step), TENSORS)
    assert loaded(checkpoints)[0].step == 30


def test_only_the_newest_are_kept(checkpoints: Checkpoints) -> None:
    for step in range(1, 8):
        checkpoints.save(replace(STATE, step=step), TENSORS)
    assert checkpoints.steps() == [7, 6]
    assert KEPT == 2


def test_fits_do_not_see_each_others(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(STATE, TENSORS)
    assert Checkpoints(str(tmp_path), "checkpoints/sa-5678").load(nothing) is None


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty"])
def test_a_corrupt_one_is_passed_over_for_the_one_before(checkpoints: Checkpoints, tmp_path: Path, harm: str) -> None:
    for step in (1, 2):
        checkpoints.save(replace(STATE, step=step), TENSORS)
    newest = next(tmp_path.rglob("00000002-*"))
    data = newest.read_bytes()
    changed = {"cut": data[: len(data) // 2], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "empty": b""}[harm]
    newest.write_bytes(changed)
    notes: list[str] = []
    assert loaded(checkpoints, notes.append)[0].step == 1
    assert len(notes) == 1
    assert "00000002" in notes[0]
    assert "corrupt" in notes[0]


def test_where_all_are_corrupt_there_is_none(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(STATE, TENSORS)
    next(tmp_path.rglob("00000004-*")).write_bytes(b"?")
    assert checkpoints.load(lambda note: None) is None


def test_a_half_written_one_is_none(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(STATE, TENSORS)
    newest = next(tmp_path.rglob("00000004-*"))
    newest.with_name(newest.name + "#1").write_bytes(b"unfinished")  # as obstore names what it has not yet renamed
    assert checkpoints.steps() == [4]


def test_a_full_disk_leaves_the_one_before(tmp_path: Path) -> None:
    """On a file system of its own, 1 MB large; needs the right to mount one."""
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        checkpoints = Checkpoints(str(small), "checkpoints/sa-1234")
        checkpoints.save(replace(STATE, step=1), TENSORS)
        with pytest.raises(StoreError, match="there is room"):
            checkpoints.save(replace(STATE, step=2), {"weights.a": torch.zeros(1 << 20)})
        assert loaded(checkpoints)[0].step == 1
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_clearing_leaves_nothing_of_the_fit(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoints.save(STATE, TENSORS)
    checkpoints.clear()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
