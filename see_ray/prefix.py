"""The split forward pass: a prefix read once by the base model, then the rest over its KV.

`prefill` computes keys and values of a batch of prefixes without gradient; `forward` runs
further tokens over them and returns hidden states; `logits_of` turns chosen hidden states
into logits. Fitting and serving both stand on these three, so that a decision in service is
the arithmetic that was fitted. Which tokens belong to which side is `activation`'s business,
and whether an adapter is active is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


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


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Vocabulary logits of hidden states [..., hidden size]; in the model's own dtype.

    Covers the scalings that transformers' model families put around the output layer (Cohere's
    `logit_scale`, Granite's `logits_scaling`, Gemma's `final_logit_softcapping`).
    """
    logits = model.get_output_embeddings()(hidden)
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
