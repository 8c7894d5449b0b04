"""Write a summary as files: report.json, report.md and the plots beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from see_ray.evaluate import plots
from see_ray.evaluate.claims import claims
from see_ray.evaluate.result_cache import write_json
from see_ray.routing.chain import GENERALIST

CAPTIONS = {
    "matrix.png": "R of each method: a row for each task learned, a column for each task tested",
    "ar.png": "mean score on the tasks learned so far, after each task",
    "confusion.png": "owner and answerer of each query, after the last task",
    "decisions.png": "P(accept) of each expert on its own, other tasks' and foreign queries; dashed: its threshold",
    "roc.png": "queries of the tasks against foreign queries, over all thresholds together",
    "cost.png": "rows fitted on for each arriving task",
}
"""Caption of each plot by file name."""


def write_report(summary: dict[str, Any], about: dict[str, Any], folder: Path) -> str:
    """Write report.json, report.md and the plots; returns the text of report.md.

    Args:
        summary: from `results.summary`.
        about: what was evaluated, by name; the first lines of the report.
        folder: created if absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(summary, folder)
    text = markdown(summary, about, drawn)
    write_json(folder / "report.json", {"about": about, **summary})
    (folder / "report.md").write_text(text, encoding="utf-8")
    return text


def markdown(summary: dict[str, Any], about: dict[str, Any], drawn: Sequence[str]) -> str:
    """The report as Markdown; `drawn` are file names of plots."""
    methods, tasks = summary["methods"], summary["tasks"]
    parts = ["# Report", _about(about), "## Quality", _quality(methods)]
    if len(methods) > 1 and (checked := claims(methods)):
        rows = [[claim.sentence, claim.measured, "yes" if claim.holds else "**no**"] for claim in checked]
        parts += ["## Claims about SEE", markdown_table(["claim", "measured", "holds"], rows)]
    if any("routing_accuracy" in body["figures"] for body in methods.values()):
        parts += ["## Routing", _routing(methods)]
    if any("rows" in body for body in methods.values()):
        parts += ["## Cost of each arriving task", _cost(methods, tasks)]
    if set_aside := [f"- {name}: {reason}" for name, body in methods.items() for reason in body["set_aside"]]:
        parts += ["## Set aside by the gate", "\n".join(set_aside)]
    parts += ["## Scores after the last task", _scores(methods, summary["kinds"])]
    for name, body in methods.items():
        parts += [f"## R of {name}", _matrix(body["matrix"], tasks)]
        if "confusion" in body:
            parts += [f"Owner and answerer of each query after the last task ({name}):", _confusion(body["confusion"])]
    parts += [f"![{CAPTIONS[file]}]({file})" for file in drawn]
    return "\n\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- sections ------------------------------------------------------------------------------


def _about(about: Mapping[str, Any]) -> str:
    return "\n".join(
        f"- {name}: {value if isinstance(value, str) else json.dumps(value)}" for name, value in about.items()
    )


def _quality(methods: dict[str, Any]) -> str:
    head = ["method", "seeds", "AR", "BWT", "FWT"]
    rows = [
        [name, str(len(body["seeds"])), *(_points(body["figures"].get(key)) for key in ("ar", "bwt", "fwt"))]
        for name, body in methods.items()
    ]
    note = "Points from 0 to 100; ± is the standard deviation over seeds."
    if any("behind_see" in body for body in methods.values()):
        note += (
            "\nBehind SEE: SEE's AR minus the method's, over the same queries, with its 95 % confidence interval"
            "\n(bootstrap over each task's test queries). Where the interval holds 0, the difference may be chance."
        )
        head.append("behind SEE")
        for row, body in zip(rows, methods.values(), strict=True):
            row.append(_interval(body.get("behind_see")))
    return note + "\n\n" + markdown_table(head, rows)


def _routing(methods: dict[str, Any]) -> str:
    routed = {name: body["figures"] for name, body in methods.items() if "routing_accuracy" in body["figures"]}
    sources = [key for key in dict.fromkeys(k for f in routed.values() for k in f) if key.endswith(f" to {GENERALIST}")]
    head = ["method", "right expert", "own to generalist", *sources, "AUROC"]
    keys = ["routing_accuracy", "own_to_generalist", *sources]
    rows = [
        [name, *(_points(figures.get(key)) for key in keys), _number(figures.get("auroc"))]
        for name, figures in routed.items()
    ]
    note = "Percentages of queries. AUROC: how well the margins separate the tasks' queries from foreign ones."
    return note + "\n\n" + markdown_table(head, rows)


def _cost(methods: dict[str, Any], tasks: Sequence[str]) -> str:
    head = ["method", "rows fitted on, by task", "seconds, by task", "rows of the last to the first task"]
    rows = [
        [
            name,
            ", ".join(f"{count:.0f}" for count in body["rows"]),
            ", ".join(f"{seconds:.0f}" for seconds in body["seconds"]),
            f"{body['rows'][-1] / body['rows'][0]:.1f}×" if body["rows"][0] else "–",
        ]
        for name, body in methods.items()
        if "rows" in body
    ]
    return f"Tasks arrive in the order {', '.join(tasks)}.\n\n" + markdown_table(head, rows)


def _scores(methods: dict[str, Any], kinds: dict[str, str]) -> str:
    head = ["method", *(f"{task} ({kind})" for task, kind in kinds.items())]
    rows = [
        [name, *(_points(body["scores"][task][kind]) for task, kind in kinds.items())] for name, body in methods.items()
    ]
    return markdown_table(head, rows)


def _matrix(matrix: Sequence[Sequence[float]], tasks: Sequence[str]) -> str:
    names = ["nothing", *tasks]
    rows = [[name, *(f"{100 * value:.1f}" for value in row)] for name, row in zip(names, matrix, strict=True)]
    return markdown_table(["after learning", *tasks], rows)


def _confusion(counts: dict[str, dict[str, int]]) -> str:
    owners, answerers = plots.classes(counts)
    rows = [[owner, *(str(counts[owner].get(answerer, 0)) for answerer in answerers)] for owner in owners]
    return markdown_table(["query of", *answerers], rows)


# --- cells ---------------------------------------------------------------------------------


def _points(value: dict[str, float | None] | None) -> str:
    return _with_spread(value, lambda number: f"{100 * number:.1f}")


def _number(value: dict[str, float | None] | None) -> str:
    return _with_spread(value, lambda number: f"{number:.3f}")


def _with_spread(value: dict[str, float | None] | None, as_text: Callable[[float], str]) -> str:
    if value is None or value["mean"] is None:
        return "–"
    spread = value["spread"]
    return as_text(value["mean"]) + (f" ± {as_text(spread)}" if spread is not None else "")


def _interval(value: dict[str, float] | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value['mean']:+.1f} ({100 * value['low']:+.1f} to {100 * value['high']:+.1f})"
