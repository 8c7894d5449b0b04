"""Choose an expert's accept threshold on queries that it was not fitted on.

P(accept) of the task's held-out rows should be above the threshold, and that of held-out foreign queries (general
ones, and queries kept by earlier experts) below it. At the threshold, the expert accepts at most the given share
of foreign queries. If the two samples do not overlap, the threshold lies in the gap between them, two thirds of the way
up in log odds: queries unlike any held-out one fall into the gap, too, and the
expert should rather pass on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LOWEST, HIGHEST = 0.05, 0.99
"""Bounds of a threshold: outside them it would depend on a few held-out rows."""

UP_THE_GAP = 2 / 3
"""Position of the threshold in the gap, from the foreign (0) to the own (1) log odds."""

OWN_SHARE = 0.98
"""Share of the own held-out rows that must be above the gap; the lowest 2 % are outliers."""


@dataclass(frozen=True)
class Calibration:
    """A threshold and its effect on the held-out queries.

    Attributes:
        threshold: P(accept) from which the expert accepts.
        own_accepted: share of the task's held-out rows that it accepts.
        foreign_accepted: share of foreign held-out queries that it accepts.
        foreign_bound: upper end of the 95 % confidence interval of that share (Wilson score).
        own, foreign: sizes of the two samples.
        taken: accepted foreign queries by source.
    """

    threshold: float
    own_accepted: float
    foreign_accepted: float
    foreign_bound: float
    own: int
    foreign: int
    taken: dict[str, int]

    def metrics(self) -> dict[str, float]:
        """Values for the expert's manifest."""
        return {
            "own_accepted": self.own_accepted,
            "foreign_accepted": self.foreign_accepted,
            "foreign_accepted_upper_95": self.foreign_bound,
            "own_rows": self.own,
            "foreign_rows": self.foreign,
        }


def calibrate(own: Sequence[float], foreign: Sequence[tuple[str, float]], false_accept_rate: float) -> Calibration:
    """Choose the threshold.

    Args:
        own: P(accept) of the task's held-out rows.
        foreign: (source, P(accept)) of held-out foreign queries.
        false_accept_rate: largest share of these that may be accepted.
    """
    threshold = _threshold(sorted(own), sorted(p for _, p in foreign), false_accept_rate)
    taken: dict[str, int] = {}
    for source, p in foreign:
        taken[source] = taken.get(source, 0) + (p >= threshold)
    accepted = sum(taken.values())
    return Calibration(
        threshold=threshold,
        own_accepted=sum(p >= threshold for p in own) / max(1, len(own)),
        foreign_accepted=accepted / max(1, len(foreign)),
        foreign_bound=wilson_upper(accepted, len(foreign)),
        own=len(own),
        foreign=len(foreign),
        taken={source: count for source, count in taken.items() if count},
    )


def _threshold(own: list[float], foreign: list[float], rate: float) -> float:
    if not own or not foreign:
        return 0.5
    allowed = math.floor(rate * len(foreign))
    barrier = foreign[-1 - allowed]  # the highest foreign decision that must stay below the threshold
    lowest_own = own[math.floor((1 - OWN_SHARE) * len(own))]
    if lowest_own > barrier:
        low, high = _logit(barrier), _logit(lowest_own)
        threshold = _from_logit(low + UP_THE_GAP * (high - low))
        # Queries unlike any held-out one fall into the gap: accept none of them below 0.5.
        if lowest_own > 0.5:
            threshold = max(threshold, 0.5)
    else:
        threshold = barrier
    # Applied last, so that neither rounding nor the bounds accept more than is allowed.
    return max(min(max(threshold, LOWEST), HIGHEST), math.nextafter(barrier, 2.0))


def wilson_upper(hits: int, n: int, z: float = 1.96) -> float:
    """Upper end of the Wilson score interval of a share (Wilson 1927); 1 for an empty sample."""
    if n == 0:
        return 1.0
    share = hits / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return min(1.0, (centre + spread) / (1 + z * z / n))


def _logit(p: float) -> float:
    p = min(max(p, 1e-9), 1 - 1e-9)
    return math.log(p / (1 - p))


def _from_logit(x: float) -> float:
    return 1 / (1 + math.exp(-x))
