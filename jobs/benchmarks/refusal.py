"""Learn tasks in order, then let their experts decide on rows of tasks that nobody learned.

Reads JSONL tasks `NAME.train.jsonl` and `NAME.test.jsonl` from a folder, such as SuperNI's. Every task of the
folder that is not learned is foreign, and so are general questions. No endpoint and no answers: decisions only,
so a setting of `reconstruct` or `calibrate` can be judged quickly. Prints two tables, and with --out writes all
decisions as JSON. Experts that the store holds already are not learned again.

    python jobs/benchmarks/refusal.py --data DATA --tasks sa,trans,pe --dir WORK --set reconstruct.mixed_negatives=0
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path

import click

from see_ray import cluster
from see_ray.cli.render import TerminalListener, table
from see_ray.config import load_config
from see_ray.data.demo_tasks import general_questions
from see_ray.data.task import SplitOptions, read_task
from see_ray.models.activation import encode_prompt
from see_ray.models.base_model import find, load_tokenizer
from see_ray.pipeline import Source, learn
from see_ray.routing.chain import GENERALIST
from see_ray.store.expert_store import ExpertStore


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), required=True, help="Folder of the tasks.")
@click.option("--tasks", required=True, help="Names in order of arrival, separated by commas.")
@click.option("--foreign", help="Tasks that no expert learns, with commas. [default: all others of the folder]")
@click.option("--rows", default=200, show_default=True, help="Training rows of each task.")
@click.option("--test-rows", default=40, show_default=True, help="Test rows of each task.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), required=True, help="Where experts are kept.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.FIELD=VALUE", help="A setting.")
def main(
    data: Path,
    tasks: str,
    foreign: str | None,
    rows: int,
    test_rows: int,
    folder: Path,
    out: Path | None,
    settings: list[str],
) -> None:
    from see_ray.engine.engine import EmbeddedEngine
    from see_ray.engine.interface import Expert
    from see_ray.serving.replica import activation_of_manifest

    config = load_config(None, [f"store.url={folder / 'experts'}", f"fit.tracking_dir={folder / 'runs'}", *settings])
    learned = tasks.split(",")
    others = foreign.split(",") if foreign else sorted({p.name.split(".")[0] for p in data.glob("*.test.jsonl")})
    others = [name for name in others if name not in learned]
    store = ExpertStore.open(config.store.url)
    seconds: dict[str, float] = {}
    decisions: dict[str, dict[str, list[float]]] = {}
    with TerminalListener() as listener:
        cluster.connect()
        for name in learned:
            if name not in [ref.name for ref in store.head().experts]:
                made = learn(Source(str(data / f"{name}.train.jsonl"), max_rows=rows), config, listener=listener)
                seconds[name] = made.fit.seconds
        cluster.disconnect()
        base = find(config.base_model)
        tokenizer = load_tokenizer(base)
        manifests = {ref.name: store.manifest(ref) for ref in store.head().experts}
        engine = EmbeddedEngine(base, config.base_model, prefix_tokens=1 << 20)
        for name, manifest in manifests.items():
            engine.load(Expert(name, store.fetch(manifest.ref, folder / "cache"), activation_of_manifest(manifest)))
        split = SplitOptions(max_rows=test_rows)
        queries = {
            name: [row.messages for row in read_task(data / f"{name}.test.jsonl", name=name, split=split).train]
            for name in (*learned, *others)
        }
        queries["general"] = [[{"role": "user", "content": text}] for text in general_questions()[:test_rows]]
        for name, chats in queries.items():
            listener.step(f"Deciding on {len(chats)} queries of {name}")
            found = [asyncio.run(engine.decide(encode_prompt(tokenizer, chat), learned)) for chat in chats]
            decisions[name] = {expert: [p[i] for p in found] for i, expert in enumerate(learned)}
    thresholds = {name: manifest.threshold for name, manifest in manifests.items()}
    print(_experts(learned, decisions, thresholds, seconds))
    print(_routes(learned, decisions, thresholds))
    if out:
        report = {"decisions": decisions, "thresholds": thresholds, "fit_seconds": seconds}
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _experts(
    learned: list[str],
    decisions: dict[str, dict[str, list[float]]],
    thresholds: dict[str, float],
    seconds: dict[str, float],
) -> str:
    """Each expert by itself: its own rows against those of every task that is not its own."""
    rows = []
    for expert in learned:
        own, threshold = decisions[expert][expert], thresholds[expert]
        foreign = [p for name, found in decisions.items() if name not in learned for p in found[expert]]
        rows.append([
            expert, f"{threshold:.3f}", _share(p >= threshold for p in own), _share(p >= 0.5 for p in own),
            _share(p < threshold for p in foreign), _share(p < 0.5 for p in foreign), f"{auroc(own, foreign):.4f}",
            f"{seconds.get(expert, 0):.0f}",
        ])  # fmt: skip
    head = ["expert", "threshold", "own accepted", "(at 0.5)", "nobody's refused", "(at 0.5)", "AUROC", "fit s"]
    return table(head, rows) + "\n"


def _routes(learned: list[str], decisions: dict[str, dict[str, list[float]]], thresholds: dict[str, float]) -> str:
    """Who would answer the rows of each task: newest expert first, else the generalist."""
    rows = []
    for name, found in decisions.items():
        count = len(found[learned[0]])
        answered = []
        for number in range(count):
            taken = [e for e in reversed(learned) if found[e][number] >= thresholds[e]]
            answered.append(taken[0] if taken else GENERALIST)
        owner = name if name in learned else GENERALIST
        wrong = sorted({who for who in answered if who != owner}, key=answered.count, reverse=True)
        astray = ", ".join(f"{who} {answered.count(who)}" for who in wrong)
        rows.append([name, owner, _share(who == owner for who in answered), astray])
    return table(["queries of", "belong to", "routed right", "astray to"], rows)


def _share(hits: Iterable[bool]) -> str:
    found = list(hits)
    return f"{100 * sum(found) / len(found):.1f} %"


def auroc(own: list[float], foreign: list[float]) -> float:
    """Chance that an own query is decided higher than a foreign one; ties count half."""
    return sum((p > q) + 0.5 * (p == q) for p in own for q in foreign) / (len(own) * len(foreign))


if __name__ == "__main__":
    main()
