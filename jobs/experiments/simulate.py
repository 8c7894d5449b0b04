"""The simulated endpoint beside measured runs, and beyond this machine.

Reads what `jobs/experiments/autoscale.py` wrote (times.json, summary.json, the outcomes of each run), simulates the
same arrivals, and prints measured and predicted figures. With --beyond it also simulates more experts and more load
than a machine can measure: latency, replicas and nodes of each topology. --out writes JSON.

    python jobs/experiments/simulate.py --measured autoscale --beyond --out simulate.json
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click
from loadtest.generator import MAX_TOKENS, Arrival, poisson_arrivals
from loadtest.simulation import EndpointDesign, ServiceTimes, simulate

from see_ray.cli.render import table
from see_ray.cli.run import run
from see_ray.config import ServeConfig, load_config

COMPARED = ("served", "refused", "p50_s", "p95_s", "replica_seconds")
EXPERTS = (10, 100, 1000, 10000)
RATES = (1, 10, 100, 1000, 10000, 100000)

CELL_RATE = 20.0
"""Requests a second that are simulated: more load is more such cells, since replicas do not wait for each other."""

LOOKAHEAD = ServeConfig().lookahead

UTILIZATION = 0.6
"""Share of the time for which a replica is planned to work."""

Topology = Literal["per_expert", "shared"]
TOPOLOGIES: tuple[Topology, ...] = ("per_expert", "shared")


@click.command()
@click.option("--measured", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of autoscale.py.")
@click.option("--cores", default=2, show_default=True, help="Processors of the machine that was measured.")
@click.option("--beyond", is_flag=True, help="Also simulate larger endpoints.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(measured: Path, cores: int, beyond: bool, out: Path | None) -> None:
    """Compare the simulation with measured runs."""
    times_by_topology = json.loads((measured / "times.json").read_text(encoding="utf-8"))
    times = {topology: ServiceTimes(**fields) for topology, fields in times_by_topology.items()}
    report: dict[str, Any] = {"compared": compare(measured, times, cores)}
    click.echo(comparison_table(report["compared"]))
    if beyond:
        grid = [(topology, experts, rate) for topology in TOPOLOGIES for experts in EXPERTS for rate in RATES]
        report["beyond"] = [plan(times[topology], topology, experts, rate) for topology, experts, rate in grid]
        rows = [[str(value) for value in row.values()] for row in report["beyond"]]
        click.echo("\n" + table(list(report["beyond"][0]), rows))
    if out:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


# --- measured runs ------------------------------------------------------------------------------


def compare(measured: Path, times: dict[str, ServiceTimes], cores: int) -> list[dict[str, Any]]:
    """Figures of each measured run as (measured, predicted)."""
    rows = []
    for summary in json.loads((measured / "summary.json").read_text(encoding="utf-8")):
        with (measured / f"{summary['file']}.outcomes.csv").open(encoding="utf-8") as file:
            outcomes = list(csv.DictReader(file))
        # A refused query has no `answered_by`; its own expert would have accepted it.
        arrivals = [Arrival(float(o["at"]), o["answered_by"] or o["kind"], "") for o in outcomes]
        serve = load_config(measured / f"{summary['topology']}-{summary['policy']}.yaml").serve
        design = EndpointDesign.from_config(serve, tuple(summary["experts"]), cores=cores)
        lengths = [int(o["tokens"]) for o in outcomes if int(o.get("tokens") or 0)]
        if lengths:  # and one decode step that yields the end of the answer
            design = replace(design, tokens=round(statistics.mean(lengths)) + 1)
        predicted = simulate(arrivals, times[serve.topology], design, summary["seconds"]).summary()
        row = {key: summary[key] for key in ("policy", "profile", "topology")}
        rows.append({**row, **{key: (summary[key], predicted[key]) for key in COMPARED}})
    return rows


def comparison_table(rows: list[dict[str, Any]]) -> str:
    head = ["topology", "policy", "profile", *(f"{key} measured / predicted" for key in COMPARED)]
    cells = [
        [row["topology"], row["policy"], row["profile"], *(f"{row[key][0]} / {row[key][1]}" for key in COMPARED)]
        for row in rows
    ]
    return table(head, cells)


# --- beyond this machine --------------------------------------------------------------------------


@dataclass(frozen=True)
class Capacity:
    """Replicas that an endpoint needs for a load.

    Attributes:
        replicas: of all deployments.
        per_deployment: of the deployment with most load, for the load of one cell.
    """

    replicas: int
    per_deployment: int


def plan(times: ServiceTimes, topology: Topology, experts: int, rate: float) -> dict[str, Any]:
    """Latency, replicas and nodes of an endpoint that is sized for a load, with all experts asked equally often."""
    names = tuple(f"e{number}" for number in range(experts))
    cell_rate = min(rate, CELL_RATE)
    capacity = (
        shared_capacity(times, experts, rate) if topology == "shared" else per_expert_capacity(times, experts, rate)
    )
    if topology == "per_expert" and experts > 100:
        typical_s, p95_s = long_walk_s(times, experts)
    else:
        design = EndpointDesign(
            topology,
            names,
            min_replicas=capacity.per_deployment,
            max_replicas=capacity.per_deployment,
            max_wait_s=1e9,
            tokens=MAX_TOKENS,
            lookahead=LOOKAHEAD,
            share_prefix=True,
        )
        seconds = max(20.0, min(600.0, 400 / cell_rate))
        arrivals = poisson_arrivals(lambda t: cell_rate, seconds, lambda t, rng: (rng.choice(names), ""))
        summary = simulate(arrivals, times, design, seconds).summary()
        typical_s, p95_s = summary["p50_s"], summary["p95_s"]
    return {
        "topology": topology,
        "experts": experts,
        "requests_per_s": rate,
        "replicas": capacity.replicas,
        "nodes_of_8": math.ceil(capacity.replicas / 8),
        "typical_s": round(typical_s, 2),
        "p95_s": round(p95_s, 2),
    }


def answer_s(times: ServiceTimes) -> float:
    return times.hop + MAX_TOKENS * times.token


def decision_s(times: ServiceTimes) -> float:
    """Seconds of one expert's decision over a prefix that the generalist has computed."""
    return times.hop + times.hand + times.decide


