"""What a run under load came to: figures, a table of seconds, a picture. Measured and simulated runs alike."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from loadtest.generator import Outcome

FAST_S = 0.1
"""Seconds within which a refusal is a quick one."""


@dataclass(frozen=True)
class Second:
    """What was there at one look; `replicas` by application."""

    at: float
    nodes: int
    replicas: dict[str, int]


@dataclass(frozen=True)
class Run:
    """One profile at one policy."""

    profile: str
    policy: str
    seconds: float
    outcomes: list[Outcome]
    looks: list[Second] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Load, latency in seconds, refusals and cost of the whole run."""
        served = [o for o in self.outcomes if o.status == 200]
        refused = [o for o in self.outcomes if o.status == 429]
        between = [b.at - a.at for a, b in zip(self.looks, self.looks[1:], strict=False)]
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
            "replica_seconds": round(
                sum(sum(s.replicas.values()) * d for s, d in zip(self.looks, between, strict=False))
            ),
            "node_seconds": round(sum(s.nodes * d for s, d in zip(self.looks, between, strict=False))),
            "most_replicas": max((sum(s.replicas.values()) for s in self.looks), default=0),
            "most_nodes": max((s.nodes for s in self.looks), default=0),
        }


COLUMNS = (
    "topology", "policy", "profile", "offered", "served", "refused", "failed", "p50_s", "p95_s", "refusal_p95_s",
    "refused_fast", "first_answer_s", "most_replicas", "most_nodes", "replica_seconds", "node_seconds", "learned_s",
)  # fmt: skip


def as_table(summaries: Sequence[dict[str, Any]]) -> str:
    """What runs came to, a line each, as a table in Markdown."""
    names = [name for name in COLUMNS if any(name in summary for summary in summaries)]
    lines = [["" if summary.get(name) is None else str(summary[name]) for name in names] for summary in summaries]
    return "\n".join("| " + " | ".join(line) + " |" for line in (names, ["---"] * len(names), *lines))


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that a share of them does not exceed, to the millisecond; None of none."""
    ranked = sorted(values)
    return round(ranked[min(len(ranked) - 1, int(share * len(ranked)))], 3) if ranked else None


def written(run: Run, path: Path) -> None:
    """A row a second as `path.csv`, every outcome as `path.outcomes.csv`, and the picture `path.png`."""
    rows = per_second(run)
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    with path.with_suffix(".outcomes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(run.outcomes[0])) if run.outcomes else ["at"])
        writer.writeheader()
        writer.writerows(asdict(outcome) for outcome in run.outcomes)
    draw_run(run, rows, path.with_suffix(".png"))


def per_second(run: Run) -> list[dict[str, Any]]:
    """What came, what became of it, and what was there, second by second."""
    rows = []
    for look in run.looks:
        came = [o for o in run.outcomes if look.at <= o.at < look.at + 1]
        done = [o for o in run.outcomes if o.status == 200 and look.at <= o.at + o.seconds < look.at + 1]
        times = [o.seconds for o in done]
        rows.append({
            "second": round(look.at, 1),
            "offered": len(came),
            "served": len(done),
            "refused": sum(o.status == 429 for o in came),
            "failed": sum(o.status not in (200, 429) for o in came),
            "p50_s": round(statistics.median(times), 3) if times else "",
            "p95_s": quantile(times, 0.95) or "",
            "nodes": look.nodes,
            "replicas": sum(look.replicas.values()),
            "replicas_by_application": json.dumps(look.replicas),
        })  # fmt: skip
    return rows


def draw_run(run: Run, rows: list[dict[str, Any]], path: Path) -> None:
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
