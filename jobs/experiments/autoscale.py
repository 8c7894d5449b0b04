"""Load profiles against scaling policies, on a cluster of this machine whose nodes come and go.

The real Ray autoscaler with processes as nodes; the experts of an existing store. Writes CSV, plots and summary.json to
--out, and prints a table. Results: docs/autoscaling.md.

    python jobs/experiments/autoscale.py --store EXPERTS --profiles step,spike:40,step@skewed --out autoscale
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from see_ray.cli.options import configured
from see_ray.cli.run import run

if TYPE_CHECKING:
    from see_ray.config import Config

PROFILES = "step,ramp,spike:40,diurnal,idle,step@skewed,steady+learn"


@click.command()
@click.option("--profiles", default=PROFILES, show_default=True, help="NAME[:PEAK][@skewed or @EXPERT][+learn].")
@click.option("--topologies", default="per_expert,shared", show_default=True, help="Values of serve.topology.")
@click.option("--policies", default="fixed,quick", show_default=True, help="Scaling policies; also steady, zero.")
@click.option("--base", default=0.5, show_default=True, help="Lowest load, requests a second.")
@click.option("--peak", default=4.0, show_default=True, help="Highest load, requests a second.")
@click.option("--seconds", default=60.0, show_default=True, help="Length of each profile.")
@click.option("--node-cpus", default=1.0, show_default=True, help="CPUs of a worker node, as Ray counts them.")
@click.option("--max-nodes", default=8, show_default=True, help="Most worker nodes.")
@click.option("--out", type=click.Path(path_type=Path), default="autoscale", show_default=True, help="Folder.")
@configured
def main(config: Config, profiles: str, topologies: str, policies: str, **size: Any) -> None:
    """Run every profile at every topology and policy."""
    from loadtest import scenario
    from loadtest.experiment import Experiment, run_experiment
    from loadtest.report import summary_table

    from see_ray.cli.progress_bar import TerminalListener

    scaling = scenario.policies(policies)
    load = [scenario.Scenario.parse(text) for text in profiles.split(",")]
    with TerminalListener() as listener:
        summaries = run_experiment(config, Experiment(**size), topologies.split(","), scaling, load, listener)
    click.echo(summary_table(summaries))


if __name__ == "__main__":
    run(main)
