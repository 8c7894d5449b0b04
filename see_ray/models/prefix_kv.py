"""Split forwards: read a prefix once with the base model, then run further tokens over its keys and values.

`prefill` computes a prefix without gradient. `forward` and `forward_packed` run rows of tokens over their prefixes: the
first with padding, the second without, which is what fitting uses. `logits_of` turns hidden states into logits.

This is the forward of fitting, and of its decisions on held-out rows. The embedded engine has its own
(`engine.forward_batch`), for which keys and values are preallocated; the two share the replacement of a model's
attention (`models.attention_override`), the `Prefix` and `logits_of`, and `tests/unit/engine/test_forward_batch.py`
checks that their results are equal. `models.activation` decides which tokens belong to the prefix; the caller enables
or disables the adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from see_ray.models.attention_override import run_packed, supports_packing


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a batch of prefixes. Its tensors are never written to, so it can be shared.

    Attributes:
        layers: one (key, value) pair per layer, each [rows, heads, longest prefix, head size]; shorter rows are padded
            on the right.
        lengths: number of tokens of each row.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    lengths: tuple[int, ...]

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def cut(self, length: int) -> Prefix:
        """The first `length` tokens of a single-row prefix (a view)."""
        return Prefix(tuple((k[:, :, :length], v[:, :, :length]) for k, v in self.layers), (length,))

    def arrays(self) -> list[Any]:
        """The tensors as NumPy arrays, to send to another process; `of_arrays` is the inverse."""
        tensors = [tensor.detach().cpu() for pair in self.layers for tensor in pair]
        # NumPy has no bfloat16, so its bytes are sent as int16.
        return [t.contiguous().view(torch.int16 if t.element_size() == 2 else t.dtype).numpy() for t in tensors]

    @staticmethod
    def of_arrays(arrays: Sequence[Any], like: Tensor) -> Prefix:
        """A single-row prefix from the arrays of another process.

        Args:
            arrays: what `arrays` returned. On the CPU they are not copied, so they must not be written to.
            like: a tensor of the dtype and device that the prefix is to have.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensors = [torch.from_numpy(array).view(like.dtype).to(like.device) for array in arrays]
        return Prefix(tuple(zip(tensors[::2], tensors[1::2], strict=True)), (tensors[0].shape[2] if tensors else 0,))

    def cache(self) -> DynamicCache:
        """A transformers cache that starts with this prefix. It grows by concatenation, so the prefix is unchanged."""
        return DynamicCache(self.layers) if self.layers else DynamicCache()


def kv_bytes_per_token(model: Any, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * dtype.itemsize)


@torch.no_grad()
def prefill(model: Any, rows: Sequence[Sequence[int]]) -> Prefix:
    """Keys and values of `rows` (token ids; lengths may differ)."""
    lengths = tuple(len(row) for row in rows)
    if max(lengths) == 0:
        return Prefix((), lengths)
    ids, _ = pad(rows, model.device)
    cache = DynamicCache()
    # Padding is on the right, so causal attention hides it from every real token.
    model.get_decoder()(input_ids=ids, past_key_values=cache, use_cache=True)
    return Prefix(tuple((layer.keys, layer.values) for layer in cache.layers), lengths)


