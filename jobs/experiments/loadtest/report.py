"""The report of a run under load, measured or simulated: figures, a CSV of seconds, a plot."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loadtest.generator import Outcome
from see_ray.cli.render import table

FAST_S = 0.1
"""A refusal within so many seconds counts as fast."""


@dataclass(frozen=True)
class ClusterSample:
    """Worker nodes, and running replicas by application, `at` seconds after the start."""

    at: float
    nodes: int
    replicas: dict[str, int]


@dataclass(frozen=True)
class Run:
    """One load profile under one scaling policy; `samples` are about a second apart."""

    profile: str
    policy: str
    seconds: float
    outcomes: list[Outcome]
    samples: list[ClusterSample] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Load, latency in seconds, refusals and cost of the whole run."""
        served = [o for o in self.outcomes if o.status == 200]
        refused = [o for o in self.outcomes if o.status == 429]
        replicas = [sum(sample.replicas.values()) for sample in self.samples]
        nodes = [sample.nodes for sample in self.samples]
        return {
            "profile": self.profile,
            "policy": self.policy,
            "seconds": self.seconds,
            "offered": len(self.outcomes),
            "served": len(served),
            "refused": len(refused),
            "failed": len(self.outcomes) - len(served) - len(refused),
            "served_per_s": round(len(served) / self.seconds, 2),
            **{f"p{share}_s": quantile([o.seconds for o in served], share / 100) for share in (50, 95, 99)},
            "refused_fast": round(sum(o.seconds <= FAST_S for o in refused) / len(refused), 3) if refused else None,
            "refusal_p95_s": quantile([o.seconds for o in refused], 0.95),
            "first_answer_s": round(served[0].seconds, 2) if served else None,
            "sent_late_p95_s": quantile([o.late for o in self.outcomes], 0.95),
            "replica_seconds": self._integral(replicas),
            "node_seconds": self._integral(nodes),
            "most_replicas": max(replicas, default=0),
            "most_nodes": max(nodes, default=0),
        }

    def _integral(self, counts: Sequence[int]) -> int:
        """A count of each sample, times the seconds until the next sample."""
        seconds = [after.at - before.at for before, after in zip(self.samples, self.samples[1:], strict=False)]
        return round(sum(count * s for count, s in zip(counts, seconds, strict=False)))


COLUMNS = (
    "topology", "policy", "profile", "offered", "served", "refused", "failed", "p50_s", "p95_s", "refusal_p95_s",
    "refused_fast", "first_answer_s", "most_replicas", "most_nodes", "replica_seconds", "node_seconds", "learned_s",
)  # fmt: skip


def summary_table(summaries: Sequence[dict[str, Any]]) -> str:
    """Summaries of runs, a row each, as a Markdown table; columns that no run has are left out."""
    names = [name for name in COLUMNS if any(name in summary for summary in summaries)]
    rows = [["" if summary.get(name) is None else str(summary[name]) for name in names] for summary in summaries]
    return table(names, rows, markdown=True)


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that a share of the values does not exceed, rounded to 0.001; None where there are none."""
    ranked = sorted(values)
    return round(ranked[min(len(ranked) - 1, int(share * len(ranked)))], 3) if ranked else None


def write_run(run: Run, path: Path) -> None:
    """Write a row a second to `path.csv`, every outcome to `path.outcomes.csv`, and a plot to `path.png`."""
    rows = per_second(run)
    outcomes = [asdict(outcome) for outcome in run.outcomes]
    _write_csv(path.with_suffix(".csv"), list(rows[0]), rows)
    _write_csv(path.with_suffix(".outcomes.csv"), list(outcomes[0]) if outcomes else ["at"], outcomes)
    _plot(run, rows, path.with_suffix(".png"))


def per_second(run: Run) -> list[dict[str, Any]]:
    """Offered load, outcomes and capacity, second by second."""
    rows = []
    for sample in run.samples:
        offered = [o for o in run.outcomes if sample.at <= o.at < sample.at + 1]
        served = [o for o in run.outcomes if o.status == 200 and sample.at <= o.at + o.seconds < sample.at + 1]
        latencies = [o.seconds for o in served]
        rows.append(
            {
                "second": round(sample.at, 1),
                "offered": len(offered),
                "served": len(served),
                "refused": sum(o.status == 429 for o in offered),
                "failed": sum(o.status not in (200, 429) for o in offered),
                "p50_s": round(statistics.median(latencies), 3) if latencies else "",
                "p95_s": quantile(latencies, 0.95) or "",
                "nodes": sample.nodes,
                "replicas": sum(sample.replicas.values()),
                "replicas_by_application": json.dumps(sample.replicas),
            }
        )
    return rows


def _write_csv(path: Path, columns: list[str], rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _plot(run: Run, rows: list[dict[str, Any]], path: Path) -> None:
    """Load, latency and capacity over time, one above the other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    upper, middle, lower = figure.subplots(3, 1, sharex=True)
    seconds = [row["second"] for row in rows]
    for name in ("offered", "served", "refused"):
        upper.plot(seconds, [row[name] for row in rows], label=f"{name} a second")
    served = [o for o in run.outcomes if o.status == 200]
    middle.scatter([o.at for o in served], [o.seconds for o in served], s=6, label="latency of each answer (s)")
    for name in ("replicas", "nodes"):
        lower.step(seconds, [row[name] for row in rows], where="post", label=name)
    for axes in (upper, middle, lower):
        axes.legend(loc="upper right", fontsize=8)
        axes.set_ylim(bottom=0)
    upper.set_title(f"{run.profile}, policy {run.policy}")
    lower.set_xlabel("seconds")
    figure.savefig(path, dpi=100)
