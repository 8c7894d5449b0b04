"""The results of an evaluation, and their summary over methods and seeds.

A `Result` is one method with one seed, or what is live in an expert store. `summary` turns results into
the JSON that reports are made of: means over the seeds and their standard deviation, curves and confusions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from see_ray.evaluate.answer_scores import QueryScores, Scores
from see_ray.evaluate.continual_metrics import (
    ar_over_time,
    bootstrap,
    confusion,
    continual,
    mean_and_spread,
    roc,
    share_right,
)
from see_ray.routing.chain import GENERALIST

Route = tuple[str, str, str]
"""One test query as (owner or `generalist`, source, answerer)."""

REFERENCE = "see"
"""The method that all others are compared with."""


@dataclass(frozen=True)
class Result:
    """One method with one seed.

    Attributes:
        method: its name.
        seed: of the rows and the fits.
        tasks: in order of arrival.
        kinds: the kind of score that R is made of, by task.
        scores: before the first task, and after each.
        routes: of each test query after the last task; None if the method routes nothing.
        margins: of each test query, above 0 if an expert accepts it; None if the method makes no decisions.
        decisions: P(accept) of each test query, by expert.
        thresholds: by expert.
        query_scores: of each test query after the last task; empty if only their means are known.
        set_aside: why the gate set an expert aside, by task.
        rows: examples that were fitted on, for each task.
        seconds: that learning took, for each task.
    """

    method: str
    seed: int
    tasks: tuple[str, ...]
    kinds: dict[str, str]
    scores: list[Scores]
    routes: list[Route] | None = None
    margins: list[float] | None = None
    decisions: dict[str, list[float]] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    query_scores: QueryScores = field(default_factory=dict)
    set_aside: dict[str, list[str]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def matrix(self) -> list[list[float]]:
        """R: a row for the system before the first task and after each, a column for each task."""
        return [[scores[task][self.kinds[task]] for task in self.tasks] for scores in self.scores]

    def figures(self) -> dict[str, float]:
        """Single numbers that are averaged over seeds; shares are from 0 to 1."""
        metrics = continual(self.matrix)
        figures = {"ar": metrics.ar, "bwt": metrics.bwt, "fwt": metrics.fwt}
        if self.rows:
            figures |= {"rows_per_task": sum(self.rows) / len(self.rows), "last_rows": float(self.rows[-1])}
            figures |= {"seconds_per_task": sum(self.seconds) / len(self.seconds), "last_seconds": self.seconds[-1]}
        if self.routes is not None:
            figures |= _routing_figures(self.routes)
            own, foreign = self.margins_by_side()
            if own and foreign:
                figures["auroc"] = roc(own, foreign).auroc
        return figures

    def margins_by_side(self) -> tuple[list[float], list[float]]:
        """Margins of the tasks' queries, and of foreign ones; both empty if there are none."""
        own: list[float] = []
        foreign: list[float] = []
        if self.routes is not None and self.margins is not None:
            for (owner, _, _), margin in zip(self.routes, self.margins, strict=True):
                (foreign if owner == GENERALIST else own).append(margin)
        return own, foreign


def _routing_figures(routes: Sequence[Route]) -> dict[str, float]:
    own = [(owner, answerer) for owner, _, answerer in routes if owner != GENERALIST]
    figures = {
        "routing_accuracy": share_right(own),
        "own_to_generalist": sum(answerer == GENERALIST for _, answerer in own) / len(own),
    }
    for foreign in dict.fromkeys(source for owner, source, _ in routes if owner == GENERALIST):
        reached = [answerer == GENERALIST for _, source, answerer in routes if source == foreign]
        figures[f"{foreign} to generalist"] = sum(reached) / len(reached)
    return figures


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Everything that a report shows, by method."""
    methods = {}
    for method in dict.fromkeys(result.method for result in results):
        methods[method] = _method_summary([result for result in results if result.method == method])
        if method != REFERENCE and (behind := _behind_reference(results, method)):
            methods[method]["behind_see"] = behind
    return {"tasks": list(results[0].tasks), "kinds": results[0].kinds, "methods": methods}


def _method_summary(results: Sequence[Result]) -> dict[str, Any]:
    """The summary of one method over its seeds."""
    first = results[0]
    by_seed = [result.figures() for result in results]
    body: dict[str, Any] = {
        "seeds": [result.seed for result in results],
        "figures": {key: _spread([figures[key] for figures in by_seed]) for key in by_seed[0]},
        "matrix": _mean_matrix([result.matrix for result in results]),
        "ar_over_time": _mean_row([ar_over_time(result.matrix) for result in results]),
        "scores": {
            task: {kind: _spread([result.scores[-1][task][kind] for result in results]) for kind in kinds}
            for task, kinds in first.scores[-1].items()
        },
    }
    if first.rows:
        body["rows"] = _mean_row([result.rows for result in results])
        body["seconds"] = _mean_row([result.seconds for result in results])
    body["set_aside"] = [
        f"{task}, seed {result.seed}: {'; '.join(reasons)}"
        for result in results
        for task, reasons in result.set_aside.items()
    ]
    if first.routes is not None:
        body["confusion"] = confusion(
            (owner, answerer) for result in results for owner, _, answerer in result.routes or []
        )
    if first.margins is not None:
        body |= _curves(first)
    return body


def _curves(result: Result) -> dict[str, Any]:
    """ROC curve and decisions of one seed: those of several seeds do not add up."""
    body: dict[str, Any] = {}
    own, foreign = result.margins_by_side()
    if own and foreign:
        curve = roc(own, foreign)
        body["roc"] = {"false_accepts": curve.false_accepts, "true_accepts": curve.true_accepts}
    owners = [owner for owner, _, _ in result.routes or []]
    body["decisions"] = {}
    for expert, decisions in result.decisions.items():
        by_owner = list(zip(owners, decisions, strict=True))
        body["decisions"][expert] = {
            "threshold": result.thresholds[expert],
            "own": [p for owner, p in by_owner if owner == expert],
            "other_tasks": [p for owner, p in by_owner if owner not in (expert, GENERALIST)],
            "nobody": [p for owner, p in by_owner if owner == GENERALIST],
        }
    return body


def _behind_reference(results: Sequence[Result], method: str) -> dict[str, float] | None:
    """SEE's AR minus a method's, with its confidence interval, over the seeds that both have; None without any."""
    see = {result.seed: result for result in results if result.method == REFERENCE and result.query_scores}
    others = [result for result in results if result.method == method and result.query_scores and result.seed in see]
    if not others:
        return None
    by_task = []
    for task, kind in others[0].kinds.items():
        pairs = [(see[other.seed].query_scores[task][kind], other.query_scores[task][kind]) for other in others]
        by_seed = [[see_score - score for see_score, score in zip(*pair, strict=True)] for pair in pairs]
        by_task.append(_mean_row(by_seed))
    if any(len(differences) < 2 for differences in by_task):
        return None
    interval = bootstrap(by_task)
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    mean, spread = mean_and_spread(values)
    return {"mean": mean, "spread": spread}


def _mean_row(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(cells) / len(cells) for cells in zip(*rows, strict=True)]


def _mean_matrix(matrices: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    return [_mean_row(rows) for rows in zip(*matrices, strict=True)]