def forward(model: Any, prefix: Prefix, rows: Sequence[Sequence[int]]) -> tuple[Tensor, DynamicCache]:
    """Run `rows` over their prefixes, padded on the right where lengths differ.

    Args:
        model: a causal language model of transformers.
        prefix: keys and values of the tokens before, one row for each of `rows`.
        rows: token ids.

    Returns:
        Hidden states [rows, longest row, hidden size] after the final norm, and a cache that holds prefix and rows.
    """
    ids, present = pad(rows, model.device)
    lengths = torch.tensor(prefix.lengths, device=model.device)
    positions = lengths[:, None] + torch.arange(ids.shape[1], device=model.device)[None, :]
    mask = None
    width = prefix.width
    if any(length != width for length in prefix.lengths):
        # In a row shorter than the longest prefix there is padding between prefix and row.
        seen = torch.arange(width, device=model.device)[None, :] < lengths[:, None]
        mask = torch.cat([seen, present], dim=1).long()
    cache = prefix.cache()
    hidden = model.get_decoder()(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state
    return hidden, cache


def forward_packed(model: Any, prefix: Prefix, rows: Sequence[Sequence[int]]) -> Tensor:
    """Run `rows` over their prefixes without padding, with gradients.

    The linear layers, which take most of the time, see all rows as one sequence; rows are separated inside attention
    only. Models for which `supports_packing` does not hold are run padded, with the same result.

    Args:
        model: a causal language model of transformers.
        prefix: keys and values of the tokens before, one row for each of `rows`.
        rows: token ids, at least one each; lengths may differ.

    Returns:
        Hidden states [tokens of all rows, hidden size] after the final norm, row by row.
    """
    if not supports_packing(model):
        hidden, _ = forward(model, prefix, rows)
        return hidden[pad(rows, model.device)[1]]
    packed = _PackedRows.of(prefix, rows, model.device)
    return run_packed(model, [token for row in rows for token in row], packed.positions, packed)


@dataclass(frozen=True)
class _PackedRows:
    """Rows packed into one sequence: where each token belongs, and attention that pads the rows again.

    Attributes:
        prefix: keys and values before the rows.
        rows: number of rows.
        width: tokens of the longest row.
        row: [tokens], the row of each token.
        column: [tokens], its index in that row.
        positions: [tokens], its position in the text, prefix included.
        mask: what a token may attend to, [rows, 1, width, prefix width + width].
    """

    prefix: Prefix
    rows: int
    width: int
    row: Tensor
    column: Tensor
    positions: Tensor
    mask: Tensor

    @staticmethod
    def of(prefix: Prefix, rows: Sequence[Sequence[int]], device: Any) -> _PackedRows:
        row = torch.tensor([number for number, tokens in enumerate(rows) for _ in tokens], device=device)
        column = torch.tensor([column for tokens in rows for column in range(len(tokens))], device=device)
        prefix_lengths = torch.tensor(prefix.lengths, device=device)
        width = max(map(len, rows))
        columns = torch.arange(width, device=device)
        # Padding attends to what its row attends to; its results are never read.
        in_prefix = (torch.arange(prefix.width, device=device)[None, :] < prefix_lengths[:, None])[:, None, :]
        causal = (columns[None, :] <= columns[:, None])[None]
        mask = torch.cat([in_prefix.expand(-1, width, -1), causal.expand(len(rows), -1, -1)], dim=2)
        return _PackedRows(prefix, len(rows), width, row, column, prefix_lengths[row] + column, mask[:, None])

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """See `models.attention_override.PackedAttention`."""
        query, key, value = map(self._padded, (query, key, value))
        if self.prefix.layers:
            keys, values = self.prefix.layers[module.layer_idx]
            key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        window = kwargs.get("sliding_window")
        mask = self.mask if window is None else self._window_mask(window)
        attended: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
        return attended[self.row, self.column]

    def _padded(self, packed: Tensor) -> Tensor:
        """[heads, tokens, head size] as [rows, heads, width, head size]."""
        heads, _, size = packed.shape
        padded = packed.new_zeros(self.rows, self.width, heads, size)
        padded[self.row, self.column] = packed.transpose(0, 1)
        return padded.transpose(1, 2)

    def _window_mask(self, window: int) -> Tensor:
        """The mask of a layer that attends to the last `window` tokens only."""
        prefix_lengths = torch.tensor(self.prefix.lengths, device=self.mask.device)[:, None]
        row_positions = prefix_lengths + torch.arange(self.width, device=self.mask.device)[None, :]
        prefix_positions = torch.arange(self.prefix.width, device=self.mask.device)[None, :].expand(self.rows, -1)
        distance = row_positions[:, :, None] - torch.cat([prefix_positions, row_positions], dim=1)[:, None, :]
        return self.mask & (distance < window)[:, None]


def logits_of(model: Any, hidden: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
    """Logits of hidden states [..., hidden size] over the vocabulary or over some `tokens` of it, in the model's dtype.

    Applies the scalings that model families of transformers have after the output layer: Cohere's `logit_scale`,
    Granite's `logits_scaling` and Gemma's `final_logit_softcapping`.
    """
    head = model.get_output_embeddings()
    if tokens is None:
        logits: Tensor = head(hidden)
    else:
        chosen = list(tokens)
        logits = linear(hidden, head.weight[chosen], None if head.bias is None else head.bias[chosen])
    config = model.config.get_text_config()
    if getattr(config, "logit_scale", None):
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None):
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def pad(rows: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, Tensor]:
    """Rows of token ids as one tensor [rows, longest row], and a mask of the same shape: False where it is padding."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long)
    present = torch.arange(longest)[None, :] < torch.tensor([len(row) for row in rows])[:, None]
    return ids.to(device), present.to(device)
