"""LoRA adapters of many experts in one base model; each token of a forward has an adapter of its own.

In every linear layer that any expert adapts, the adapters' weights are stacked: A as [adapters, r, in], B as
[adapters, r, out]. A forward gets an adapter index for each token. Index 0 is the base model alone: its weights are
0.
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

from see_ray.engine.kernels import native_kernels_are_faster
from see_ray.errors import ServingError

MAX_GROUPED_TOKENS = 32
"""Adapters with more tokens than this in a batch are computed one by one, the others together, padded."""

MAX_RANGE_FACTOR = 2
"""Adapters are read as a range of the stack if it holds at most this many times those that are needed; else they are
copied out of it."""

FLOAT32_ADAPTERS, FLOAT32_TOKENS = 64, 64
"""Up to this many adapters and tokens the product is computed in float32 on a CPU, whatever the dtype of the weights.
A bfloat16 product of one token takes 16 microseconds to start there; converting to float32 and multiplying takes 4. For
5 to 50 adapters with a token each that is 15 to 40 % faster, with one thread and with two; with two tokens each it is
about equal."""


class AdapterBank:
    """All experts' LoRA weights. It replaces each linear layer that any of them adapts."""

    def __init__(self, model: Any):
        self._model = model
        self._layers: dict[str, _StackedLoraLinear] = {}
        self._indices: dict[str, int] = {}
        self._stack_size = 1
        self.mapping: LoraMapping | None = None

    def index(self, name: str) -> int:
        """Index of an adapter."""
        return self._indices[name]

    @contextmanager
    def applied(self, adapters: Sequence[int]) -> Iterator[None]:
        """In the block, a forward applies to each token the adapter of its index; `adapters` has one index a token."""
        self.mapping = LoraMapping.of(adapters, self._model)
        try:
            yield
        finally:
            self.mapping = None

    def add(self, name: str, folder: Path) -> None:
        """Read an adapter from its PEFT folder, in place of one of the same name.

        Raises:
            ServingError: it does not fit this base model, or is not plain LoRA.
        """
        updates = read_adapter(folder)
        linear = linear_layers(self._model)
        for path, (lora_a, lora_b) in updates.items():
            layer = linear.get(path)
            if layer is None:
                raise ServingError(
                    f"the adapter in {folder} adapts {path}, which is not a hidden linear layer of this base model; "
                    "it was fitted on another one"
                )
            if (layer.in_features, layer.out_features) != (lora_a.shape[1], lora_b.shape[1]):
                raise ServingError(
                    f"the adapter in {folder} has shape {lora_a.shape[1]}x{lora_b.shape[1]} at {path}, the base model "
                    f"{layer.in_features}x{layer.out_features}; it was fitted on another one"
                )
        index = self._indices.get(name) or min(set(range(1, len(self._indices) + 2)) - set(self._indices.values()))
        while self._stack_size <= index:
            self._stack_size *= 2
        for path in updates.keys() - self._layers.keys():
            parent, _, child = path.rpartition(".")
            self._layers[path] = _StackedLoraLinear(linear[path], self)
            setattr(self._model.get_submodule(parent), child, self._layers[path])
        for path, stacked in self._layers.items():
            stacked.set_adapter(index, updates.get(path), self._stack_size)
        self._indices[name] = index

    def remove(self, name: str) -> None:
        """Remove an adapter; its index is free."""
        index = self._indices.pop(name)
        for layer in self._layers.values():
            layer.set_adapter(index, None, self._stack_size)


