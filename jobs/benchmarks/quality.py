"""Does it really not forget? Methods of continual learning on the same tasks, rows and base model.

Runs every method of see_ray.evaluate.baselines.methods on tasks that arrive in order, in parts that are kept: the same
command goes on where it was stopped. Prints the report, and writes report.json, report.md and pictures.

    python jobs/benchmarks/quality.py --setting quick                     the demo's tasks: under 20 minutes on 2 cores
    python jobs/benchmarks/quality.py --setting long --data SUPERNI       ten SuperNI tasks, one seed: hours
    python jobs/benchmarks/quality.py --setting gpu --data SUPERNI --order order1 --set base_model.name=owner/model

SUPERNI is a folder with NAME.train.jsonl and NAME.test.jsonl. Settings and what they scale down: SETTINGS.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from see_ray import cluster
from see_ray.cli.progress_bar import TerminalListener
from see_ray.evaluate.baselines.compare import compare
from see_ray.evaluate.baselines.methods import METHODS
from see_ray.evaluate.baselines.plan import DEMO_TASKS, ORDERS, Plan
from see_ray.evaluate.report import write_report
from see_ray.evaluate.results import summary

SETTINGS: dict[str, dict[str, Any]] = {
    "quick": {
        "tasks": "sa,trans,pe", "rows": 32, "eval_rows": 12, "test_rows": 12, "max_tokens": 44, "seeds": "0",
        "config": ["fit.train_batch_size=4", "fit.num_train_epochs=2", "reconstruct.general_negatives=16",
                   "reconstruct.mixed_negatives=8"],
    },
    "long": {
        "tasks": ORDERS["order10"].replace(" ", ","), "rows": 64, "eval_rows": 24, "test_rows": 24,
        "max_tokens": 64, "seeds": "0",
        "config": ["fit.train_batch_size=8", "fit.num_train_epochs=2", "reconstruct.general_negatives=32",
                   "reconstruct.mixed_negatives=16"],
    },
    "gpu": {
        "tasks": ORDERS["order10"].replace(" ", ","), "rows": 600, "eval_rows": 100, "test_rows": 500,
        "max_tokens": 128, "seeds": "0,1,2", "config": ["reconstruct.general_negatives=512"],
    },
}  # fmt: skip
"""What each setting runs. Of SuperNI's 2000 training and 500 test rows a task, `quick` and `long` take few, and
answers are cut shorter than the longest reference; `gpu` takes what the smallest task (`sum`) has rows for."""


@click.command()
@click.option("--setting", type=click.Choice(list(SETTINGS)), default="quick", show_default=True, help="How much.")
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="Folder of tasks. [default: the demo's]")
@click.option("--order", type=click.Choice(list(ORDERS)), help="A named order of SuperNI tasks.")
@click.option("--tasks", help="Names in order of arrival, separated by commas; wins over --order.")
@click.option("--foreign", default="ood_trec", show_default=True, help="Tasks of --data that nobody learns.")
@click.option("--methods", default=",".join(METHODS), help="Which methods. [default: all]")
@click.option("--seeds", help="Separated by commas.")
@click.option("--rows", type=int, help="Training rows of each task.")
@click.option("--test-rows", type=int, help="Test rows of each task.")
@click.option("--metric", help="A kind of score for all tasks. [default: rouge_l with --data, else by references]")
@click.option("--dir", "folder", type=click.Path(path_type=Path), default="bench-quality", show_default=True)
@click.option("--shared", type=click.Path(path_type=Path), help="Where fits and answers lie. [default: --dir]")
@click.option("--stop-after", type=float, metavar="SECONDS", help="Start no part later; go on with the next run.")
@click.option("--set", "changes", multiple=True, metavar="SECTION.FIELD=VALUE", help="A setting, for all methods.")
def main(
    setting: str, data: Path | None, order: str | None, tasks: str | None, foreign: str, methods: str,
    seeds: str | None, rows: int | None, test_rows: int | None, metric: str | None, folder: Path,
    shared: Path | None, stop_after: float | None, changes: tuple[str, ...],
) -> None:  # fmt: skip
    size = SETTINGS[setting]
    names = tuple((tasks or "").split(",")) if tasks else tuple(ORDERS[order].split()) if order else None
    plan = Plan(
        data=str(data.absolute()) if data else None,
        tasks=names or (tuple(size["tasks"].split(",")) if data else DEMO_TASKS),
        foreign=tuple(filter(None, foreign.split(","))) if data else (),
        rows=rows or size["rows"],
        eval_rows=size["eval_rows"],
        test_rows=test_rows or size["test_rows"],
        max_tokens=size["max_tokens"],
        metric=metric or ("rouge_l" if data else "auto"),
        settings=(*size["config"], *changes),
    )
    chosen = [int(seed) for seed in (seeds or size["seeds"]).split(",")]
    with TerminalListener() as listener:
        cluster.connect()
        results = compare(plan, methods.split(","), chosen, folder, listener, shared=shared, stop_after_s=stop_after)
    if results is None:
        return
    about = {
        "setting": setting, "tasks": list(plan.tasks), "nobody's": [*plan.foreign, "general questions"],
        "base model": plan.config(0).base_model.name, "seeds": chosen, "training rows a task": plan.rows,
        "held-out rows a task": plan.eval_rows, "test rows a task": plan.test_rows,
        "longest answer": plan.max_tokens, "settings": list(plan.settings),
    }  # fmt: skip
    print(write_report(summary(results), about, folder))


if __name__ == "__main__":
    main()
