"""Who answers, from decisions that were made once.

An expert never changes, so its decision on a query does not either. Each expert decides on each query once, and
the walk of the chain over any version of the sequence, and for any thresholds, follows from these numbers. A
test holds that this is what `chain.walk` finds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from see_ray.routing.chain import GENERALIST, ChainEntry


def answered_by(links: Sequence[ChainEntry], decisions: Mapping[str, float]) -> str:
    """The expert that answers a query, or `generalist`.

    Args:
        links: the sequence in the order asked, newest first.
        decisions: P(accept) of each of its experts on the query.
    """
    return next((link.expert for link in links if decisions[link.expert] >= link.threshold), GENERALIST)


def margin(links: Sequence[ChainEntry], decisions: Mapping[str, float]) -> float:
    """How far the surest expert is above its threshold, in log odds: the chain passes a query on to the
    generalist exactly if this is below 0. Minus infinity for an empty sequence."""
    return max((_log_odds(decisions[link.expert]) - _log_odds(link.threshold) for link in links), default=-math.inf)


def _log_odds(p: float) -> float:
    if p >= 1:
        return math.inf  # a threshold that accepts nothing, since no decision reaches 1
    return math.log(p / (1 - p)) if p > 0 else -math.inf
