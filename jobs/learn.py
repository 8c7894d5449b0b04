"""Learn tasks one after another on a running cluster; tasks that are live already are skipped.

So the same submission continues after `ray job stop` or a crash: finished tasks are skipped, and an interrupted fit
continues from its last checkpoint. Exit code 0 once every task is live.

    ray job submit --working-dir . --entrypoint-num-cpus 1 -- \\
        python jobs/learn.py s3://bucket/tickets.jsonl s3://bucket/dates.jsonl --store s3://bucket/experts
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from see_ray.cli.options import base_model_option, configured
from see_ray.cli.run import run

if TYPE_CHECKING:
    from see_ray.config import Config


@click.command()
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--max-rows", type=click.IntRange(min=1), metavar="N", help="Train on at most N rows of each task.")
@configured
@base_model_option
def main(config: Config, sources: tuple[str, ...], max_rows: int | None) -> None:
    """Fit an expert on each SOURCE, in order, and make it live. See `see learn --help`."""
    from see_ray import cluster
    from see_ray.cli import render
    from see_ray.cli.progress_bar import TerminalListener
    from see_ray.errors import LiveError
    from see_ray.pipeline import Source, learn

    cluster.check_submitted(config)
    with TerminalListener() as listener:
        cluster.connect()
        for source in sources:
            try:
                learned = learn(Source(source, max_rows=max_rows), config, listener=listener)
            except LiveError as error:
                listener.note(f"skipped {source}: {error}")
            else:
                click.echo(render.learned_text(learned))


if __name__ == "__main__":
    run(main)
