"""An arriving task: bad rows, duplicates, the eval split and the name."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from see_ray.data.task import SplitOptions, read_task
from see_ray.errors import BadRowsError, ConfigError, TaskError

SUPERNI = Path(os.environ.get("SEE_SUPERNI", Path(__file__).parents[3] / "../shared/superni"))


def rows(n: Any, start: Any = 0) -> Any:
    return [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(start, start + n)]


def write(path: Any, values: Any) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def prompts(split: Any) -> Any:
    return [row.prompt[-1][1] for row in split]


# Bad rows.


def test_one_run_reports_every_bad_row_and_shows_twenty(tmp_path: Path) -> None:
    bad = [{"prompt": f"q{i}", "response": ""} for i in range(25)]
    with pytest.raises(BadRowsError) as error:
        read_task(write(tmp_path / "x.jsonl", [*rows(5), *bad]))
    lines = str(error.value).splitlines()
    assert lines[0] == "25 of 30 rows cannot be used:"
    assert lines[1:21] == [f"x.jsonl:{i}: response is empty" for i in range(6, 26)]
    assert lines[21] == "… and 5 more"
    assert "--skip-bad-rows" in lines[22]
    assert len(error.value.rows) == 25


def test_bad_rows_of_both_splits_are_reported_together(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [*rows(3), {"prompt": "a"}])
    write(tmp_path / "eval.jsonl", [*rows(3, start=10), {"prompt": "b"}])
    with pytest.raises(BadRowsError) as error:
        read_task(tmp_path, name="x")
    assert [where for where, _ in error.value.rows] == ["train.jsonl:4", "eval.jsonl:4"]


def test_bad_rows_error_survives_pickling(tmp_path: Path) -> None:
    with pytest.raises(BadRowsError) as error:
        read_task(write(tmp_path / "x.jsonl", [*rows(2), {}]))
    copy = pickle.loads(pickle.dumps(error.value))
    assert (str(copy), copy.rows) == (str(error.value), error.value.rows)


def test_skipped_bad_rows_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [*rows(4), {}, {"prompt": "", "response": "a"}])
    task = read_task(path, skip_bad_rows=True)
    assert len(task.train) + len(task.eval) == 4
    assert task.notes[0] == "skipped 2 bad rows"


def test_skipping_takes_overlapping_rows_out_of_train(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(5))
    write(tmp_path / "eval.jsonl", rows(5, start=3))
    task = read_task(tmp_path, name="x", skip_bad_rows=True)
    assert prompts(task.train) == ["question 0", "question 1", "question 2"]
    assert len(task.eval) == 5


# Duplicates and splits.


def test_exact_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "x.jsonl", [*rows(4), *rows(3)]))
    assert sorted(prompts(task.train + task.eval)) == [f"question {i}" for i in range(4)]
    assert task.notes[0] == "dropped 3 exact duplicates"


def test_one_prompt_may_have_several_responses(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"prompt": "a", "response": f"r{i}"} for i in range(3)])
    write(tmp_path / "eval.jsonl", rows(1))
    assert len(read_task(tmp_path, name="x").train) == 3


def test_given_eval_split_is_kept_whole(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(5))
    write(tmp_path / "eval.jsonl", rows(5, start=5))
    task = read_task(tmp_path, name="x")
    assert (prompts(task.train), prompts(task.eval)) == (
        [f"question {i}" for i in range(5)],
        [f"question {i}" for i in range(5, 10)],
    )
    assert task.notes == ()


def test_held_out_share(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "x.jsonl", rows(200)))
    assert (len(task.train), len(task.eval)) == (180, 20)
    assert task.notes == ("held out 20 of 200 rows as the eval split (10 %)",)
    assert set(prompts(task.train)).isdisjoint(prompts(task.eval))


@pytest.mark.parametrize(("share", "split"), [(0.01, (4, 1)), (0.99, (1, 4))])
def test_each_side_gets_at_least_one_row(tmp_path: Path, share: float, split: tuple[int, int]) -> None:
    task = read_task(write(tmp_path / "x.jsonl", rows(5)), split=SplitOptions(eval_share=share))
    assert (len(task.train), len(task.eval)) == split


def test_holding_out_is_seeded(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", rows(100))
    assert read_task(path, split=SplitOptions(seed=3)) == read_task(path, split=SplitOptions(seed=3))
    assert read_task(path, split=SplitOptions(seed=3)).eval != read_task(path, split=SplitOptions(seed=4)).eval


def test_rows_of_one_prompt_stay_on_one_side(tmp_path: Path) -> None:
    values = [{"prompt": f"q{i % 10}", "response": f"r{i}"} for i in range(100)]
    for seed in range(5):
        task = read_task(write(tmp_path / "x.jsonl", values), split=SplitOptions(eval_share=0.25, seed=seed))
        assert len(task.eval) == 20  # two whole prompts of ten rows; a third would pass 25
        assert set(prompts(task.train)).isdisjoint(prompts(task.eval))


def test_smallest_prompt_is_held_out_where_all_are_large(tmp_path: Path) -> None:
    values = [{"prompt": "big", "response": f"r{i}"} for i in range(9)]
    values += [{"prompt": "small", "response": f"r{i}"} for i in range(3)]
    assert prompts(read_task(write(tmp_path / "x.jsonl", values)).eval) == ["small"] * 3


def test_single_prompt_cannot_be_split(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"prompt": "a", "response": f"r{i}"} for i in range(5)])
    with pytest.raises(TaskError, match="same prompt"):
        read_task(path)


def test_max_rows_keeps_the_first_and_holds_out_from_the_rest(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "x.jsonl", rows(60)), split=SplitOptions(max_rows=40))
    assert prompts(task.train) == [f"question {i}" for i in range(40)]
    assert len(task.eval) == 4
    assert set(prompts(task.eval)) <= {f"question {i}" for i in range(40, 60)}


def test_rest_with_prompts_of_train_is_not_held_out(tmp_path: Path) -> None:
    values = [{"prompt": f"q{i % 10}", "response": f"r{i}"} for i in range(20)]
    task = read_task(write(tmp_path / "x.jsonl", values), split=SplitOptions(max_rows=10))
    assert (len(task.train), len(task.eval)) == (9, 1)
    assert set(prompts(task.train)).isdisjoint(prompts(task.eval))


def test_max_rows_holds_out_from_within_where_the_rest_is_short(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "x.jsonl", rows(42)), split=SplitOptions(max_rows=40))
    assert (len(task.train), len(task.eval)) == (36, 4)
    assert set(prompts(task.train + task.eval)) == {f"question {i}" for i in range(40)}


def test_max_rows_leaves_a_given_eval_split_alone(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(20))
    write(tmp_path / "eval.jsonl", rows(7, start=20))
    task = read_task(tmp_path, name="x", split=SplitOptions(max_rows=5))
    assert (prompts(task.train), len(task.eval)) == ([f"question {i}" for i in range(5)], 7)


def test_max_eval_rows_samples_a_given_eval_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(5))
    write(tmp_path / "eval.jsonl", rows(1000, start=1000))
    task = read_task(tmp_path, name="x", split=SplitOptions(max_eval_rows=10))
    numbers = [int(prompt.split()[1]) for prompt in prompts(task.eval)]
    assert len(numbers) == 10
    assert numbers == sorted(numbers)
    assert numbers[-1] > 1200  # not just the first ten


def test_max_eval_rows_leaves_more_to_train_on(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "x.jsonl", rows(100)), split=SplitOptions(max_eval_rows=3))
    assert (len(task.train), len(task.eval)) == (97, 3)


@pytest.mark.parametrize("values", [rows(1), [*rows(1), *rows(1)]])
def test_fewer_than_two_rows_are_no_task(tmp_path: Path, values: Any) -> None:
    with pytest.raises(TaskError, match="too few usable rows: 1 to train on"):
        read_task(write(tmp_path / "x.jsonl", values))


def test_skipping_down_to_one_row_is_no_task(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="too few usable rows: 1 to train on, 0 to evaluate on, 3 bad"):
        read_task(write(tmp_path / "x.jsonl", [*rows(1), {}, {}, {}]), skip_bad_rows=True)


@pytest.mark.parametrize("options", [{"eval_share": 0}, {"eval_share": 10}, {"max_rows": 0}, {"max_eval_rows": -1}])
def test_options_out_of_bounds_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        SplitOptions(**options)


# Names.


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("sa.train.jsonl", "sa"),
        ("sa.jsonl", "sa"),
        ("reviews/train.jsonl", "reviews"),
        ("My Task (v2).jsonl", "my-task--v2-"),
        ("a_b.TRAIN.jsonl", "a_b"),
    ],
)
def test_name_derives_from_the_file(tmp_path: Path, path: str, name: str) -> None:
    assert read_task(write(tmp_path / path, rows(3))).name == name


def test_name_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "Reviews" / "train.jsonl", rows(3))
    monkeypatch.chdir(tmp_path / "Reviews")
    assert read_task(".").name == "reviews"


@pytest.mark.parametrize("name", ["", "SA", "-sa", "s a", "sa\n", "x" * 64, "see", "generalist"])
def test_given_name_must_fit_the_rule(tmp_path: Path, name: str) -> None:
    with pytest.raises(TaskError, match="cannot be the task's name; expected 1 to 63"):
        read_task(write(tmp_path / "x.jsonl", rows(3)), name=name)


@pytest.mark.parametrize("stem", ["see", "Generalist", "日本"])
def test_derived_name_must_fit_the_rule_too(tmp_path: Path, stem: str) -> None:
    with pytest.raises(TaskError, match="choose one with --name"):
        read_task(write(tmp_path / f"{stem}.jsonl", rows(3)))


# Real tasks, where they are at hand.


@pytest.mark.skipif(not (SUPERNI / "sa.train.jsonl").is_file(), reason="no SuperNI rows: set SEE_SUPERNI")
def test_superni_rows_are_all_good(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"sa.{split}.jsonl").symlink_to((SUPERNI / f"sa.{split}.jsonl").resolve())
    task = read_task(tmp_path)
    assert (task.name, len(task.train), len(task.eval)) == ("sa", 2000, 500)
    assert {row.response for row in task.train} == {"positive", "negative"}
    assert task.train[0].prompt[0][1].startswith("In this task, You are given a review of Amazon's food products.")