@dataclass(frozen=True)
class _GroupedUpdate:
    """What adapters add to the outputs of a group of tokens, as one batched product.

    Attributes:
        tokens: a range of as many tokens for each adapter; or [adapters x most tokens of one], padded with token 0.
        adapters: a range of the stack, or indices.
        num_adapters: how many these are.
        in_float32: compute in float32.
        present: places of `tokens` that are not padding; None if all are.
        outputs: the tokens at these places; None where `tokens` is a range.
    """

    tokens: slice | Tensor
    adapters: slice | Tensor
    num_adapters: int
    in_float32: bool
    present: Tensor | None = None
    outputs: Tensor | None = None

    def add_to(self, y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
        """Add to y [tokens, out] of a layer with inputs x [tokens, in] and stacks [adapters, r, in] and
        [adapters, r, out]."""
        x = x[self.tokens] if isinstance(self.tokens, slice) else x.index_select(0, self.tokens)
        a, b = lora_a[self.adapters], lora_b[self.adapters]
        if self.in_float32:
            x, a, b = x.float(), a.float(), b.float()
        if self.num_adapters == 1:
            delta = x @ a[0].T @ b[0]
        else:
            delta = torch.bmm(torch.bmm(x.unflatten(0, (self.num_adapters, -1)), a.transpose(1, 2)), b).flatten(0, 1)
        if self.outputs is None:
            y[self.tokens].add_(delta)
        else:
            delta = delta if self.present is None else delta.index_select(0, self.present)
            y.index_add_(0, self.outputs, delta.to(y.dtype))


@dataclass(frozen=True)
class _SingleTokenUpdate:
    """What an adapter adds to the output of one token, as two matrix-vector products; for very few tokens."""

    token: int
    adapter: int

    def add_to(self, y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
        """See `_GroupedUpdate.add_to`."""
        y[self.token].addmv_(lora_b[self.adapter].T, torch.mv(lora_a[self.adapter], x[self.token]))


@dataclass(frozen=True)
class LoraMapping:
    """Which tokens of a batch have which adapter."""

    updates: tuple[_GroupedUpdate | _SingleTokenUpdate, ...]

    @staticmethod
    def of(adapters: Sequence[int], model: Any) -> LoraMapping | None:
        """The mapping of a batch with these adapter indices, one for each token; None if all are 0."""
        if native_kernels_are_faster(model, len(adapters)):
            return LoraMapping(
                tuple(_SingleTokenUpdate(token, adapter) for token, adapter in enumerate(adapters) if adapter)
            )
        device = model.device
        tokens_of: dict[int, list[int]] = {}
        for token, adapter in enumerate(adapters):
            if adapter:
                tokens_of.setdefault(adapter, []).append(token)
        if not tokens_of:
            return None
        large = [adapter for adapter, tokens in tokens_of.items() if len(tokens) > MAX_GROUPED_TOKENS]
        groups = [{adapter: tokens_of.pop(adapter)} for adapter in large]
        if tokens_of:
            groups.append({adapter: tokens_of[adapter] for adapter in sorted(tokens_of)})
        return LoraMapping(tuple(_update_in_place(group, device) or _padded_update(group, device) for group in groups))


def _update_in_place(tokens_of: dict[int, list[int]], device: torch.device) -> _GroupedUpdate | None:
    """Consecutive tokens with consecutive adapters, such as N experts' decisions or one decode step, are used without a
    copy. None if they are not consecutive."""
    tokens = [token for adapter_tokens in tokens_of.values() for token in adapter_tokens]
    per_adapter, first = len(tokens) // len(tokens_of), min(tokens_of)
    if (
        any(len(adapter_tokens) != per_adapter for adapter_tokens in tokens_of.values())
        or [*tokens_of] != [*range(first, first + len(tokens_of))]
        or tokens != [*range(tokens[0], tokens[0] + len(tokens))]
    ):
        return None
    num_adapters = len(tokens_of)
    return _GroupedUpdate(
        slice(tokens[0], tokens[0] + len(tokens)),
        slice(first, first + num_adapters),
        num_adapters,
        _in_float32(num_adapters, len(tokens), device),
    )


def _padded_update(tokens_of: dict[int, list[int]], device: torch.device) -> _GroupedUpdate:
    first, last = min(tokens_of), max(tokens_of) + 1
    as_range = last - first <= MAX_RANGE_FACTOR * len(tokens_of)
    adapters: slice | Tensor = slice(first, last) if as_range else torch.tensor([*tokens_of], device=device)
    rows = [tokens_of.get(adapter, []) for adapter in (range(first, last) if as_range else tokens_of)]
    width = max(map(len, rows))
    table = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
    places = [number * width + column for number, row in enumerate(rows) for column in range(len(row))]
    present = None if len(places) == table.numel() else torch.tensor(places, device=device)
    table = table.flatten()
    outputs = table if present is None else table[present]
    in_float32 = _in_float32(len(rows), table.numel(), device)
    return _GroupedUpdate(table, adapters, len(rows), in_float32, present, outputs)


def _in_float32(num_adapters: int, num_tokens: int, device: torch.device) -> bool:
    return device.type == "cpu" and num_adapters <= FLOAT32_ADAPTERS and num_tokens <= FLOAT32_TOKENS


class _StackedLoraLinear(nn.Module):
    """A linear layer with a stack of LoRA weights, one adapter per index."""

    def __init__(self, linear: nn.Linear, bank: AdapterBank):
        super().__init__()
        self.linear = linear
        self._bank = bank
        self.lora_a = linear.weight.new_zeros(1, 1, linear.in_features)
        self.lora_b = linear.weight.new_zeros(1, 1, linear.out_features)

    def set_adapter(self, index: int, weights: tuple[Tensor, Tensor] | None, stack_size: int) -> None:
        """Set the weights (A, B) of an index (None: zeros), in a stack of `stack_size` adapters."""
        rank = max(self.lora_a.shape[1], weights[0].shape[0] if weights else 1)
        if (stack_size, rank) != self.lora_a.shape[:2]:
            self.lora_a, self.lora_b = (_grown(stack, stack_size, rank) for stack in (self.lora_a, self.lora_b))
        for number, stack in enumerate((self.lora_a, self.lora_b)):
            stack[index] = 0
            if weights:
                stack[index, : weights[number].shape[0]] = weights[number]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        mapping = self._bank.mapping
        if mapping is None:
            return y
        inputs, outputs = x.flatten(0, -2), y.flatten(0, -2)
        for update in mapping.updates:
            update.add_to(outputs, inputs, self.lora_a, self.lora_b)
        return y


def _grown(stack: Tensor, stack_size: int, rank: int) -> Tensor:
    grown = stack.new_zeros(stack_size, rank, stack.shape[2])
    grown[: stack.shape[0], : stack.shape[1]] = stack
    return grown


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """The linear layers that an adapter may adapt, by path: all but the output layer."""
    layers: dict[str, nn.Linear] = {}
    for path, module in model.named_modules():
        if isinstance(module, _StackedLoraLinear):
            layers[path] = module.linear
    wrapped = set(map(id, layers.values()))
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings() and id(module) not in wrapped:
            layers[path] = module
    return layers


def read_adapter(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Weights of a PEFT LoRA folder by module path: A [r, in], and B [r, out] times the adapter's scale.

    Raises:
        ServingError: it cannot be read, is not plain LoRA, or is empty.
    """
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
            lora_b = weights[key.replace(".lora_A.", ".lora_B.")]
            updates[path] = (value, lora_b.T * scale)
        elif kind != "B.weight":
            raise ServingError(f"the adapter in {folder} has {key}, which is not a LoRA weight")
    if not updates:
        raise ServingError(f"the adapter in {folder} holds no weights")
    return updates
