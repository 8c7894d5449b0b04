"""The plots of a report, drawn from its summary alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from see_ray.routing.chain import GENERALIST

BINS = 20
"""Bars of a histogram of decisions."""


def draw(summary: dict[str, Any], folder: Path) -> list[str]:
    """Draw the plots that the summary has data for; returns their file names."""
    import matplotlib

    matplotlib.use("Agg")
    methods, tasks = summary["methods"], summary["tasks"]
    drawn = [_matrices(methods, tasks, folder / "matrix.png"), _ar(methods, tasks, folder / "ar.png")]
    if confusions := {name: body["confusion"] for name, body in methods.items() if "confusion" in body}:
        drawn.append(_confusions(confusions, folder / "confusion.png"))
    if decisions := {name: body["decisions"] for name, body in methods.items() if body.get("decisions")}:
        drawn.append(_decisions(decisions, folder / "decisions.png"))
    if curves := {name: body for name, body in methods.items() if "roc" in body}:
        drawn.append(_rocs(curves, folder / "roc.png"))
    if costs := {name: body["rows"] for name, body in methods.items() if any(body.get("rows", []))}:
        drawn.append(_costs(costs, tasks, folder / "cost.png"))
    return [path.name for path in drawn]


def classes(counts: dict[str, dict[str, int]]) -> tuple[list[str], list[str]]:
    """Owners and answerers of a confusion matrix, the generalist last in both."""
    owners = [name for name in counts if name != GENERALIST]
    answerers = dict.fromkeys(answerer for row in counts.values() for answerer in row)
    others = [answerer for answerer in answerers if answerer not in (*owners, GENERALIST)]
    last = [GENERALIST] if GENERALIST in counts else []
    return [*owners, *last], [*owners, *others, GENERALIST]


def _matrices(methods: dict[str, Any], tasks: Sequence[str], path: Path) -> Path:
    figure, axes = _grid(len(methods), 1.1 + 0.45 * len(tasks), 1.1 + 0.4 * len(tasks))
    for axis, (name, body) in zip(axes, methods.items(), strict=False):
        _heatmap(axis, body["matrix"], columns=list(tasks), rows=["–", *tasks])
        axis.set_title(name, fontsize=9)
    return _save(figure, path)


def _confusions(confusions: dict[str, Any], path: Path) -> Path:
    size = max(len(classes(counts)[1]) for counts in confusions.values())
    figure, axes = _grid(len(confusions), 1.6 + 0.5 * size, 1.4 + 0.45 * size)
    for axis, (name, counts) in zip(axes, confusions.items(), strict=False):
        owners, answerers = classes(counts)
        shares = [[counts[o].get(a, 0) / sum(counts[o].values()) for a in answerers] for o in owners]
        _heatmap(axis, shares, columns=answerers, rows=owners)
        axis.set(title=name, xlabel="answered by", ylabel="query of")
    return _save(figure, path)


def _heatmap(axis: Any, shares: Sequence[Sequence[float]], *, columns: list[str], rows: list[str]) -> None:
    """Shares from 0 to 1 as colours, with their percentages as text."""
    axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=60, ha="right", fontsize=7)
    axis.set_yticks(range(len(rows)), rows, fontsize=7)
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            color = "white" if share > 0.6 else "black"
            axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=7, color=color)


def _ar(methods: dict[str, Any], tasks: Sequence[str], path: Path) -> Path:
    figure, (axis,) = _grid(1, 7, 4)
    marks = "osv^<>DPX*dp"
    for number, (name, body) in enumerate(methods.items()):
        steps = range(1, len(tasks) + 1)
        axis.plot(steps, body["ar_over_time"], marker=marks[number % len(marks)], label=name, linewidth=1.2, ms=4)
    axis.set_xticks(range(1, len(tasks) + 1), tasks)
    axis.set(xlabel="after learning", ylabel="mean score on the tasks so far", ylim=(0, None))
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, path)


def _decisions(decisions: dict[str, Any], path: Path) -> Path:
    panels = [(method, expert, body) for method, experts in decisions.items() for expert, body in experts.items()]
    figure, axes = _grid(len(panels), 3.2, 2.2)
    for axis, (method, expert, body) in zip(axes, panels, strict=False):
        samples = {"own": body["own"], "other tasks": body["other_tasks"], "foreign": body["nobody"]}
        for label, values in samples.items():
            axis.hist(values, bins=BINS, range=(0, 1), histtype="step", label=label, linewidth=1.4)
        axis.axvline(body["threshold"], color="black", linestyle="--", linewidth=1)
        axis.set_title(f"{method}: {expert}", fontsize=8)
        axis.set_yscale("symlog")
    axes[0].legend(fontsize=7)
    return _save(figure, path)


def _rocs(curves: dict[str, Any], path: Path) -> Path:
    figure, (axis,) = _grid(1, 4.4, 4)
    for name, body in curves.items():
        curve, area = body["roc"], body["figures"]["auroc"]["mean"]
        axis.plot(curve["false_accepts"], curve["true_accepts"], label=f"{name}: {area:.3f}")
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="accepted share of foreign queries", ylabel="accepted share of the tasks' queries")
    axis.legend(fontsize=8, title="AUROC", loc="lower right")
    return _save(figure, path)


def _costs(costs: dict[str, list[float]], tasks: Sequence[str], path: Path) -> Path:
    figure, (axis,) = _grid(1, 7, 3.6)
    for name, rows in costs.items():
        axis.plot(range(1, len(tasks) + 1), rows, marker="o", ms=3, linewidth=1.2, label=name)
    axis.set_xticks(range(1, len(tasks) + 1), tasks)
    axis.set(xlabel="arriving task", ylabel="rows fitted on", ylim=(0, None))
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, path)


def _grid(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure with `panels` axes of `width` x `height` inches each, at most four in a row."""
    from matplotlib import pyplot

    columns = min(4, panels)
    rows = math.ceil(panels / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(columns * width, rows * height), layout="constrained", squeeze=False
    )
    flat = list(axes.flat)
    for axis in flat[panels:]:
        axis.set_visible(False)
    return figure, flat[:panels]


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
