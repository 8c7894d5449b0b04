"""What an evaluation found, method by method and seed by seed, and what that comes to.

A :class:`Result` is one method with one seed, or what is live in an expert store. :func:`summary` is all that a
report says, as JSON: means over the seeds, and their spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

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

Scores = dict[str, dict[str, float]]
"""Mean score by task and kind."""
EachScore = dict[str, dict[str, list[float]]]
"""Score of each test query, in their order, by task and kind."""

REFERENCE = "see"
"""The method that all others are held against."""


@dataclass(frozen=True)
class Result:
    """One method with one seed.

    Attributes:
        method: its name.
        seed: of rows and fits.
        tasks: in order of arrival.
        kinds: the kind of score of each task that R is made of.
        scores: the system before the first task, and after each.
        routes: (owner or `generalist`, source, who answered) of each query in the end; None if nothing routes.
        margins: of each of these, above 0 if some expert accepts; None if there are no decisions.
        decisions: P(accept) of each of these by expert.
        thresholds: of each expert.
        each: the scores after the last task, query by query; empty if only their means are known.
        set_aside: why the gate kept an expert out, by task.
        rows: examples fitted on for each task.
        seconds: that learning each task took.
    """

    method: str
    seed: int
    tasks: tuple[str, ...]
    kinds: dict[str, str]
    scores: list[Scores]
    routes: list[tuple[str, str, str]] | None = None
    margins: list[float] | None = None
    decisions: dict[str, list[float]] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)
    each: EachScore = field(default_factory=dict)
    set_aside: dict[str, list[str]] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def matrix(self) -> list[list[float]]:
        """R: a row for the system before the first task and after each, a column for each task."""
        return [[scores[task][self.kinds[task]] for task in self.tasks] for scores in self.scores]

    def figures(self) -> dict[str, float]:
        """Single numbers that can be averaged over seeds; shares from 0 to 1."""
        found = continual(self.matrix)
        figures = {"ar": found.ar, "bwt": found.bwt, "fwt": found.fwt}
        if self.rows:
            figures |= {"rows_per_task": sum(self.rows) / len(self.rows), "last_rows": float(self.rows[-1])}
            figures |= {"seconds_per_task": sum(self.seconds) / len(self.seconds), "last_seconds": self.seconds[-1]}
        if self.routes is not None:
            own = [(owner, who) for owner, _, who in self.routes if owner != GENERALIST]
            figures["routing_accuracy"] = share_right(own)
            figures["own_to_generalist"] = sum(who == GENERALIST for _, who in own) / len(own)
            for source in dict.fromkeys(source for owner, source, _ in self.routes if owner == GENERALIST):
                reached = [who == GENERALIST for _, where, who in self.routes if where == source]
                figures[f"{source} to generalist"] = sum(reached) / len(reached)
        if self.routes is not None and self.margins is not None:
            own_margins, foreign_margins = self._sides()
            if own_margins and foreign_margins:
                figures["auroc"] = roc(own_margins, foreign_margins).auroc
        return figures

    def _sides(self) -> tuple[list[float], list[float]]:
        sides: tuple[list[float], list[float]] = ([], [])
        for (owner, _, _), value in zip(self.routes or [], self.margins or [], strict=True):
            sides[owner == GENERALIST].append(value)
        return sides


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """All that a report says, by method."""
    methods = {}
    for name in dict.fromkeys(result.method for result in results):
        some = [result for result in results if result.method == name]
        every = [result.figures() for result in some]
        figures = {key: _spread([figures[key] for figures in every]) for key in every[0]}
        body: dict[str, Any] = {"seeds": [result.seed for result in some], "figures": figures}
        body["matrix"] = _mean_matrix([result.matrix for result in some])
        body["ar_over_time"] = _mean_matrix([[ar_over_time(result.matrix)] for result in some])[0]
        body["scores"] = {
            task: {kind: _spread([result.scores[-1][task][kind] for result in some]) for kind in kinds}
            for task, kinds in some[0].scores[-1].items()
        }
        if some[0].rows:
            body["rows"] = _mean_matrix([[list(map(float, result.rows))] for result in some])[0]
            body["seconds"] = _mean_matrix([[result.seconds] for result in some])[0]
        body["set_aside"] = [
            f"{task}, seed {result.seed}: {'; '.join(why)}" for result in some for task, why in result.set_aside.items()
        ]
        if some[0].routes is not None:
            pairs = [(owner, who) for result in some for owner, _, who in result.routes or []]
            body["confusion"] = confusion(pairs)
        if some[0].margins is not None:
            first = some[0]  # curves and histograms of several seeds do not add up
            own, foreign = first._sides()
            if own and foreign:
                curve = roc(own, foreign)
                body["roc"] = {"false_accepts": curve.false_accepts, "true_accepts": curve.true_accepts}
            body["decisions"] = {
                expert: {
                    "threshold": first.thresholds[expert],
                    "own": [p for p, route in zip(every, first.routes or [], strict=True) if route[0] == expert],
                    "other_tasks": [
                        p
                        for p, route in zip(every, first.routes or [], strict=True)
                        if route[0] not in (expert, GENERALIST)
                    ],
                    "nobody": [p for p, route in zip(every, first.routes or [], strict=True) if route[0] == GENERALIST],
                }
                for expert, every in first.decisions.items()
            }
        if name != REFERENCE and (behind := _behind(results, name)):
            body["behind_see"] = behind
        methods[name] = body
    return {"tasks": list(results[0].tasks), "kinds": results[0].kinds, "methods": methods}


def _behind(results: Sequence[Result], method: str) -> dict[str, float] | None:
    """How far a method's AR lies behind SEE's over the seeds that both have, and between what it may lie by chance."""
    see = {result.seed: result for result in results if result.method == REFERENCE and result.each}
    pairs = [(see[result.seed], result) for result in results if result.method == method and result.seed in see]
    pairs = [(one, other) for one, other in pairs if other.each]
    if not pairs:
        return None
    by_task = []
    for task, kind in pairs[0][0].kinds.items():
        by_seed = [
            [high - low for high, low in zip(one.each[task][kind], other.each[task][kind], strict=True)]
            for one, other in pairs
        ]
        by_task.append([sum(same) / len(same) for same in zip(*by_seed, strict=True)])
    if any(len(task) < 2 for task in by_task):
        return None
    found = bootstrap(by_task)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    mean, spread = mean_and_spread(values)
    return {"mean": mean, "spread": spread}


def _mean_matrix(matrices: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    return [[sum(cells) / len(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
