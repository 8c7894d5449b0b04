"""The model of the endpoint beside measured runs, and then beyond this machine.

Reads what `jobs/experiments/autoscale.py` left (times.json, summary.json, the outcomes of each run), puts the same
arrivals through the model, and prints predicted against measured. With --beyond it then asks the model which topology
answers how fast, and on how many nodes, for more experts and more load than there is here. --out writes JSON.

    python jobs/experiments/simulate.py --measured autoscale --beyond --out simulate.json
"""

from __future__ import annotations

import csv
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from loadtest.generator import TOKENS, Arrival, arrivals
from loadtest.simulation import Design, Times, simulate

from see_ray.cli.render import table
from see_ray.config import ServeConfig, load_config

COMPARED = ("served", "refused", "p50_s", "p95_s", "replica_seconds")
EXPERTS = (10, 100, 1000, 10000)
RATES = (1, 10, 100, 1000, 10000, 100000)
CELL_RATE = 20.0
"""Requests a second of one simulated cell: more load is more cells alike, since replicas do not wait for each other."""

LOOKAHEAD = ServeConfig().lookahead

BUSY = 0.6
"""Share of the time for which a replica beyond this machine is planned to work."""


@click.command()
@click.option("--measured", type=click.Path(exists=True, path_type=Path), required=True, help="What autoscale.py left.")
@click.option("--cores", default=2, show_default=True, help="Processors of the machine that was measured.")
@click.option("--beyond", is_flag=True, help="Then go beyond it.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(measured: Path, cores: int, beyond: bool, out: Path | None) -> None:
    times = {name: Times(**found) for name, found in json.loads((measured / "times.json").read_text()).items()}
    report: dict[str, Any] = {"compared": compared(measured, times, cores)}
    rows = [
        [row["topology"], row["policy"], row["profile"], *(f"{row[key][0]} / {row[key][1]}" for key in COMPARED)]
        for row in report["compared"]
    ]
    print(table(["topology", "policy", "profile", *(f"{name} measured / predicted" for name in COMPARED)], rows))
    if beyond:
        grid = [(topology, n, rate) for topology in ("per_expert", "shared") for n in EXPERTS for rate in RATES]
        report["beyond"] = [planned(times[place[0]], *place) for place in grid]
        print()
        print(table(list(report["beyond"][0]), [[str(value) for value in row.values()] for row in report["beyond"]]))
    if out:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def compared(measured: Path, times: dict[str, Times], cores: int) -> list[dict[str, Any]]:
    """Each measured run, and the model's figures for the same arrivals."""
    made = []
    for summary in json.loads((measured / "summary.json").read_text()):
        with (measured / f"{summary['file']}.outcomes.csv").open() as file:
            outcomes = list(csv.DictReader(file))
        names = summary["experts"]
        # Who answered is known where somebody did; a refused query would have gone to its own expert.
        coming = [Arrival(float(o["at"]), o["answered_by"] or o["kind"], "") for o in outcomes]
        serve = load_config(measured / f"{summary['topology']}-{summary['policy']}.yaml").serve
        design = Design.of(serve, tuple(names), cores=cores)
        lengths = [int(o["tokens"]) for o in outcomes if int(o.get("tokens") or 0)]
        if lengths:  # and a pass in which it is found that the answer has ended
            design = replace(design, tokens=round(statistics.mean(lengths)) + 1)
        predicted = simulate(coming, times[serve.topology], design, summary["seconds"]).summary()
        made.append({"policy": summary["policy"], "profile": summary["profile"], "topology": summary["topology"],
                     **{name: (summary[name], predicted[name]) for name in COMPARED}})  # fmt: skip
    return made


def planned(times: Times, topology: Any, experts: int, rate: float) -> dict[str, Any]:
    """Latency, replicas and nodes of an endpoint that was built for a load, every expert asked for as often."""
    names = tuple(f"e{number}" for number in range(experts))
    # Seconds of work of a request at each deployment that it meets.
    answer = times.hop + TOKENS * times.token
    if topology == "shared":
        each = times.hop + (times.reading() & times.deciding(experts)).seconds + answer
        replicas = max(1, math.ceil(rate * each / BUSY))
    else:  # the generalist reads for all; an expert is asked by all that none took before, and by some too early
        asked = [rate * (1 - max(0, place + 1 - LOOKAHEAD) / experts) for place in range(experts)]
        decide = times.hop + times.hand + times.decide
        load = [rate * (times.hop + times.read), *(share * decide + rate / experts * answer for share in asked)]
        replicas = sum(max(1, math.ceil(seconds / BUSY)) for seconds in load)
    cell = min(rate, CELL_RATE)
    seconds = max(20.0, min(600.0, 400 / cell))
    coming = arrivals(lambda t: cell, seconds, lambda t, chance: (chance.choice(names), ""))
    if topology == "per_expert" and experts > 100:
        # A walk over so many deployments is a sum of hops, reads and decisions; queues hardly matter beside it.
        each, rest = decide / LOOKAHEAD, times.hop + times.read + answer
        latency, p95 = experts / 2 * each + rest, 0.95 * experts * each + rest
    else:
        per = max(1, math.ceil(replicas * cell / rate)) if topology == "shared" else max(
            1, math.ceil(max(cell / rate * seconds_ for seconds_ in load) / BUSY))  # fmt: skip
        design = Design(topology, names, min_replicas=per, max_replicas=per, max_wait_s=1e9, tokens=TOKENS,
                        lookahead=LOOKAHEAD, share_prefix=True)  # fmt: skip
        summary = simulate(coming, times, design, seconds).summary()
        latency, p95 = summary["p50_s"], summary["p95_s"]
    return {"topology": topology, "experts": experts, "requests_per_s": rate, "replicas": replicas,
            "nodes_of_8": math.ceil(replicas / 8), "typical_s": round(latency, 2), "p95_s": round(p95, 2)}  # fmt: skip


if __name__ == "__main__":
    main()
