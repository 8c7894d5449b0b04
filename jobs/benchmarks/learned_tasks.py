"""Tasks in a folder, learned in order into a store: what `refusal.py` and `routed.py` have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from see_ray.config import Config
from see_ray.data.rows import Row
from see_ray.data.task import SplitOptions, read_task
from see_ray.pipeline import Learned, Source, learn
from see_ray.progress import Listener
from see_ray.store.expert_store import ExpertStore


def learn_missing(
    data: Path, names: Sequence[str], rows: int, config: Config, listener: Listener
) -> dict[str, Learned]:
    """Learn `NAME.train.jsonl` of each task that has no live expert; returns what was learned now.

    Args:
        data: folder of the tasks.
        names: tasks in order of arrival.
        rows: training rows of each.
        config: all settings.
        listener: receives progress.
    """
    store = ExpertStore.open(config.store.url)
    learned = {}
    for name in names:
        if name not in [ref.name for ref in store.head().experts]:
            source = Source(str(data / f"{name}.train.jsonl"), max_rows=rows)
            learned[name] = learn(source, config, listener=listener)
    return learned


def test_rows(data: Path, name: str, rows: int) -> Sequence[Row]:
    """The first rows of `NAME.test.jsonl`."""
    return read_task(data / f"{name}.test.jsonl", name=name, split=SplitOptions(max_rows=rows)).train
