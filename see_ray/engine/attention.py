"""Attention of the engine's packed batches: decode steps over their slots, and decision rows over a shared prompt.

Both take one layer's tensors of the whole batch (`LayerInputs`). Prefill chunks use SDPA with `causal_mask`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from see_ray.engine.kv_cache import KVCacheBlock, KVCacheSlot

MAX_SCORES = 1 << 26
"""Most attention scores of decision rows that are held at the same time (256 MB in float32)."""


@dataclass(slots=True)
class LayerInputs:
    """One layer's attention inputs for all tokens of a batch.

    Attributes:
        module: the attention layer of the model.
        query: [heads, tokens, head size].
        key: [key heads, tokens, head size].
        value: like `key`.
        scale: factor of the scores.
        window: most tokens that one attends to, itself included; None: all before it.
    """

    module: Any
    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window: int | None


def causal_mask(num_new: int, num_past: int, window: int | None, device: Any) -> Tensor | None:
    """[1, 1, new, past + new]; None where SDPA's own causal mask is the same."""
    if num_past == 0 and (window is None or num_new <= window):
        return None
    positions = torch.arange(num_past + num_new, device=device)
    distance = positions[num_past:, None] - positions[None, :]
    visible = distance >= 0
    return (visible if window is None else visible & (distance < window))[None, None]


# --- decode steps ----------------------------------------------------------------------------


def group_decodes(slots: Sequence[KVCacheSlot], device: Any) -> list[SingleDecode | DecodeGroup]:
    """Group decode steps whose slots are in one block.

    Args:
        slots: of the steps, which are the first tokens of the batch, in this order.
        device: of the model.
    """
    tokens_by_block: dict[int, list[int]] = {}
    for token, slot in enumerate(slots):
        tokens_by_block.setdefault(id(slot.block), []).append(token)
    return [
        SingleDecode(tokens[0], slots[tokens[0]])
        if len(tokens) == 1
        else DecodeGroup.of(tokens, [slots[token] for token in tokens], device)
        for tokens in tokens_by_block.values()
    ]


@dataclass(frozen=True)
class SingleDecode:
    """One decode step that shares its block with no other. Its keys end with itself, so nothing has to be masked."""

    token: int
    slot: KVCacheSlot

    def attend(self, inputs: LayerInputs, out: Tensor) -> None:
        """Write the token's key and value into its slot, and what it attends to into `out`."""
        keys, values = self.slot.block.layers[inputs.module.layer_idx]
        row, end = self.slot.row, self.slot.length + 1
        keys[row, :, end - 1] = inputs.key[:, self.token]
        values[row, :, end - 1] = inputs.value[:, self.token]
        start = 0 if inputs.window is None else max(0, end - inputs.window)
        query = inputs.query[None, :, self.token].unflatten(1, (keys.shape[1], -1))
        key, value = keys[None, row, :, start:end], values[None, row, :, start:end]
        out[self.token] = scaled_dot_product_attention(query, key, value, scale=inputs.scale)[0].flatten(0, 1)


@dataclass
class DecodeGroup:
    """Decode steps whose slots are in one block.

    Attributes:
        block: of the slots.
        tokens: [steps], their tokens in the batch.
        rows: [steps], their rows in the block.
        lengths: [steps], tokens in each slot before this one.
        first_row: lowest row of a step.
        end_row: the highest row of a step, plus 1.
        max_length: tokens of the longest slot, this step's included.
    """

    block: KVCacheBlock
    tokens: Tensor
    rows: Tensor
    lengths: Tensor
    first_row: int
    end_row: int
    max_length: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(tokens: Sequence[int], slots: Sequence[KVCacheSlot], device: Any) -> DecodeGroup:
        rows, lengths = [slot.row for slot in slots], [slot.length for slot in slots]
        return DecodeGroup(
            slots[0].block,
            torch.tensor(tokens, device=device),
            torch.tensor(rows, device=device),
            torch.tensor(lengths, device=device),
            min(rows),
            max(rows) + 1,
            max(lengths) + 1,
        )

    def attend(self, inputs: LayerInputs, out: Tensor) -> None:
        """Write the tokens' keys and values into their slots, and what they attend to into `out`."""
        keys, values = self.block.layers[inputs.module.layer_idx]
        keys[self.rows, :, self.lengths] = inputs.key[:, self.tokens].transpose(0, 1)
        values[self.rows, :, self.lengths] = inputs.value[:, self.tokens].transpose(0, 1)
        # Rows in between that do not decode now are computed, too, and ignored: cheaper than a copy without them.
        num_rows, offsets = self.end_row - self.first_row, self.rows - self.first_row
        query = inputs.query.new_zeros(num_rows, *inputs.query.shape[::2])
        query[offsets] = inputs.query[:, self.tokens].transpose(0, 1)
        # Heads that share a key head become queries of it, so that keys are not repeated.
        query = query.unflatten(1, (keys.shape[1], -1))
        key, value = (t[self.first_row : self.end_row, :, : self.max_length] for t in (keys, values))
        mask = self._mask(inputs.window, num_rows, offsets, query.dtype)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=inputs.scale)
        out[self.tokens] = attended.flatten(1, 2)[offsets]

    def _mask(self, window: int | None, num_rows: int, offsets: Tensor, dtype: torch.dtype) -> Tensor:
        """[rows, 1, 1, max length], added to the scores. A boolean mask would be converted by every layer."""
        if window not in self._masks:
            ends = self.lengths.new_ones(num_rows)
            ends[offsets] = self.lengths + 1
            positions = torch.arange(self.max_length, device=ends.device)[None, :]
            visible = positions < ends[:, None]
            if window is not None:
                visible &= positions >= ends[:, None] - window
            mask = torch.zeros(visible.shape, dtype=dtype, device=ends.device).masked_fill_(~visible, float("-inf"))
            self._masks[window] = mask[:, None, None, :]
        return self._masks[window]


