"""Checkpoints of a running fit: what it needs to resume after anything was killed.

    <fit>/00000120-3f9c….safetensors     one object a checkpoint: step and SHA-256 of its bytes in the name

A checkpoint is written in one put, which is atomic in a folder and on object storage alike: it is complete or absent.
The digest shows damage that came later; then the checkpoint before it is used. Only the newest two are kept. Ray
Train's own checkpoints have neither a digest nor a predecessor to fall back on, and belong to one run's name; here
they only hand the finished adapter to the driver.

A checkpoint holds whole float32 tensors by parameter name, so any number of ranks can resume from it.
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
"""Checkpoints of one fit that are kept: the newest and the one before it."""

_STATE_KEY = "position"
"""Key of the `TrainState` in the file's metadata."""

_NAME = re.compile(r"([0-9]{8})-([0-9a-f]{64})\.safetensors")


@dataclass
class TrainState:
    """State of a fit other than its tensors. Field names are part of the checkpoint format.

    Attributes:
        step: optimizer steps taken.
        reads: how often each example was read, by its index.
        indicator_losses, response_losses: of each step.
        tokens: prompt and response tokens of all examples read.
        seconds: of steps and prefixes, over all starts.
        resumed: starts from a checkpoint.
        evaluations: on held-out rows, oldest first.
        scheduler: state of the learning-rate scheduler.
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
        fit: path of this fit's checkpoints below it.
    """

    def __init__(self, url: str, fit: str):
        self._store, self._url = open_object_store(url, "the checkpoints")
        self._fit = fit

    def save(self, state: TrainState, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint, then delete the oldest.

        Raises:
            StoreError: it could not be written (no space, for example); older ones are still there.
        """
        from safetensors.torch import save

        data = save(tensors, metadata={_STATE_KEY: json.dumps(asdict(state))})
        path = f"{self._fit}/{state.step:08d}-{hashlib.sha256(data).hexdigest()}.safetensors"
        with wrap_store_errors("write the checkpoints", self._url):
            obstore.put(self._store, path, data)
            for old in self._paths()[KEPT:]:
                obstore.delete(self._store, old)

    def load(self, note: Callable[[str], None]) -> tuple[TrainState, dict[str, Tensor]] | None:
        """The newest intact checkpoint; None if there is none.

        Args:
            note: called with a message for each damaged checkpoint.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        for path in self._paths():
            try:
                with wrap_store_errors("read the checkpoints", self._url):
                    data = bytes(obstore.get(self._store, path).bytes())
                digest = hashlib.sha256(data).hexdigest()
                if digest not in path:
                    raise ValueError(f"its {len(data)} bytes have the digest {digest[:12]}")
                # safetensors reads metadata from files only; the header is JSON, after its length in 8 bytes.
                header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
                return TrainState(**json.loads(header["__metadata__"][_STATE_KEY])), load(data)
            except (StoreError, SafetensorError, ValueError, KeyError, TypeError) as error:
                note(f"the checkpoint {path} is corrupt and is skipped: {error}")
        return None

    def clear(self) -> None:
        """Delete all checkpoints of this fit."""
        with wrap_store_errors("delete from the checkpoints", self._url):
            for path in self._paths():
                obstore.delete(self._store, path)

    def steps(self) -> list[int]:
        """Steps of the checkpoints, newest first."""
        return [int(path.rpartition("/")[2][:8]) for path in self._paths()]

    def _paths(self) -> list[str]:
        with wrap_store_errors("list the checkpoints", self._url):
            paths = [item["path"] for item in obstore.list(self._store, self._fit).collect()]
        return sorted((path for path in paths if _NAME.fullmatch(path.rpartition("/")[2])), reverse=True)
