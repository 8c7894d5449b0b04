"""LoRA weights of many experts in one base model, each token of a forward pass with its own.

They are stacked ([slots, r, in] and [slots, r, out]) in every linear layer that any of them adapts; each token
of a pass names the slot that applies to it. Slot 0 is nobody's: the base model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from see_ray.engine.kernels import are_few
from see_ray.errors import ServingError

ALONE = 32
"""Tokens of one expert in a pass from which it is computed by itself rather than padded with the others."""

SPARSE = 2
"""A stretch of slots is read whole where it has at most this many times the slots that are wanted; else those are
copied out of it."""

FLOAT_SLOTS, FLOAT_TOKENS = 64, 64
"""Up to so many slots and tokens the product is made in float32 on a CPU, whatever the weights are kept in: one of a
token and a bfloat16 adapter takes 16 microseconds to start there, widening it and multiplying in float32 takes 4. For
5 to 50 slots with a token each that is 15 to 40 % faster, with one thread and with two; with two tokens each it is
about equal."""


class AdapterBank:
    """All experts' LoRA weights, stacked in every linear layer that any of them adapts."""

    def __init__(self, model: Any):
        self._model = model
        self._layers: dict[str, _StackedLinear] = {}
        self._slots: dict[str, int] = {}
        self._room = 1
        self.use: LoraMapping | None = None

    def slot(self, name: str | None) -> int:
        """An expert's slot; None is the base model's."""
        return 0 if name is None else self._slots[name]

    @contextmanager
    def applied(self, slots: Sequence[int]) -> Iterator[None]:
        """The forward pass inside applies to each of its tokens the adapter in that slot."""
        self.use = LoraMapping.of(slots, self._model)
        try:
            yield
        finally:
            self.use = None

    def add(self, name: str, folder: Path) -> None:
        """Read an expert's PEFT folder, in the place of one of the same name.

        Raises:
            ServingError: it does not fit this base model, or is no plain LoRA.
        """
        updates = read_adapter(folder)
        linear = linear_layers(self._model)
        for path, (down, up) in updates.items():
            inner = linear.get(path)
            if inner is None:
                raise ServingError(
                    f"the adapter in {folder} changes {path}, which is no hidden linear layer of this base model; "
                    "it was made for another one"
                )
            if (inner.in_features, inner.out_features) != (down.shape[1], up.shape[1]):
                raise ServingError(
                    f"the adapter in {folder} has shape {down.shape[1]}x{up.shape[1]} at {path}, the base model "
                    f"{inner.in_features}x{inner.out_features}; it was made for another one"
                )
        slot = self._slots.get(name) or min(set(range(1, len(self._slots) + 2)) - set(self._slots.values()))
        while self._room <= slot:
            self._room *= 2
        for path in updates.keys() - self._layers.keys():
            parent, _, child = path.rpartition(".")
            self._layers[path] = _StackedLinear(linear[path], self)
            setattr(self._model.get_submodule(parent), child, self._layers[path])
        for path, layer in self._layers.items():
            layer.put(slot, updates.get(path), self._room)
        self._slots[name] = slot

    def remove(self, name: str) -> None:
        """Forget an expert; its slot is free."""
        slot = self._slots.pop(name)
        for layer in self._layers.values():
            layer.put(slot, None, self._room)


@dataclass(frozen=True)
class _Update:
    """What a group of tokens adds to a linear layer's output.

    Attributes:
        tokens: a stretch of them, as many for each slot; or [slots x most tokens of one], padded with 0.
        slots: a stretch of slots, or their numbers.
        count: how many slots.
        floats: the product is made in float32.
        real: the places of `tokens` that are not padding; None if all are.
        flat: the tokens at these places; None for a stretch.
    """

    tokens: slice | Tensor
    slots: slice | Tensor
    count: int
    floats: bool
    real: Tensor | None = None
    flat: Tensor | None = None

    def add(self, inputs: Tensor, outputs: Tensor, down: Tensor, up: Tensor) -> None:
        """[tokens, in] and [tokens, out] of all tokens; down [slots, r, in] and up [slots, r, out] of all slots."""
        x = inputs[self.tokens] if isinstance(self.tokens, slice) else inputs.index_select(0, self.tokens)
        down, up = down[self.slots], up[self.slots]
        if self.floats:
            x, down, up = x.float(), down.float(), up.float()
        if self.count == 1:
            made = x @ down[0].T @ up[0]
        else:
            made = torch.bmm(torch.bmm(x.unflatten(0, (self.count, -1)), down.transpose(1, 2)), up).flatten(0, 1)
        if self.flat is None:
            outputs[self.tokens].add_(made)
        else:
            made = made if self.real is None else made.index_select(0, self.real)
            outputs.index_add_(0, self.flat, made.to(outputs.dtype))


@dataclass(frozen=True)
class _Single:
    """One token of a pass of very few, in two products of a matrix and a vector."""

    token: int
    slot: int

    def add(self, inputs: Tensor, outputs: Tensor, down: Tensor, up: Tensor) -> None:
        outputs[self.token].addmv_(up[self.slot].T, torch.mv(down[self.slot], inputs[self.token]))