def shared_capacity(times: ServiceTimes, experts: int, rate: float) -> Capacity:
    request_s = times.hop + (times.prefill() & times.decisions(experts)).seconds + answer_s(times)
    replicas = max(1, math.ceil(rate * request_s / UTILIZATION))
    return Capacity(replicas, max(1, math.ceil(replicas * min(rate, CELL_RATE) / rate)))


def per_expert_capacity(times: ServiceTimes, experts: int, rate: float) -> Capacity:
    """The generalist prefills for all. An expert gets what no earlier one accepted, and, by lookahead, some more."""
    asked = [rate * (1 - max(0, place + 1 - LOOKAHEAD) / experts) for place in range(experts)]
    expert_loads = [requests * decision_s(times) + rate / experts * answer_s(times) for requests in asked]
    loads = [rate * (times.hop + times.read), *expert_loads]  # seconds of work a second
    cell_rate = min(rate, CELL_RATE)
    return Capacity(
        replicas=sum(max(1, math.ceil(load / UTILIZATION)) for load in loads),
        per_deployment=max(1, math.ceil(max(cell_rate / rate * load for load in loads) / UTILIZATION)),
    )


def long_walk_s(times: ServiceTimes, experts: int) -> tuple[float, float]:
    """Typical and 95th percentile latency of a walk over many experts: decisions dominate, queues hardly matter."""
    per_expert_s, rest_s = decision_s(times) / LOOKAHEAD, times.hop + times.read + answer_s(times)
    return experts / 2 * per_expert_s + rest_s, 0.95 * experts * per_expert_s + rest_s


if __name__ == "__main__":
    run(main)
