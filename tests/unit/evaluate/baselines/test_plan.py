"""What a comparison runs on: rows that a seed draws, and a folder that keeps to one plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from see_ray.errors import ConfigError, TaskError
from see_ray.evaluate.baselines.plan import UNSEEN, Plan, read_data, save_plan
from see_ray.evaluate.queries import GENERAL_QUESTIONS, read_rows

PLAN = Plan(None, ("dates", "tickets"), (), 6, 3, 4, 8, "auto", ("fit.r=4",))


def test_a_seed_draws_the_training_rows_and_leaves_the_test_rows() -> None:
    one, again, other = read_data(PLAN, 0), read_data(PLAN, 0), read_data(PLAN, 1)
    assert one == again
    assert one.tasks != other.tasks
    assert one.tests == other.tests


def test_train_eval_and_test_rows_are_apart() -> None:
    data = read_data(PLAN, 0)
    for task in data.tasks:
        prompts = [row.prompt for row in (*task.train, *task.eval, *data.tests[task.name])]
        assert (len(task.train), len(task.eval), len(data.tests[task.name])) == (6, 3, 4)
        assert len(set(prompts)) == len(prompts)


def test_the_demo_has_foreign_queries() -> None:
    assert set(read_data(PLAN, 0).foreign) == {UNSEEN, GENERAL_QUESTIONS}


def test_tasks_of_a_folder_are_read_in_order(tmp_path: Path) -> None:
    for name in ("sa", "trec"):
        for split, count in (("train", 12), ("test", 7)):
            lines = [json.dumps({"instruction": name, "input": f"{split} {i}", "output": "x"}) for i in range(count)]
            (tmp_path / f"{name}.{split}.jsonl").write_text("\n".join(lines))
    data = read_data(replace(PLAN, data=str(tmp_path), tasks=("sa",), foreign=("trec",), metric="rouge_l"), 0)
    assert [row.prompt[0][1] for row in data.tests["sa"]] == [f"sa\n\ntest {i}" for i in range(4)]
    assert [chat[0]["content"] for chat in data.foreign["trec"]] == [f"trec\n\ntest {i}" for i in range(4)]
    assert data.kinds == {"sa": "rouge_l"}
    assert [row.where for row in read_rows(tmp_path / "sa.test.jsonl")] == [f"sa.test.jsonl:{i}" for i in range(1, 8)]


def test_the_settings_reach_the_configuration() -> None:
    config = PLAN.config(seed=7)
    assert (config.fit.r, config.fit.seed, config.reconstruct.max_eval_rows) == (4, 7, 3)


def test_a_task_that_is_too_small_or_unknown_says_so(tmp_path: Path) -> None:
    (tmp_path / "sa.train.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": "c", "response": "d"}\n')
    with pytest.raises(TaskError, match="sa has 2 different training rows; 9 are wanted"):
        read_data(replace(PLAN, data=str(tmp_path), tasks=("sa",)), 0)
    with pytest.raises(TaskError, match="the demo has no task sa; it has contacts, dates, tickets"):
        read_data(replace(PLAN, tasks=("sa",)), 0)
    with pytest.raises(ConfigError, match="the metric is 'bleu'"):
        read_data(replace(PLAN, metric="bleu"), 0)


def test_a_folder_keeps_to_one_plan(tmp_path: Path) -> None:
    save_plan(PLAN, tmp_path)
    save_plan(PLAN, tmp_path)
    with pytest.raises(ConfigError, match=r"rows 6 \(now 7\)"):
        save_plan(replace(PLAN, rows=7), tmp_path)
