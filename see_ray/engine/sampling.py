"""Choosing the next token of an answer from its logits."""

from __future__ import annotations

import torch
from torch import Tensor

from see_ray.engine.interface import SamplingParams, Token


def sample_token(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw a token at `params.temperature` (above 0) from the `params.top_p` nucleus.

    Args:
        logits: [vocabulary].
        params: temperature and top_p.
        generator: of the CPU.
    """
    probabilities = torch.softmax(logits.float().cpu() / params.temperature, dim=-1)
    if params.top_p < 1:
        ranked, order = probabilities.sort(descending=True)
        ranked[ranked.cumsum(0) - ranked >= params.top_p] = 0  # never the first
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ranked)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def with_logprobs(token_id: int, logits: Tensor, count: int | None) -> Token:
    """A token with its log-probability and those of the `count` likeliest ones; without any where `count` is None."""
    if count is None:
        return Token(token_id)
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    likeliest = logprobs.topk(count) if count else None
    top = tuple(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)) if likeliest else ()
    return Token(token_id, float(logprobs[token_id]), top)
