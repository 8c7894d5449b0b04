"""Learn tasks in order at a live endpoint, then ask their held-out rows over HTTP.

Reads JSONL tasks `NAME.train.jsonl` and `NAME.test.jsonl` from a folder, such as SuperNI's; the
last ones may have test rows only and belong to nobody. Prints a table, and with --out writes
JSON. Experts that the store holds already are not learned again.

    python jobs/benchmarks/routed.py --data DATA --tasks sa,trans,pe --foreign ood_trec --dir WORK
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import click

from see_ray import client, cluster
from see_ray.cli.render import TerminalListener, table
from see_ray.config import load_config
from see_ray.data.task import SplitOptions, read_task
from see_ray.pipeline import Source, learn
from see_ray.routing.chain import GENERALIST
from see_ray.serving import endpoint
from see_ray.store.expert_store import ExpertStore


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of the tasks.")
@click.option("--tasks", required=True, help="Names in order of arrival, separated by commas.")
@click.option("--foreign", default="", help="Tasks that no expert learns.")
@click.option("--rows", default=200, show_default=True, help="Training rows of each task.")
@click.option("--test-rows", default=50, show_default=True, help="Held-out rows of each task.")
@click.option("--max-tokens", default=128, show_default=True, help="Longest answer.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), required=True, help="Where experts are kept.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.FIELD=VALUE", help="A setting.")
def main(
    data: Path,
    tasks: str,
    foreign: str,
    rows: int,
    test_rows: int,
    max_tokens: int,
    folder: Path,
    out: Path | None,
    settings: list[str],
) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    config = load_config(None, [f"store.url={folder / 'experts'}", f"fit.tracking_dir={folder / 'runs'}", *settings])
    report: dict[str, dict[str, float]] = {}
    with TerminalListener() as listener:
        cluster.connect()
        store = ExpertStore.open(config.store.url)
        for name in tasks.split(","):
            if name not in [ref.name for ref in store.head().experts]:
                made = learn(Source(str(data / f"{name}.train.jsonl"), max_rows=rows), config, listener=listener)
                report[name] = {"threshold": made.manifest.threshold, "fit_tokens_per_s": made.fit.tokens_per_s}
                report[name] |= {f"{step}_s": seconds for step, seconds in made.seconds.items()}
        listener.step("Starting the endpoint")
        url = endpoint.start(config)
        scorer = RougeScorer(["rougeL"], use_stemmer=False)
        for name in [*tasks.split(","), *filter(None, foreign.split(","))]:
            listener.step(f"Asking {test_rows} rows of {name}")
            test = read_task(data / f"{name}.test.jsonl", name=name, split=SplitOptions(max_rows=test_rows)).train
            prompts = [row.prompt[-1][1] for row in test]
            began = time.perf_counter()
            told = partial(listener.progress, name)
            answers = client.ask_all(url, prompts, max_tokens=max_tokens, on_done=told)
            seconds = time.perf_counter() - began
            owner = name if name in tasks.split(",") else GENERALIST
            scores = [
                scorer.score(row.response, text)["rougeL"].fmeasure
                for row, (text, _) in zip(test, answers, strict=True)
            ]
            exact = [text.strip() == row.response.strip() for row, (text, _) in zip(test, answers, strict=True)]
            report[name] = report.get(name, {}) | {
                "routed_right": sum(who == owner for _, who in answers) / len(answers),
                "rouge_l": sum(scores) / len(scores),
                "exact_match": sum(exact) / len(exact),
                "seconds": seconds,
            }
        endpoint.stop()
    head = ["task", "routed right", "ROUGE-L", "exact match", "seconds"]
    keys = ["routed_right", "rouge_l", "exact_match", "seconds"]
    print(table(head, [[name, *(f"{row[key]:.3f}" for key in keys)] for name, row in report.items()]))
    if out:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
