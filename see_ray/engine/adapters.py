"""LoRA weights of many experts in one base model, each row of a forward pass with its own.

They are stacked ([experts, in, r] and [experts, r, out]) in every linear layer that any of them adapts; each row
of a forward pass names the slot that applies to it. Slot 0 is all zeros: the generalist.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from see_ray.errors import ServingError


class AdapterBank:
    """All experts' LoRA weights, stacked in every linear layer that any of them adapts."""

    def __init__(self, model: Any):
        self._model = model
        self._layers: dict[str, _StackedLinear] = {}
        self._slots: dict[str, int] = {}
        self.rows: Tensor | int = 0  # slot of each row, or one slot for all rows

    def active(self, experts: Sequence[str | None]) -> _Rows:
        slots = [0 if name is None else self._slots[name] for name in experts]
        return _Rows(self, slots[0] if len(set(slots)) == 1 else torch.tensor(slots, device=self._model.device))

    def add(self, name: str, folder: Path) -> None:
        updates = _read_adapter(folder)
        taken = set(self._slots.values())
        slot = self._slots.get(name) or min(set(range(1, len(taken) + 2)) - taken)
        modules = dict(self._model.named_modules())
        for path, (down, up) in updates.items():
            linear = self._layers.get(path) or modules.get(path)
            inner = linear.linear if isinstance(linear, _StackedLinear) else linear
            if not isinstance(inner, nn.Linear):
                raise ServingError(
                    f"the adapter in {folder} changes {path}, which is no linear layer of this base model; "
                    "it was made for another one"
                )
            if (inner.in_features, inner.out_features) != (down.shape[0], up.shape[1]):
                raise ServingError(
                    f"the adapter in {folder} has shape {down.shape[0]}x{up.shape[1]} at {path}, the base model "
                    f"{inner.in_features}x{inner.out_features}; it was made for another one"
                )
        for path, (down, up) in updates.items():
            if path not in self._layers:
                parent, _, child = path.rpartition(".")
                self._layers[path] = _StackedLinear(modules[path], self)
                setattr(modules[parent], child, self._layers[path])
            self._layers[path].put(slot, down, up)
        self._slots[name] = slot

    def remove(self, name: str) -> None:
        slot = self._slots.pop(name)
        for layer in self._layers.values():
            layer.clear(slot)


class _Rows:
    """Names the active slot of each row for the forward passes inside a `with` block."""

    def __init__(self, bank: AdapterBank, rows: Tensor | int):
        self._bank, self._rows = bank, rows

    def __enter__(self) -> None:
        self._bank.rows = self._rows

    def __exit__(self, *_: object) -> None:
        self._bank.rows = 0


class _StackedLinear(nn.Module):
    """A linear layer with a stack of low-rank updates, one slot an expert, slot 0 zero."""

    def __init__(self, linear: nn.Linear, bank: AdapterBank):
        super().__init__()
        self.linear = linear
        self._bank = bank
        weight = linear.weight
        self.down = weight.new_zeros(1, linear.in_features, 1)
        self.up = weight.new_zeros(1, 1, linear.out_features)

    def put(self, slot: int, down: Tensor, up: Tensor) -> None:
        slots, rank = max(slot + 1, self.down.shape[0]), max(down.shape[1], self.down.shape[2])
        new_down = self.down.new_zeros(slots, self.down.shape[1], rank)
        new_up = self.up.new_zeros(slots, rank, self.up.shape[2])
        new_down[: self.down.shape[0], :, : self.down.shape[2]] = self.down
        new_up[: self.up.shape[0], : self.up.shape[1]] = self.up
        new_down[slot], new_up[slot] = 0, 0
        new_down[slot, :, : down.shape[1]] = down
        new_up[slot, : up.shape[0]] = up
        self.down, self.up = new_down, new_up

    def clear(self, slot: int) -> None:
        if slot < self.down.shape[0]:
            self.down[slot], self.up[slot] = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        rows = self._bank.rows
        y = self.linear(x)
        if isinstance(rows, int):
            if rows == 0 or rows >= self.down.shape[0]:
                return y
            return y + (x @ self.down[rows]) @ self.up[rows]
        slots = rows.where(rows < self.down.shape[0], 0)
        return y + torch.bmm(torch.bmm(x, self.down[slots]), self.up[slots])


def _read_adapter(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A PEFT LoRA folder as {module path: (down [in, r], up [r, out], scale folded in)}."""
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise ServingError(f"cannot read the adapter in {folder}: {error}") from error
    unsupported = [key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none" or unsupported:
        raise ServingError(f"the adapter in {folder} is not plain LoRA ({unsupported or config.get('peft_type')})")
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    updates = {}
    for key, value in weights.items():
        path, _, kind = key.removeprefix("base_model.model.").partition(".lora_")
        if kind == "A.weight":
            up = weights[key.replace(".lora_A.", ".lora_B.")]
            updates[path] = (value.T, up.T * scale)
        elif kind != "B.weight":
            raise ServingError(f"the adapter in {folder} has {key}, which is not a LoRA weight")
    if not updates:
        raise ServingError(f"the adapter in {folder} holds no weights")
    return updates
