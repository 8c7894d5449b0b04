"""Metrics of continual learning and routing: AR, BWT, FWT, confusion, ROC.

R[i][j] is the score on task j after learning i tasks; row 0 is before the first task. With T tasks in order of
arrival (Lopez-Paz and Ranzato 2017, arXiv 1706.08840; AR as in arXiv 2402.01830):

    AR  = mean over j of R[T][j]                        final quality
    BWT = mean over j < T of R[T][j] - R[j][j]          what later tasks changed
    FWT = mean over j > 1 of R[j-1][j] - R[0][j]        what earlier tasks changed on one not learned yet
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Matrix = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Continual:
    """AR, BWT and FWT of one matrix; BWT and FWT are 0 for a single task."""

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
    """Counts of (owner, answerer) pairs: by owner, then by answerer."""
    counts: dict[str, dict[str, int]] = {}
    for owner, answerer in pairs:
        row = counts.setdefault(owner, {})
        row[answerer] = row.get(answerer, 0) + 1
    return counts


def share_right(pairs: Iterable[tuple[str, str]]) -> float:
    """Share of (owner, answerer) pairs that are equal; 1 for no pairs."""
    right = [owner == answerer for owner, answerer in pairs]
    return sum(right) / len(right) if right else 1.0


@dataclass(frozen=True)
class Roc:
    """How well a score separates the tasks' queries from foreign ones.

    Attributes:
        auroc: probability that a task's query has a higher score than a foreign one; ties count half.
        false_accepts, true_accepts: shares of foreign and of the tasks' queries that reach the threshold, as it
            falls from above the highest score to the lowest.
    """

    auroc: float
    false_accepts: list[float]
    true_accepts: list[float]


def roc(own: Sequence[float], foreign: Sequence[float]) -> Roc:
    """The ROC curve over all thresholds.

    Args:
        own: scores of the tasks' queries; may be infinite.
        foreign: scores of foreign queries; may be infinite.

    Raises:
        ValueError: one of the two is empty.
    """
    if not own or not foreign:
        raise ValueError("a ROC curve needs queries of both sides")
    from scipy.stats import rankdata
    from sklearn.metrics import roc_auc_score, roc_curve

    labels = [1] * len(own) + [0] * len(foreign)
    ranks = rankdata([*own, *foreign], method="dense")  # scikit-learn takes no infinite scores; only order matters
    false_accepts, true_accepts, _ = roc_curve(labels, ranks, drop_intermediate=False)
    return Roc(float(roc_auc_score(labels, ranks)), false_accepts.tolist(), true_accepts.tolist())


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap(by_task: Sequence[Sequence[float]]) -> Interval:
    """The mean over tasks of the mean over queries, and its percentile bootstrap over each task's queries.

    Args:
        by_task: one value for each query, such as the difference between two methods' scores; at least two for
            each task, since a single query gives no variance.
    """
    import numpy
    from scipy.stats import bootstrap as scipy_bootstrap

    def mean(*tasks: Any, axis: int = -1) -> Any:
        return numpy.mean([task.mean(axis=axis) for task in tasks], axis=0)

    samples = [numpy.asarray(task, dtype=float) for task in by_task]
    interval = scipy_bootstrap(samples, mean, method="percentile", rng=0).confidence_interval
    return Interval(float(mean(*samples)), float(interval.low), float(interval.high))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean over seeds, and the sample standard deviation; None for a single seed."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