@dataclass(frozen=True)
class LoraMapping:
    """Which tokens of a pass have which adapter."""

    updates: tuple[_Update | _Single, ...]

    @staticmethod
    def of(slots: Sequence[int], model: Any) -> LoraMapping | None:
        if are_few(model, len(slots)):
            return LoraMapping(tuple(_Single(token, slot) for token, slot in enumerate(slots) if slot))
        device = model.device
        of_slot: dict[int, list[int]] = {}
        for token, slot in enumerate(slots):
            if slot:
                of_slot.setdefault(slot, []).append(token)
        if not of_slot:
            return None
        alone = [slot for slot, tokens in of_slot.items() if len(tokens) > ALONE]
        groups = [{slot: of_slot.pop(slot)} for slot in alone]
        if of_slot:
            groups.append({slot: of_slot[slot] for slot in sorted(of_slot)})
        return LoraMapping(tuple(_in_place(group, device) or _gathered(group, device) for group in groups))


def _in_place(group: dict[int, list[int]], device: torch.device) -> _Update | None:
    """Tokens and slots that both stand in a row, such as N experts' decisions or one answer's step, are used where
    they are; None if these do not."""
    tokens = [token for line in group.values() for token in line]
    each, first = len(tokens) // len(group), min(group)
    if (
        any(len(line) != each for line in group.values())
        or [*group] != [*range(first, first + len(group))]
        or tokens != [*range(tokens[0], tokens[0] + len(tokens))]
    ):
        return None
    places = slice(tokens[0], tokens[0] + len(tokens))
    return _Update(places, slice(first, first + len(group)), len(group), _floats(len(group), len(tokens), device))


def _gathered(group: dict[int, list[int]], device: torch.device) -> _Update:
    first, last = min(group), max(group) + 1
    stretch = last - first <= SPARSE * len(group)
    chosen: slice | Tensor = slice(first, last) if stretch else torch.tensor([*group], device=device)
    lines = [group.get(slot, []) for slot in (range(first, last) if stretch else group)]
    width = max(map(len, lines))
    table = torch.tensor([[*line, *[0] * (width - len(line))] for line in lines], device=device)
    places = [row * width + column for row, line in enumerate(lines) for column in range(len(line))]
    real = None if len(places) == table.numel() else torch.tensor(places, device=device)
    table = table.flatten()
    flat = table if real is None else table[real]
    return _Update(table, chosen, len(lines), _floats(len(lines), table.numel(), device), real, flat)


def _floats(slots: int, tokens: int, device: torch.device) -> bool:
    return device.type == "cpu" and slots <= FLOAT_SLOTS and tokens <= FLOAT_TOKENS


class _StackedLinear(nn.Module):
    """A linear layer with a stack of low-rank updates, one slot an expert, slot 0 zero."""

    def __init__(self, linear: nn.Linear, bank: AdapterBank):
        super().__init__()
        self.linear = linear
        self._bank = bank
        self.down = linear.weight.new_zeros(1, 1, linear.in_features)
        self.up = linear.weight.new_zeros(1, 1, linear.out_features)

    def put(self, slot: int, update: tuple[Tensor, Tensor] | None, room: int) -> None:
        """Set a slot to an update (None clears it), making room for that many slots."""
        rank = max(self.down.shape[1], update[0].shape[0] if update else 1)
        if (room, rank) != self.down.shape[:2]:
            self.down, self.up = (_grown(stack, room, rank) for stack in (self.down, self.up))
        for number, stack in enumerate((self.down, self.up)):
            stack[slot] = 0
            if update:
                stack[slot, : update[number].shape[0]] = update[number]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        use = self._bank.use
        if use is None:
            return y
        inputs, outputs = x.flatten(0, -2), y.flatten(0, -2)
        for update in use.updates:
            update.add(inputs, outputs, self.down, self.up)
        return y


def _grown(stack: Tensor, room: int, rank: int) -> Tensor:
    grown = stack.new_zeros(room, rank, stack.shape[2])
    grown[: stack.shape[0], : stack.shape[1]] = stack
    return grown


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """The linear layers that an adapter may change, by path: all but the output layer."""
    layers: dict[str, nn.Linear] = {}
    for path, module in model.named_modules():
        if isinstance(module, _StackedLinear):
            layers[path] = module.linear
    inside = set(map(id, layers.values()))
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings() and id(module) not in inside:
            layers[path] = module
    return layers


def read_adapter(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A PEFT LoRA folder as {module path: (down [r, in], up [r, out], scale folded in)}."""
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
            updates[path] = (value, up.T * scale)
        elif kind != "B.weight":
            raise ServingError(f"the adapter in {folder} has {key}, which is not a LoRA weight")
    if not updates:
        raise ServingError(f"the adapter in {folder} holds no weights")
    return updates
