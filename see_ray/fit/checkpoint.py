"""Checkpoints of a running fit: what it needs to go on after anything was killed.

    <fit>/00000120-3f9c….safetensors     one object a checkpoint: step and SHA-256 of its bytes in the name

Written in one put, which is atomic in a folder and on object storage alike, so that a checkpoint is whole or
not there; the digest finds what went bad afterwards, and then the one before it is used. Only the newest two
are kept. Ray Train's own checkpoints, which hand the finished adapter to the driver, know neither a check nor
an older one to fall back on, and are bound to one run's name.

A checkpoint holds full float32 tensors by parameter name: it does not know how many workers wrote it, and
any number can go on from it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import obstore

from see_ray.errors import StoreError
from see_ray.store.object_store import open_object_store, wrap_store_errors

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 2
"""Checkpoints of one fit that are kept: the newest, and the one before it."""

_NAME = re.compile(r"([0-9]{8})-([0-9a-f]{64})\.safetensors")


@dataclass
class TrainState:
    """Where a fit stands, apart from its tensors.

    Attributes:
        step: optimizer steps taken.
        reads: how often each example was read, by its number.
        indicator_losses, response_losses: of each step.
        tokens: prompt and response tokens of all examples read.
        seconds: spent in steps and prefixes, over all starts.
        resumed: starts from a checkpoint.
        evaluations: what was measured on held-out rows, oldest first.
        scheduler: state of the learning rate's schedule.
    """

    step: int = 0
    reads: list[int] = field(default_factory=list)
    indicator_losses: list[float] = field(default_factory=list)
    response_losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    resumed: int = 0
    evaluations: list[dict[str, float]] = field(default_factory=list)
    scheduler: dict[str, Any] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one fit.

    Args:
        url: a folder or object storage that all workers reach.
        fit: names the fit; the same data and settings have the same name.
    """

    def __init__(self, url: str, fit: str):
        self._store, self._url = open_object_store(url, "the checkpoints")
        self._fit = fit

    def save(self, position: TrainState, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint, then delete those that are no longer kept.

        Raises:
            StoreError: it could not be written (no room, for example); older ones are still there.
        """
        from safetensors.torch import save

        data = save(tensors, metadata={"position": json.dumps(asdict(position))})
        path = f"{self._fit}/{position.step:08d}-{hashlib.sha256(data).hexdigest()}.safetensors"
        with wrap_store_errors("write the checkpoints", self._url):
            obstore.put(self._store, path, data)
            for old in self._paths()[KEPT:]:
                obstore.delete(self._store, old)

    def load(self, tell: Callable[[str], None]) -> tuple[TrainState, dict[str, Tensor]] | None:
        """The newest sound checkpoint; None if there is none.

        Args:
            tell: hears of checkpoints that had to be passed over, and why.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        for path in self._paths():
            try:
                with wrap_store_errors("read the checkpoints", self._url):
                    data = bytes(obstore.get(self._store, path).bytes())
                found = hashlib.sha256(data).hexdigest()
                if found not in path:
                    raise ValueError(f"its {len(data)} bytes have the digest {found[:12]}")
                length = int.from_bytes(data[:8], "little")
                position = TrainState(**json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["position"]))
                return position, load(data)
            except (StoreError, SafetensorError, ValueError, KeyError, TypeError) as error:
                tell(f"the checkpoint {path} is corrupt and passed over: {error}")
        return None

    def clear(self) -> None:
        """Delete all checkpoints of this fit."""
        with wrap_store_errors("delete from the checkpoints", self._url):
            for path in self._paths():
                obstore.delete(self._store, path)

    def steps(self) -> list[int]:
        """The steps of the checkpoints that are there, newest first."""
        return [int(path.rpartition("/")[2][:8]) for path in self._paths()]

    def _paths(self) -> list[str]:
        with wrap_store_errors("list the checkpoints", self._url):
            found = [item["path"] for item in obstore.list(self._store, self._fit).collect()]
        return sorted((path for path in found if _NAME.fullmatch(path.rpartition("/")[2])), reverse=True)
