"""Continual learning and routing as numbers: AR, BWT, FWT, confusion, ROC. Knows numbers only.

R[i][j] is the score on task j after learning i tasks; row 0 is the system that has learned none. With T tasks
in order (Lopez-Paz and Ranzato 2017, arXiv 1706.08840; AR as in arXiv 2402.01830):

    AR  = mean over j of R[T][j]                        how good it is in the end
    BWT = mean over j < T of R[T][j] - R[j][j]          what later tasks gave or took
    FWT = mean over j > 1 of R[j-1][j] - R[0][j]        what a task gained before it was learned
"""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Continual:
    """AR, BWT and FWT of one matrix; the latter two are 0 for a single task."""

    ar: float
    bwt: float
    fwt: float


def continual(r: Matrix) -> Continual:
    """AR, BWT and FWT of R with T + 1 rows and T columns."""
    tasks = len(r) - 1
    if tasks < 1 or any(len(row) != tasks for row in r):
        raise ValueError(f"expected T + 1 rows of T scores, found {len(r)} rows of {sorted({len(row) for row in r})}")
    backward = [r[tasks][j] - r[j + 1][j] for j in range(tasks - 1)]
    forward = [r[j][j] - r[0][j] for j in range(1, tasks)]
    return Continual(statistics.fmean(r[tasks]), _mean(backward), _mean(forward))


def ar_over_time(r: Matrix) -> list[float]:
    """After each task, the mean score on the tasks learned so far."""
    return [statistics.fmean(r[i][:i]) for i in range(1, len(r))]


def confusion(pairs: Iterable[tuple[str, str]]) -> dict[str, dict[str, int]]:
    """Counts by (whose query, who answered)."""
    counts: dict[str, dict[str, int]] = {}
    for owner, answered in pairs:
        row = counts.setdefault(owner, {})
        row[answered] = row.get(answered, 0) + 1
    return counts


def share_right(pairs: Iterable[tuple[str, str]]) -> float:
    """Share of (whose query, who answered) that agree; 1 where there are none."""
    right = [owner == answered for owner, answered in pairs]
    return sum(right) / len(right) if right else 1.0


@dataclass(frozen=True)
class Roc:
    """How well a margin tells queries that belong to somebody from those that belong to nobody.

    Attributes:
        auroc: chance that a query of a task has a higher margin than one of nobody; ties count half.
        false_accepts, true_accepts: shares of nobody's and of the tasks' queries that are accepted,
            as the margin that is asked for falls from above the highest to the lowest.
    """

    auroc: float
    false_accepts: list[float]
    true_accepts: list[float]


def roc(own: Sequence[float], foreign: Sequence[float]) -> Roc:
    """The curve over all margins; both samples must have at least one."""
    if not own or not foreign:
        raise ValueError("a ROC curve needs queries of both sides")
    marks = sorted({*own, *foreign}, reverse=True)
    false, true = (
        [0.0, *(1 - bisect_left(side, mark) / len(side) for mark in marks)] for side in map(sorted, (foreign, own))
    )
    steps = range(1, len(marks) + 1)
    area = sum((false[i] - false[i - 1]) * (true[i] + true[i - 1]) / 2 for i in steps)  # trapezoids: ties count half
    return Roc(area, false, true)


@dataclass(frozen=True)
class Interval:
    """A mean, and where 95 % of the means lie that other samples of the same queries would have."""

    mean: float
    low: float
    high: float


def bootstrap(by_task: Sequence[Sequence[float]]) -> Interval:
    """Mean over tasks of the mean over queries, with its percentile bootstrap: each task's queries are drawn anew.

    Args:
        by_task: one number for each query, such as by how much one method's score is above another's; at least
            two of each task, since one query says nothing about others.
    """
    import numpy
    from scipy.stats import bootstrap as drawn_anew

    def mean(*tasks: Any, axis: int = -1) -> Any:
        return numpy.mean([task.mean(axis=axis) for task in tasks], axis=0)

    samples = [numpy.asarray(task, dtype=float) for task in by_task]
    found = drawn_anew(samples, mean, method="percentile", rng=0).confidence_interval
    return Interval(float(mean(*samples)), float(found.low), float(found.high))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds, and the sample standard deviation; None for a single seed."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