# --- decision rows ---------------------------------------------------------------------------


def decision_attention(
    query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor] | None, scale: float, window: int | None
) -> Tensor:
    """Attention of rows over one shared prompt and over their own tokens.

    The two parts are computed separately and merged by their log-sum-exp, as in cascade attention (FlashInfer), so that
    the prompt is a single matrix product for all rows.

    Args:
        query: [rows, heads, tokens, head size].
        key: of the rows' own tokens, [rows, key heads, tokens, head size].
        value: like `key`.
        prefix: the prompt's (key, value), [key heads, prompt tokens, head size].
        scale: factor of the scores.
        window: most tokens that one attends to, itself included; None: all before it.

    Returns:
        [rows, tokens, heads, head size].
    """
    rows, heads, tokens, size = query.shape
    key_heads = key.shape[1]
    query = query.reshape(rows, key_heads, heads // key_heads, tokens, size)
    out, lse = _own_attention(query, key, value, scale, window)
    if prefix is not None and prefix[0].shape[1]:
        flat = query.permute(1, 2, 0, 3, 4).flatten(1, 3)  # [key heads, heads per key head x rows x tokens, head size]
        prefix_out, prefix_lse = (
            part.unflatten(1, (heads // key_heads, rows, tokens)).transpose(0, 2).transpose(1, 2)
            for part in _prefix_attention(flat, prefix[0], prefix[1], tokens, scale, window)
        )
        out = torch.lerp(out.float(), prefix_out.float(), torch.sigmoid(prefix_lse - lse)[..., None])
    return out.to(query.dtype).reshape(rows, heads, tokens, -1).transpose(1, 2)


def _own_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Causal attention of rows over their own tokens.

    Args:
        query: [rows, key heads, heads per key head, tokens, head size].
        key: [rows, key heads, tokens, head size].
        value: like `key`.
        scale: factor of the scores.
        window: see `decision_attention`.

    Returns:
        A tensor like `query`, and the log-sum-exp of the scores, without the last dimension.
    """
    tokens = query.shape[3]
    if tokens == 1:  # it attends to itself alone: weight 1, and the log-sum-exp is the score
        own = value[:, :, None].expand(-1, -1, query.shape[2], -1, -1)
        return own, (query * key[:, :, None]).sum(-1, dtype=torch.float32) * scale
    positions = torch.arange(tokens, device=query.device)
    distance = positions[:, None] - positions[None, :]
    visible = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    scores = torch.matmul(query.float() * scale, key[:, :, None].float().transpose(-1, -2))
    scores = scores.masked_fill_(~visible, float("-inf"))
    lse = scores.logsumexp(-1)
    return torch.matmul((scores - lse[..., None]).exp_(), value[:, :, None].float()), lse


def _prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, tokens: int, scale: float, window: int | None
) -> tuple[Tensor, Tensor]:
    """Attention of all rows over the prompt before them.

    Args:
        query: [key heads, queries, head size]; consecutive queries are the `tokens` of a row.
        key: [key heads, prompt tokens, head size].
        value: like `key`.
        tokens: tokens of a row.
        scale: factor of the scores.
        window: see `decision_attention`.

    Returns:
        A tensor like `query`, and the log-sum-exp of the scores, [key heads, queries].
    """
    length = key.shape[1]
    if query.device.type == "cpu" and (window is None or window >= length + tokens):
        # The operator behind scaled_dot_product_attention on a CPU, which does not return the log-sum-exp.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[None], key[None], value[None], scale=scale
        )
        return out[0], lse[0].reshape(query.shape[:2])
    num_queries = max(1, MAX_SCORES // (query.shape[0] * length * tokens)) * tokens
    outs, lses = [], []
    for part in query.split(num_queries, dim=1):
        scores = torch.matmul(part * scale, key.transpose(1, 2)).float()
        if window is not None:
            positions = length + torch.arange(part.shape[1], device=query.device)[:, None] % tokens
            distance = positions - torch.arange(length, device=query.device)[None, :]
            scores = scores.masked_fill(distance >= window, -1e30)
        lses.append(scores.logsumexp(-1))
        outs.append(torch.matmul(scores.softmax(-1).to(value.dtype), value))
    return torch.cat(outs, dim=1), torch.cat(lses, dim=1)
