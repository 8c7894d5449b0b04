"""Start the endpoint on a running cluster; it keeps running after this job has ended. With --stop: stop it.

If it runs already, the job only prints what is live, so it can be submitted again at any time. Exit code 0 once every
expert of the store is live. The endpoint picks new experts up by itself.

    ray job submit --working-dir . --entrypoint-num-cpus 1 -- \\
        python jobs/serve.py --store s3://bucket/experts --host 0.0.0.0
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from see_ray.cli.options import base_model_option, configured
from see_ray.cli.run import run

if TYPE_CHECKING:
    from see_ray.config import Config


@click.command()
@click.option("--host", help="Address that every node binds. [serve.host: 127.0.0.1]")
@click.option("--port", type=int, help="TCP port on every node. [serve.port: 8000]")
@click.option("--stop", "stopping", is_flag=True, help="Stop the endpoint.")
@configured
@base_model_option
def main(config: Config, stopping: bool) -> None:
    """Serve the live experts behind one OpenAI-compatible endpoint."""
    from see_ray import cluster
    from see_ray.cli.progress_bar import TerminalListener
    from see_ray.serving import endpoint

    cluster.check_submitted(config)
    with TerminalListener() as listener:
        cluster.connect()
        if stopping:
            return endpoint.stop()
        listener.step("Starting the endpoint, unless it runs already")
        if not endpoint.running():
            endpoint.start(config)
    live = endpoint.live()
    names = [f"{expert.name}@{expert.version}" for expert in live.experts]
    click.echo(f"sequence version {live.version}; experts, in the order asked: {', '.join(names) or 'none yet'}")
    if live.failed:
        sys.exit("\n".join(f"not running: {expert}: {reason}" for expert, reason in live.failed.items()))


if __name__ == "__main__":
    run(main)
