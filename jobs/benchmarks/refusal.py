"""Learn tasks in order, then let their experts decide on rows of tasks that no expert has learned.

Reads `NAME.train.jsonl` and `NAME.test.jsonl` from a folder, such as SuperNI's. Every task of the folder that is not
learned is foreign, and so are general questions. There is no endpoint and there are no answers, only decisions, so that
a setting of `reconstruct` or `calibrate` can be judged quickly. Prints two tables; --out writes all decisions as JSON.
Experts that the store holds already are not learned again.

    python jobs/benchmarks/refusal.py --data DATA --tasks sa,trans,pe --dir WORK --set reconstruct.mixed_negatives=0
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from bench_options import Names, data_option, out_option, settings_option, write_json
from learned_tasks import learn_missing, test_rows

from see_ray import cluster
from see_ray.cli.progress_bar import TerminalListener
from see_ray.cli.render import table
from see_ray.cli.run import run
from see_ray.config import Config, load_config
from see_ray.data.demo_tasks import general_questions
from see_ray.models.activation import encode_prompt
from see_ray.models.base_model import find, load_tokenizer
from see_ray.routing.chain import GENERALIST
from see_ray.store.expert_store import ExpertStore

Decisions = dict[str, dict[str, list[float]]]
"""Task -> expert -> P(accept) of each query."""


@click.command()
@data_option()
@click.option("--tasks", type=Names(), required=True, help="Names in order of arrival, separated by commas.")
@click.option("--foreign", type=Names(), help="Tasks that no expert learns. [default: all others of the folder]")
@click.option("--rows", default=200, show_default=True, help="Training rows of each task.")
@click.option("--test-rows", "test_count", default=40, show_default=True, help="Test rows of each task.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), required=True, help="Where experts are kept.")
@out_option
@settings_option
def main(
    data: Path,
    tasks: list[str],
    foreign: list[str] | None,
    rows: int,
    test_count: int,
    folder: Path,
    out: Path | None,
    settings: tuple[str, ...],
) -> None:
    """Measure the experts' decisions on queries of their own and of foreign tasks."""
    config = load_config(None, [f"store.url={folder / 'experts'}", f"fit.tracking_dir={folder / 'runs'}", *settings])
    others = foreign or sorted({path.name.split(".")[0] for path in data.glob("*.test.jsonl")})
    others = [name for name in others if name not in tasks]
    with TerminalListener() as listener:
        cluster.connect()
        learned = learn_missing(data, tasks, rows, config, listener)
        cluster.disconnect()
        chats = {name: [row.messages for row in test_rows(data, name, test_count)] for name in (*tasks, *others)}
        chats["general"] = [[{"role": "user", "content": text}] for text in general_questions()[:test_count]]
        decisions, thresholds = decide(chats, tasks, config, folder / "cache", listener)
    seconds = {name: result.fit.seconds for name, result in learned.items()}
    click.echo(experts_table(tasks, decisions, thresholds, seconds))
    click.echo("\n" + routes_table(tasks, decisions, thresholds))
    write_json({"decisions": decisions, "thresholds": thresholds, "fit_seconds": seconds}, out)


def decide(
    chats: dict[str, list[Any]], experts: list[str], config: Config, cache: Path, listener: TerminalListener
) -> tuple[Decisions, dict[str, float]]:
    """Decisions of the live experts on the queries of each task, and the experts' thresholds."""
    from see_ray.engine.engine import EmbeddedEngine
    from see_ray.engine.interface import Expert
    from see_ray.serving.replica import activation_of_manifest

    base, store = find(config.base_model), ExpertStore.open(config.store.url)
    tokenizer = load_tokenizer(base)
    manifests = {ref.name: store.manifest(ref) for ref in store.head().experts}
    engine = EmbeddedEngine(base, config.base_model, prefix_tokens=1 << 20)
    for name, manifest in manifests.items():
        engine.load(Expert(name, store.fetch(manifest.ref, cache), activation_of_manifest(manifest)))
    decisions: Decisions = {}
    for name, of_task in chats.items():
        listener.step(f"Deciding on {len(of_task)} queries of {name}")
        rows = [asyncio.run(engine.decide(encode_prompt(tokenizer, chat), experts)) for chat in of_task]
        decisions[name] = {expert: [row[i] for row in rows] for i, expert in enumerate(experts)}
    return decisions, {name: manifest.threshold for name, manifest in manifests.items()}


def experts_table(
    learned: list[str], decisions: Decisions, thresholds: dict[str, float], seconds: dict[str, float]
) -> str:
    """Each expert by itself: its own rows against those of all tasks that nobody learned."""
    rows = []
    for expert in learned:
        own, threshold = decisions[expert][expert], thresholds[expert]
        foreign = [p for task, by_expert in decisions.items() if task not in learned for p in by_expert[expert]]
        shares = [
            percent(p >= threshold for p in own),
            percent(p >= 0.5 for p in own),
            percent(p < threshold for p in foreign),
            percent(p < 0.5 for p in foreign),
        ]
        rows.append(
            [expert, f"{threshold:.3f}", *shares, f"{auroc(own, foreign):.4f}", f"{seconds.get(expert, 0):.0f}"]
        )
    head = ["expert", "threshold", "own accepted", "(at 0.5)", "nobody's refused", "(at 0.5)", "AUROC", "fit s"]
    return table(head, rows)


def routes_table(learned: list[str], decisions: Decisions, thresholds: dict[str, float]) -> str:
    """Who would answer the rows of each task: the newest expert that accepts, else the generalist."""
    rows = []
    for task, by_expert in decisions.items():
        answered_by = []
        for query in range(len(by_expert[learned[0]])):
            accepted = [expert for expert in reversed(learned) if by_expert[expert][query] >= thresholds[expert]]
            answered_by.append(accepted[0] if accepted else GENERALIST)
        owner = task if task in learned else GENERALIST
        others = sorted({name for name in answered_by if name != owner}, key=answered_by.count, reverse=True)
        misrouted = ", ".join(f"{name} {answered_by.count(name)}" for name in others)
        rows.append([task, owner, percent(name == owner for name in answered_by), misrouted])
    return table(["queries of", "belong to", "routed right", "astray to"], rows)


def percent(hits: Iterable[bool]) -> str:
    values = list(hits)
    return f"{100 * sum(values) / len(values):.1f} %"


def auroc(own: list[float], foreign: list[float]) -> float:
    """Area under the ROC curve of own against foreign queries."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score([1] * len(own) + [0] * len(foreign), [*own, *foreign]))


if __name__ == "__main__":
    run(main)
