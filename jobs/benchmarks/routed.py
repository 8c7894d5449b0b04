"""Learn tasks in order, serve their experts, and ask the held-out rows over HTTP.

Reads `NAME.train.jsonl` and `NAME.test.jsonl` from a folder, such as SuperNI's. Tasks of --foreign need test rows only:
no expert learns them. Prints a table of routing and scores; --out writes JSON. Experts that the store holds already are
not learned again.

    python jobs/benchmarks/routed.py --data DATA --tasks sa,trans,pe --foreign ood_trec --dir WORK
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean

import click
from bench_options import Names, data_option, out_option, settings_option, write_json
from learned_tasks import learn_missing, test_rows

from see_ray import client, cluster
from see_ray.cli.progress_bar import TerminalListener
from see_ray.cli.render import table
from see_ray.cli.run import run
from see_ray.config import load_config
from see_ray.data.rows import Row
from see_ray.routing.chain import GENERALIST
from see_ray.serving import endpoint


@click.command()
@data_option()
@click.option("--tasks", type=Names(), required=True, help="Names in order of arrival, separated by commas.")
@click.option("--foreign", type=Names(), default="", help="Tasks that no expert learns.")
@click.option("--rows", default=200, show_default=True, help="Training rows of each task.")
@click.option("--test-rows", "test_count", default=50, show_default=True, help="Held-out rows of each task.")
@click.option("--max-tokens", default=128, show_default=True, help="Limit of an answer.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), required=True, help="Where experts are kept.")
@out_option
@settings_option
def main(
    data: Path,
    tasks: list[str],
    foreign: list[str],
    rows: int,
    test_count: int,
    max_tokens: int,
    folder: Path,
    out: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Measure routing and scores of the served experts."""
    config = load_config(None, [f"store.url={folder / 'experts'}", f"fit.tracking_dir={folder / 'runs'}", *settings])
    report: dict[str, dict[str, float]] = {}
    with TerminalListener() as listener:
        cluster.connect()
        for name, learned in learn_missing(data, tasks, rows, config, listener).items():
            report[name] = {"threshold": learned.manifest.threshold, "fit_tokens_per_s": learned.fit.tokens_per_s}
            report[name] |= {f"{step}_s": seconds for step, seconds in learned.seconds.items()}
        listener.step("Starting the endpoint")
        url = endpoint.start(config)
        for name in [*tasks, *foreign]:
            listener.step(f"Asking {test_count} rows of {name}")
            test = test_rows(data, name, test_count)
            prompts = [row.prompt[-1][1] for row in test]
            started = time.perf_counter()
            answers = client.ask_all(url, prompts, max_tokens=max_tokens, on_done=partial(listener.progress, name))
            seconds = time.perf_counter() - started
            owner = name if name in tasks else GENERALIST
            report[name] = {**report.get(name, {}), **scores(test, answers, owner), "seconds": seconds}
        endpoint.stop()
    head = ["task", "routed right", "ROUGE-L", "exact match", "seconds"]
    keys = ["routed_right", "rouge_l", "exact_match", "seconds"]
    click.echo(table(head, [[name, *(f"{row[key]:.3f}" for key in keys)] for name, row in report.items()]))
    write_json(report, out)


def scores(rows: Sequence[Row], answers: list[tuple[str, str]], owner: str) -> dict[str, float]:
    """Share of the rows that their owner answered, ROUGE-L and exact match."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = [(row.response, text) for row, (text, _) in zip(rows, answers, strict=True)]
    return {
        "routed_right": mean(answered_by == owner for _, answered_by in answers),
        "rouge_l": mean(scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs),
        "exact_match": mean(text.strip() == reference.strip() for reference, text in pairs),
    }


if __name__ == "__main__":
    run(main)
