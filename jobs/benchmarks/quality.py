"""Does it forget? Methods of continual learning on the same tasks, rows and base model.

Runs every method of `see_ray.evaluate.baselines.methods` on tasks that arrive in order. Parts that are finished
are kept: the same command continues where it was stopped. Prints the report, and writes report.json, report.md and
plots.

    python jobs/benchmarks/quality.py --setting quick                     the demo's tasks: under 20 minutes on 2 cores
    python jobs/benchmarks/quality.py --setting long --data SUPERNI       ten SuperNI tasks, one seed: hours
    python jobs/benchmarks/quality.py --setting gpu --data SUPERNI --order order1 --set base_model.name=owner/model

SUPERNI is a folder with NAME.train.jsonl and NAME.test.jsonl. What each setting scales down: SETTINGS.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from bench_options import Names, Numbers, data_option, settings_option

from see_ray import cluster
from see_ray.cli.progress_bar import TerminalListener
from see_ray.cli.run import run
from see_ray.evaluate.baselines.compare import compare
from see_ray.evaluate.baselines.methods import METHODS
from see_ray.evaluate.baselines.plan import DEMO_TASKS, ORDERS, Plan
from see_ray.evaluate.report import write_report
from see_ray.evaluate.results import summary

TEN_TASKS = ORDERS["order10"].split()

SETTINGS: dict[str, dict[str, Any]] = {
    "quick": {
        "tasks": ["sa", "trans", "pe"],
        "rows": 32,
        "eval_rows": 12,
        "test_rows": 12,
        "max_tokens": 44,
        "seeds": [0],
        "settings": [
            "fit.train_batch_size=4",
            "fit.num_train_epochs=2",
            "reconstruct.general_negatives=16",
            "reconstruct.mixed_negatives=8",
        ],
    },
    "long": {
        "tasks": TEN_TASKS,
        "rows": 64,
        "eval_rows": 24,
        "test_rows": 24,
        "max_tokens": 64,
        "seeds": [0],
        "settings": [
            "fit.train_batch_size=8",
            "fit.num_train_epochs=2",
            "reconstruct.general_negatives=32",
            "reconstruct.mixed_negatives=16",
        ],
    },
    "gpu": {
        "tasks": TEN_TASKS,
        "rows": 600,
        "eval_rows": 100,
        "test_rows": 500,
        "max_tokens": 128,
        "seeds": [0, 1, 2],
        "settings": ["reconstruct.general_negatives=512"],
    },
}
"""What each setting runs. Of SuperNI's 2000 training and 500 test rows a task, `quick` and `long` take few, and their
answers are limited to fewer tokens than the longest reference; `gpu` takes as many rows as the smallest task has."""


@click.command()
@click.option("--setting", type=click.Choice(list(SETTINGS)), default="quick", show_default=True, help="How much.")
@data_option(required=False)
@click.option("--order", type=click.Choice(list(ORDERS)), help="A named order of SuperNI tasks.")
@click.option("--tasks", type=Names(), help="Names in order of arrival, separated by commas; wins over --order.")
@click.option("--foreign", type=Names(), default="ood_trec", show_default=True, help="Tasks that nobody learns.")
@click.option("--methods", type=Names(), default=",".join(METHODS), help="Which methods. [default: all]")
@click.option("--seeds", type=Numbers(), help="Separated by commas.")
@click.option("--rows", type=int, help="Training rows of each task.")
@click.option("--test-rows", type=int, help="Test rows of each task.")
@click.option("--metric", help="A kind of score for all tasks. [default: rouge_l with --data, else by references]")
@click.option("--dir", "folder", type=click.Path(path_type=Path), default="bench-quality", show_default=True)
@click.option("--shared", type=click.Path(path_type=Path), help="Where fits and answers lie. [default: --dir]")
@click.option("--stop-after", type=float, metavar="SECONDS", help="Start no part later; continue with the next run.")
@settings_option
def main(
    methods: list[str],
    seeds: list[int] | None,
    folder: Path,
    shared: Path | None,
    stop_after: float | None,
    **options: Any,
) -> None:
    """Compare SEE with other methods of continual learning."""
    plan = plan_from(**options)
    seeds = seeds or SETTINGS[options["setting"]]["seeds"]
    with TerminalListener() as listener:
        cluster.connect()
        results = compare(plan, methods, seeds, folder, listener, shared=shared, stop_after_s=stop_after)
    if results is None:
        return
    about = {
        "setting": options["setting"],
        "tasks": list(plan.tasks),
        "nobody's": [*plan.foreign, "general questions"],
        "base model": plan.config(0).base_model.name,
        "seeds": seeds,
        "training rows a task": plan.rows,
        "held-out rows a task": plan.eval_rows,
        "test rows a task": plan.test_rows,
        "longest answer": plan.max_tokens,
        "settings": list(plan.settings),
    }
    click.echo(write_report(summary(results), about, folder))


def plan_from(
    setting: str,
    data: Path | None,
    order: str | None,
    tasks: list[str] | None,
    foreign: list[str],
    rows: int | None,
    test_rows: int | None,
    metric: str | None,
    settings: tuple[str, ...],
) -> Plan:
    """What to run: the setting, with what the command line changes."""
    size = SETTINGS[setting]
    ordered = ORDERS[order].split() if order else None
    return Plan(
        data=str(data.absolute()) if data else None,
        tasks=tuple(tasks or ordered or (size["tasks"] if data else DEMO_TASKS)),
        foreign=tuple(foreign) if data else (),
        rows=rows or size["rows"],
        eval_rows=size["eval_rows"],
        test_rows=test_rows or size["test_rows"],
        max_tokens=size["max_tokens"],
        metric=metric or ("rouge_l" if data else "auto"),
        settings=(*size["settings"], *settings),
    )


if __name__ == "__main__":
    run(main)
