"""One forward for the tokens of many requests, packed into one sequence.

Three kinds of work share it, each token with the adapter that applies to it:

    PrefillChunk   some tokens of a prompt, after those prefilled before
    DecisionRows   rows that continue one prompt, each with another adapter: the decisions of N experts. They attend to
                   the prompt's keys and values in place, so that nothing is copied N times.
    DecodeStep     one more token of an answer, over the keys and values in its slot

The linear layers, which take most of the time, see a single sequence without padding. Only attention keeps the
requests apart (`engine.attention`); it replaces the model's own (`models.attention_override`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from see_ray.engine.attention import LayerInputs, causal_mask, decision_attention, group_decodes
from see_ray.engine.kernels import fastest_kernels
from see_ray.engine.kv_cache import KVCacheSlot
from see_ray.engine.lora import AdapterBank
from see_ray.errors import ServingError
from see_ray.models.attention_override import run_packed
from see_ray.models.prefix_kv import Prefix

UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of transformers' attention functions that the engine's attention does not implement."""

KeyValue = tuple[Tensor, Tensor]


@dataclass(eq=False)
class DecisionRows:
    """Rows of the same tokens after the same prompt tokens, each with another adapter.

    Attributes:
        prefix_length: tokens of the prompt that the rows attend to.
        token_ids: tokens of each row.
        adapters: adapter index of each row.
        hidden: [rows, tokens, hidden size] after the forward.
        layers: keys and values of the rows' tokens, one pair per layer, each [rows, heads, tokens, head size], after
            the forward.
    """

    prefix_length: int
    token_ids: tuple[int, ...]
    adapters: tuple[int, ...]
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    layers: list[KeyValue] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return len(self.token_ids) * len(self.adapters)


