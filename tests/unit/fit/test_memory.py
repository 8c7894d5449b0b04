"""What a fit needs where memory ran out."""

from __future__ import annotations

import pytest

from see_ray.config import FitConfig
from see_ray.data.reconstruct import Example
from see_ray.fit.memory import largest_micro_batch
from see_ray.models.activation import Activation

ACTIVATION = Activation((1, 2), 1, 60, 61)
EXAMPLES = [Example((7, 7, 1, 2), (60, *[5] * length), "accept") for length in (9, 3, 6)]  # 10, 4 and 7 tokens


@pytest.mark.parametrize(
    ("limit", "batch_size", "tokens"),
    [(100, 3, 21), (100, 2, 17), (12, 3, 12), (8, 3, 10)],
    ids=["a whole batch", "its longest rows", "as many as allowed", "a row is never split"],
)
def test_the_largest_micro_batch(limit: int, batch_size: int, tokens: int) -> None:
    config = FitConfig(max_tokens_per_micro_batch=limit, train_batch_size=batch_size)
    assert largest_micro_batch(EXAMPLES, ACTIVATION, config) == tokens
