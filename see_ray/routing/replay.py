"""Replay the chain from recorded decisions.

An expert never changes, so neither does its decision on a query. Once every expert has decided on a query, the
outcome of the walk follows for any version of the sequence and any thresholds, without asking again. A test
checks that the replay gives what `see_ray.routing.chain.walk` gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from see_ray.routing.chain import GENERALIST, ChainEntry


def answered_by(entries: Sequence[ChainEntry], decisions: Mapping[str, float]) -> str:
    """Name of the expert that answers a query, or `generalist`.

    Args:
        entries: the sequence in the order in which experts are asked, newest first.
        decisions: P(accept) of each of its experts on the query.
    """
    return next((entry.expert for entry in entries if decisions[entry.expert] >= entry.threshold), GENERALIST)


def margin(entries: Sequence[ChainEntry], decisions: Mapping[str, float]) -> float:
    """How far the most confident expert is above its threshold, in log odds.

    The generalist answers the query exactly if the margin is below 0. It is minus infinity for an empty sequence.
    """
    margins = (_log_odds(decisions[entry.expert]) - _log_odds(entry.threshold) for entry in entries)
    return max(margins, default=-math.inf)


def _log_odds(p: float) -> float:
    if p >= 1:
        return math.inf  # a threshold of 1 accepts nothing: no decision reaches it
    return math.log(p / (1 - p)) if p > 0 else -math.inf