@dataclass(eq=False)
class PrefillChunk:
    """Tokens of a prompt, and the decision rows that continue from it.

    Attributes:
        past: keys and values of the prompt's tokens before the chunk, one row.
        token_ids: tokens of the chunk; may be empty if there are decision rows.
        adapter: adapter index that applies to them.
        decision_rows: rows that continue from the end of the chunk or from before it.
        prefix: keys and values of `past` and the chunk, after the forward.
    """

    past: Prefix
    token_ids: tuple[int, ...]
    adapter: int = 0
    decision_rows: tuple[DecisionRows, ...] = ()
    prefix: Prefix = field(default_factory=lambda: Prefix((), (0,)))

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model, those of decision rows included."""
        return len(self.token_ids) + sum(rows.num_tokens for rows in self.decision_rows)


@dataclass(eq=False)
class DecodeStep:
    """One more token of an answer. Its slot has grown by the token after the forward.

    Attributes:
        token_id: the token to run.
        adapter: adapter index that applies to it.
        slot: keys and values of the answer so far, prompt included.
        hidden: [hidden size] after the forward.
    """

    token_id: int
    adapter: int
    slot: KVCacheSlot
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))


def run_batch(model: Any, adapters: AdapterBank, chunks: Sequence[PrefillChunk], steps: Sequence[DecodeStep]) -> None:
    """Run one forward. Its results are stored in `chunks` and `steps`.

    Raises:
        ServingError: the model's attention has a feature that the engine does not implement.
    """
    batch = _PackedBatch(chunks, steps, model.device)
    with adapters.applied(batch.adapters), fastest_kernels(model, len(batch.token_ids)):
        positions = torch.tensor(batch.positions, device=model.device)
        hidden = run_packed(model, batch.token_ids, positions, batch)
    batch.store(hidden)


class _PackedBatch:
    """Decode steps, then each chunk followed by its decision rows, as one sequence; and its attention.

    Attributes:
        token_ids: of all tokens.
        positions: of each token in its own text.
        adapters: adapter index of each token.
    """

    def __init__(self, chunks: Sequence[PrefillChunk], steps: Sequence[DecodeStep], device: Any):
        self._chunks, self._steps, self._device = chunks, steps, device
        self._layers: list[list[KeyValue]] = [[] for _ in chunks]  # of each chunk, filled layer by layer
        self._decode_groups = group_decodes([step.slot for step in steps], device)
        self.token_ids = [step.token_id for step in steps]
        self.positions = [step.slot.length for step in steps]
        self.adapters = [step.adapter for step in steps]
        for chunk in chunks:
            start = chunk.past.lengths[0]
            self.token_ids += chunk.token_ids
            self.positions += range(start, start + len(chunk.token_ids))
            self.adapters += [chunk.adapter] * len(chunk.token_ids)
            for rows in chunk.decision_rows:
                end = rows.prefix_length + len(rows.token_ids)
                self.token_ids += rows.token_ids * len(rows.adapters)
                self.positions += [*range(rows.prefix_length, end)] * len(rows.adapters)
                self.adapters += [adapter for adapter in rows.adapters for _ in rows.token_ids]

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """See `models.attention_override.PackedAttention`."""
        if unsupported := [name for name in UNSUPPORTED if kwargs.get(name) is not None]:
            raise ServingError(f"the embedded engine does not support this model's attention: {', '.join(unsupported)}")
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        inputs = LayerInputs(module, query, key, value, scale, kwargs.get("sliding_window"))
        out = query.new_empty(query.shape[1], query.shape[0], value.shape[2])
        for group in self._decode_groups:
            group.attend(inputs, out)
        start = len(self._steps)
        for chunk, layers in zip(self._chunks, self._layers, strict=True):
            end = start + len(chunk.token_ids)
            prefix = self._attend_chunk(chunk, inputs, slice(start, end), out)
            if prefix is not None:
                layers.append(prefix)
            for rows in chunk.decision_rows:
                start, end = end, end + rows.num_tokens
                _attend_rows(rows, inputs, slice(start, end), prefix, out)
            start = end
        return out

    def _attend_chunk(self, chunk: PrefillChunk, inputs: LayerInputs, tokens: slice, out: Tensor) -> KeyValue | None:
        """Returns the layer's keys and values of the prompt up to the end of the chunk; None if there are none."""
        past = chunk.past.layers[inputs.module.layer_idx] if chunk.past.layers else None
        if not chunk.token_ids:
            return past
        key, value = inputs.key[None, :, tokens], inputs.value[None, :, tokens]
        if past is None:
            key, value = key.clone(), value.clone()  # views would keep the tensors of the whole batch
        else:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        mask = causal_mask(len(chunk.token_ids), chunk.past.lengths[0], inputs.window, self._device)
        query = inputs.query[None, :, tokens]
        out[tokens] = sdpa_attention_forward(inputs.module, query, key, value, mask, scaling=inputs.scale)[0][0]
        return key, value

    def store(self, hidden: Tensor) -> None:
        """Store hidden states [tokens, hidden size] and prefixes where they belong."""
        for index, step in enumerate(self._steps):
            step.hidden = hidden[index]
            step.slot.length += 1
        start = len(self._steps)
        for chunk, layers in zip(self._chunks, self._layers, strict=True):
            chunk.prefix = Prefix(tuple(layers), (chunk.past.lengths[0] + len(chunk.token_ids),))
            start += len(chunk.token_ids)
            for rows in chunk.decision_rows:
                end = start + rows.num_tokens
                rows.hidden = hidden[start:end].clone().unflatten(0, (len(rows.adapters), len(rows.token_ids)))
                start = end


def _attend_rows(rows: DecisionRows, inputs: LayerInputs, tokens: slice, prefix: KeyValue | None, out: Tensor) -> None:
    shape = (len(rows.adapters), len(rows.token_ids))
    query, key, value = (
        part[:, tokens].unflatten(1, shape).transpose(0, 1) for part in (inputs.query, inputs.key, inputs.value)
    )
    rows.layers.append((key.clone(), value.clone()))  # views would keep the tensors of the whole batch
    if prefix is not None:
        prefix = (prefix[0][0, :, : rows.prefix_length], prefix[1][0, :, : rows.prefix_length])
    out[tokens] = decision_attention(query, key, value, prefix, inputs.scale, inputs.window).flatten(0, 1)
