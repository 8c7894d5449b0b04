"""Load profiles against scaling policies, on a cluster of this machine whose nodes come and go.

The real Ray autoscaler with processes as nodes, on an address of its own; the experts of a store that exists.
Leaves CSV, pictures and summary.json in --out, and prints a table. What came of it: docs/autoscaling.md.

    python jobs/autoscale.py --store EXPERTS --profiles step,spike,idle --policies fixed,quick --out autoscale
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from see_ray.cli import configured, run

if TYPE_CHECKING:
    from see_ray.config import Config


@click.command()
@click.option("--profiles", default="step,ramp,spike:40,diurnal,idle", show_default=True, help="NAME[:PEAK].")
@click.option("--policies", default="fixed,quick,steady,zero", show_default=True, help="How it may scale.")
@click.option("--base", default=0.5, show_default=True, help="Lowest load, requests a second.")
@click.option("--peak", default=4.0, show_default=True, help="Highest load, requests a second.")
@click.option("--seconds", default=60.0, show_default=True, help="Length of each profile.")
@click.option("--hot", metavar="EXPERT", help="Nine of ten queries are this expert's.")
@click.option("--node-cpus", default=1.0, show_default=True, help="CPUs of a worker node, as Ray counts them.")
@click.option("--max-nodes", default=8, show_default=True, help="Most worker nodes.")
@click.option("--out", type=click.Path(path_type=Path), default="autoscale", show_default=True, help="Folder.")
@configured
def main(config: Config, profiles: str, policies: str, **size: object) -> None:
    """Run every profile at every policy."""
    from see_ray.autoscale import POLICIES, experiment
    from see_ray.terminal import TerminalListener, table

    chosen = [POLICIES[name] for name in policies.split(",")]
    with TerminalListener() as listener:
        done = experiment(config, chosen, profiles.split(","), listener=listener, **size)  # type: ignore[arg-type]
    print(table(list(done[0]), [["" if value is None else str(value) for value in row.values()] for row in done]))


if __name__ == "__main__":
    run(main)
