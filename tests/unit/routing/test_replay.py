"""Decisions that were made once give the same walk as asking expert after expert."""

from __future__ import annotations

import math
import random

import pytest

from see_ray.routing.chain import GENERALIST, ChainEntry, walk
from see_ray.routing.replay import answered_by, margin


async def test_the_answerer_is_that_of_the_walk() -> None:
    rng = random.Random(11)
    seen = set()
    for _ in range(2000):
        entries = [ChainEntry(f"e{number}", rng.choice([0.1, 0.5, 0.9])) for number in range(rng.randint(0, 6))]
        # Some decisions equal the threshold.
        decisions = {entry.expert: rng.choice([0.05, 0.1, 0.5, 0.7, 0.95]) for entry in entries}

        async def decide(expert: str, decisions: dict[str, float] = decisions) -> float:
            return decisions[expert]

        trace = await walk(entries, decide, lookahead=rng.randint(1, 3))
        assert answered_by(entries, decisions) == trace.answered_by
        seen.add(trace.answered_by)
    assert len(seen) == 7  # six places and the generalist


def test_the_margin_is_below_zero_exactly_where_the_generalist_answers() -> None:
    rng = random.Random(12)
    for _ in range(300):
        entries = [ChainEntry(f"e{number}", rng.choice([0.05, 0.5, 0.99])) for number in range(3)]
        decisions = {entry.expert: rng.choice([1e-9, 0.05, 0.5, 0.6, 0.99]) for entry in entries}
        assert (margin(entries, decisions) < 0) == (answered_by(entries, decisions) == GENERALIST)


def test_the_margin_is_the_surest_experts_distance_in_log_odds() -> None:
    entries = [ChainEntry("a", 0.5), ChainEntry("b", 0.9)]
    assert margin(entries, {"a": 0.8, "b": 0.8}) == pytest.approx(math.log(4))


def test_an_empty_sequence_accepts_nothing() -> None:
    assert (answered_by([], {}), margin([], {})) == (GENERALIST, -math.inf)


def test_a_decision_of_zero_and_a_threshold_of_one_have_a_margin_too() -> None:
    assert margin([ChainEntry("a", 1.0)], {"a": 0.5}) == -math.inf
    assert margin([ChainEntry("a", 0.5)], {"a": 0.0}) == -math.inf
