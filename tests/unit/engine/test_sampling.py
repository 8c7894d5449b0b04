"""Tokens and log-probabilities from logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from see_ray.engine.interface import SamplingParams, Token
from see_ray.engine.sampling import sample_token, with_logprobs

LOGITS = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))


def draws(count: int, **params: Any) -> list[float]:
    """Share of each token among many draws."""
    generator = torch.Generator().manual_seed(0)
    tokens = [sample_token(LOGITS, SamplingParams(**params), generator) for _ in range(count)]
    return [tokens.count(token) / count for token in range(len(LOGITS))]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    assert draws(4000, temperature=1.0) == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)


def test_a_temperature_below_one_sharpens() -> None:
    squares = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 2
    assert draws(4000, temperature=0.5) == pytest.approx((squares / squares.sum()).tolist(), abs=0.03)


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, 1), (0.5, 1), (0.51, 2), (0.8, 2), (0.9, 3), (1.0, 4)])
def test_top_p_draws_from_the_likeliest_tokens_only(top_p: float, kept: int) -> None:
    shares = draws(1000, temperature=1.0, top_p=top_p)
    assert [share > 0 for share in shares] == [True] * kept + [False] * (4 - kept)


def test_a_seed_repeats() -> None:
    params = SamplingParams(temperature=1.0)
    drawn = [
        [sample_token(LOGITS, params, generator) for _ in range(20)]
        for generator in (torch.Generator().manual_seed(seed) for seed in (3, 3, 4))
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_logprobs_come_only_where_asked_for() -> None:
    assert with_logprobs(1, LOGITS, None) == Token(1)
    sampled = with_logprobs(1, LOGITS, 0)
    assert sampled.logprob == pytest.approx(-1.204, abs=1e-3)
    assert sampled == Token(1, sampled.logprob, ())
    token = with_logprobs(1, LOGITS, 2)
    assert token.logprob == pytest.approx(-1.204, abs=1e-3)
    assert [token_id for token_id, _ in token.top] == [0, 1]
