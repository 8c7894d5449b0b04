"""The split forward pass: a prefix read once by the base model, then the rest over its KV.

`prefill` computes keys and values of a batch of prefixes without gradient; `forward` runs
further tokens over them and returns hidden states and a cache to go on from; `forward_packed`
does the same without padding and without a cache, which is what fitting wants; `logits_of`
turns chosen hidden states into logits. Fitting and serving both stand on these, so that a
decision in service is the arithmetic that was fitted. Which tokens belong to which side is
`activation`'s business, and whether an adapter is active is the caller's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward


@dataclass(frozen=True)
class Prefix:
    """Keys and values of a batch of prefixes.

    Attributes:
        layers: one (key, value) pair a layer, each [rows, heads, longest prefix, head size];
            shorter rows are padded on the right.
        lengths: tokens of each row. Never written to after it was made, so it can be shared.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    lengths: tuple[int, ...]

    @property
    def width(self) -> int:
        """Tokens that the longest row takes, padding included."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def cut(self, length: int) -> Prefix:
        """The first `length` tokens of a single-row prefix (a view, no copy)."""
        return Prefix(tuple((k[:, :, :length], v[:, :, :length]) for k, v in self.layers), (length,))

    def repeat(self, rows: int) -> Prefix:
        """A single-row prefix seen by several rows (a view, no copy)."""
        return Prefix(
            tuple((k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in self.layers), self.lengths * rows
        )

    def arrays(self) -> list[Any]:
        """Its tensors as NumPy arrays, for another process; :meth:`of_arrays` makes a prefix of them again."""
        tensors = [tensor.detach().cpu() for pair in self.layers for tensor in pair]
        # NumPy has no bfloat16: the bytes travel.
        return [t.contiguous().view(torch.int16 if t.element_size() == 2 else t.dtype).numpy() for t in tensors]

    @staticmethod
    def of_arrays(arrays: Sequence[Any], like: Tensor) -> Prefix:
        """A single-row prefix of another process's arrays, of the number type and device of `like`; on the CPU
        they are used where they stand. They are only read."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            tensors = [torch.from_numpy(array).view(like.dtype).to(like.device) for array in arrays]
        return Prefix(tuple(zip(tensors[::2], tensors[1::2], strict=True)), (tensors[0].shape[2] if tensors else 0,))

    def cache(self) -> DynamicCache:
        """A cache that starts with this prefix. It appends by making new tensors."""
        return DynamicCache(self.layers) if self.layers else DynamicCache()


@torch.no_grad()
def prefill(model: Any, rows: Sequence[Sequence[int]]) -> Prefix:
    """Keys and values of `rows` (token ids, lengths may differ, at least one token each)."""
    lengths = tuple(len(row) for row in rows)
    if max(lengths) == 0:
        return Prefix((), lengths)
    ids, _ = pad(rows, model.device)
    cache = DynamicCache()
    # Padding stands on the right: causal attention keeps it out of every real token's sight.
    _decoder(model)(input_ids=ids, past_key_values=cache, use_cache=True)
    return Prefix(tuple((layer.keys, layer.values) for layer in cache.layers), lengths)


