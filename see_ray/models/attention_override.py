"""One forward over a packed sequence, with an attention function of our own.

Fitting (`models.prefix_kv.forward_packed`) and the embedded engine (`engine.forward_batch`) both concatenate the tokens
of many rows into one sequence without padding. Linear layers treat each token alone, so only attention has to be
replaced. Fitting and engine share this replacement, but not the attention itself: fitting needs gradients and pads rows
inside attention, the engine attends over keys and values in preallocated memory.
`tests/unit/engine/test_forward_batch.py` checks that their results are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

_NAME = "see_ray_packed"


class PackedAttention(Protocol):
    """Attention of a packed sequence, in which rows do not see each other."""

    def attend(self, module: Any, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
        """One layer's attention.

        Args:
            module: the attention layer; `module.layer_idx` is its number.
            query: [heads, tokens, head size].
            key: [key heads, tokens, head size].
            value: like `key`.
            kwargs: what transformers passes to an attention function, such as `scaling` and `sliding_window`.

        Returns:
            [tokens, heads, head size].
        """
        ...


def supports_packing(model: Any) -> bool:
    """Whether the model's attention can be replaced: it runs SDPA, through transformers' attention interface."""
    decoder = model.get_decoder()
    return bool(decoder.config._attn_implementation == "sdpa" and decoder._supports_attention_backend)


def run_packed(model: Any, input_ids: Sequence[int], position_ids: Tensor, attention: PackedAttention) -> Tensor:
    """Run the decoder over a packed sequence.

    Args:
        model: a causal language model of transformers for which `supports_packing` holds.
        input_ids: the tokens of all rows, one after another.
        position_ids: [tokens], each token's position in its own row.
        attention: attends in place of the model's own attention.

    Returns:
        Hidden states [tokens, hidden size] after the final norm.
    """
    decoder = model.get_decoder()
    implementation = decoder.config._attn_implementation
    decoder.config._attn_implementation = _NAME
    try:
        hidden: Tensor = decoder(
            input_ids=torch.tensor([input_ids], device=model.device),
            position_ids=position_ids[None],
            # Already four-dimensional, so that transformers does not build a causal mask.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device),
            use_cache=False,
            packed_attention=attention,
        ).last_hidden_state[0]
    finally:
        decoder.config._attn_implementation = implementation
    return hidden


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    packed_attention: PackedAttention,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function as transformers calls it: tensors [1, heads, tokens, head size]."""
    return packed_attention.attend(module, query[0], key[0], value[0], **kwargs)[None], None


AttentionInterface.register(_NAME, _attend)