def forward(model: Any, prefix: Prefix, rows: Sequence[Sequence[int]]) -> tuple[Tensor, DynamicCache]:
    """Run `rows` over their prefixes.

    Args:
        model: a causal language model of transformers.
        prefix: keys and values of what comes before, one row for each of `rows`.
        rows: token ids; padded on the right where lengths differ.

    Returns:
        Hidden states [rows, longest row, hidden size] after the final norm, and the cache with
        prefix and rows in it.
    """
    ids, present = pad(rows, model.device)
    lengths = torch.tensor(prefix.lengths, device=model.device)
    positions = lengths[:, None] + torch.arange(ids.shape[1], device=model.device)[None, :]
    mask = None
    width = prefix.width
    if any(length != width for length in prefix.lengths):
        # A row shorter than the widest prefix has a hole between prefix and rest.
        seen = torch.arange(width, device=model.device)[None, :] < lengths[:, None]
        mask = torch.cat([seen, present], dim=1).long()
    cache = prefix.cache()
    hidden = _decoder(model)(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state
    return hidden, cache


def forward_packed(model: Any, prefix: Prefix, rows: Sequence[Sequence[int]]) -> Tensor:
    """Run `rows` over their prefixes with no padding between them.

    All rows go through the linear layers, where the time is spent, as one sequence; only
    attention sees them apart. Model families that do not take transformers' SDPA attention are
    run padded instead, with the same result.

    Args:
        model: a causal language model of transformers.
        prefix: keys and values of what comes before, one row for each of `rows`.
        rows: token ids, at least one each; lengths may differ.

    Returns:
        Hidden states [tokens of all rows, hidden size] after the final norm, row by row.
    """
    if not packs(model):
        hidden, _ = forward(model, prefix, rows)
        return hidden[pad(rows, model.device)[1]]
    packing = _Packing.of(prefix, rows, model.device)
    decoder = _decoder(model)
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = _PACKED
    try:
        hidden = decoder(
            input_ids=torch.tensor([[token for row in rows for token in row]], device=model.device),
            position_ids=packing.positions[None],
            # Already four-dimensional, so that transformers makes none of its own.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device),
            use_cache=False,
            packing=packing,
        ).last_hidden_state
    finally:
        decoder.config._attn_implementation = before
    return hidden[0]


def packs(model: Any) -> bool:
    """Whether `forward_packed` runs this model without padding."""
    decoder = _decoder(model)
    return bool(decoder.config._attn_implementation == "sdpa" and decoder._supports_attention_backend)


@dataclass(frozen=True)
class _Packing:
    """Where each packed token stands: its row, its column among the row's own tokens, its position in the
    text; and what it may see: [rows, 1, own columns, prefix columns + own columns]."""

    prefix: Prefix
    rows: int
    width: int
    row: Tensor
    column: Tensor
    positions: Tensor
    mask: Tensor

    @staticmethod
    def of(prefix: Prefix, rows: Sequence[Sequence[int]], device: Any) -> _Packing:
        row = torch.tensor([number for number, tokens in enumerate(rows) for _ in tokens], device=device)
        column = torch.tensor([column for tokens in rows for column in range(len(tokens))], device=device)
        before = torch.tensor(prefix.lengths, device=device)
        width = max(map(len, rows))
        own = torch.arange(width, device=device)
        # A place beyond a row's end sees what its row sees; nobody reads what comes of it.
        seen = (torch.arange(prefix.width, device=device)[None, :] < before[:, None])[:, None, :]
        causal = (own[None, :] <= own[:, None])[None]
        mask = torch.cat([seen.expand(-1, width, -1), causal.expand(len(rows), -1, -1)], dim=2)
        return _Packing(prefix, len(rows), width, row, column, before[row] + column, mask[:, None])

    def apart(self, packed: Tensor) -> Tensor:
        """[1, heads, tokens, head size] as [rows, heads, own columns, head size]."""
        _, heads, _, size = packed.shape
        padded = packed.new_zeros(self.rows, self.width, heads, size)
        padded[self.row, self.column] = packed[0].transpose(0, 1)
        return padded.transpose(1, 2)

    def within(self, window: int) -> Tensor:
        """The mask of a layer that looks back over `window` tokens only."""
        before = torch.tensor(self.prefix.lengths, device=self.mask.device)[:, None]
        own = before + torch.arange(self.width, device=self.mask.device)[None, :]
        of_prefix = torch.arange(self.prefix.width, device=self.mask.device)[None, :].expand(self.rows, -1)
        distance = own[:, :, None] - torch.cat([of_prefix, own], dim=1)[:, None, :]
        return self.mask & (distance < window)[:, None]


_PACKED = "see_ray_packed"


def _packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *, packing: _Packing, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention over packed rows, as transformers calls it: tensors [1, heads, tokens, head size]."""
    query, key, value = map(packing.apart, (query, key, value))
    if packing.prefix.layers:
        keys, values = packing.prefix.layers[module.layer_idx]
        key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
    window = kwargs.get("sliding_window")
    mask = packing.mask if window is None else packing.within(window)
    attended, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    return attended[packing.row, packing.column][None], None


AttentionInterface.register(_PACKED, _packed_attention)


def logits_of(model: Any, hidden: Tensor, tokens: Sequence[int] | None = None) -> Tensor:
    """Logits of hidden states [..., hidden size] over the vocabulary, or over some `tokens` of it; in the
    model's own dtype.

    Covers the scalings that transformers' model families put around the output layer (Cohere's
    `logit_scale`, Granite's `logits_scaling`, Gemma's `final_logit_softcapping`).
    """
    head = model.get_output_embeddings()
    if tokens is None:
        logits = head(hidden)
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
    """Rows of token ids as one tensor [rows, longest], and which of its places are real."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long)
    present = torch.arange(longest)[None, :] < torch.tensor([len(row) for row in rows])[:, None]
    return ids.to(device), present.to(device)


def _decoder(model: Any) -> Any:
    return model.get_decoder()
