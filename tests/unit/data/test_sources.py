"""Files, folders and datasets of the hub as sources of a task."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from see_ray.data.task import read_task
from see_ray.errors import BadRowsError, TaskError


def rows(n: Any, start: Any = 0) -> Any:
    return [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(start, start + n)]


def write(path: Any, values: Any) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def test_not_utf8_names_the_byte_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a", "response": "b"}\n{"prompt": "\xe9", "response": "b"}\n')
    with pytest.raises(BadRowsError) as error:
        read_task(path)
    position = path.read_bytes().index(b"\xe9")
    assert error.value.rows == (("latin.jsonl:2", f"not UTF-8 at byte {position} of the file (from 0)"),)


def test_raw_line_separator_does_not_end_a_row(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a\u2028b", "response": "c"}\n{"prompt": "d", "response": "e"}\n', encoding="utf-8")
    assert sum(map(len, (read_task(path).train, read_task(path).eval))) == 2


def test_byte_order_mark_crlf_and_blank_lines_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in rows(3)) + b"\r\n \r\n")
    task = read_task(path)
    assert sorted(row.where for row in task.train + task.eval) == ["x.jsonl:1", "x.jsonl:3", "x.jsonl:5"]


# Sources.


def test_parquet_reads_like_json_lines(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    values = [{"messages": messages, "prompt": None, "response": None, "score": 1.0}]
    values += [{"messages": None, **row, "score": None} for row in rows(3000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "x.parquet")
    task = read_task(tmp_path / "x.parquet")
    by_where = {row.where: row for row in task.train + task.eval}
    assert len(by_where) == 3001
    assert by_where["x.parquet: row 1"].messages == messages[:1]
    assert by_where["x.parquet: row 3001"].response == "answer 2999"


def test_parquet_row_that_is_not_utf8_is_bad(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    prompt = pyarrow.array([b"ok", b"a\xff", b"fine"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": prompt, "response": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(BadRowsError) as error:
        read_task(tmp_path / "x.parquet")
    assert error.value.rows == (("x.parquet: row 2", "a text that is not UTF-8 at its byte 1 (from 0)"),)


def test_other_parquet_columns_are_not_read(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    broken = pyarrow.array([b"\xff"] * 3).view(pyarrow.string())
    columns = {"prompt": ["a", "b", "c"], "response": ["d", "e", "f"], "note": broken}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    assert len(read_task(tmp_path / "x.parquet").train) == 2


def test_parquet_without_known_columns_lists_its_own(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(TaskError, match="has the columns text, label; expected `messages`"):
        read_task(tmp_path / "x.parquet")


def test_file_that_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("hello")
    with pytest.raises(TaskError, match=r"cannot read .*x\.parquet as parquet"):
        read_task(tmp_path / "x.parquet")


def test_json_array_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps(rows(5)))
    with pytest.raises(TaskError, match=r"one JSON array.*jq -c"):
        read_task(tmp_path / "x.json")


@pytest.mark.parametrize("split", ["eval", "validation", "dev", "test"])
def test_folder_with_a_single_task(tmp_path: Path, split: str) -> None:
    write(tmp_path / "sa.train.jsonl", rows(4))
    write(tmp_path / f"sa.{split}.jsonl", rows(3, start=4))
    write(tmp_path / "sa.extra.jsonl", rows(9, start=100))
    task = read_task(tmp_path)
    assert (task.name, len(task.train), len(task.eval)) == ("sa", 4, 3)


def test_folder_without_an_eval_split_holds_rows_out(tmp_path: Path) -> None:
    write(tmp_path / "x" / "train.jsonl", rows(10))
    assert len(read_task(tmp_path / "x").eval) == 1


def test_hidden_files_of_a_folder_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(10))
    (tmp_path / "._train.jsonl").write_bytes(b"\0")  # macOS leaves these on shared disks
    assert len(read_task(tmp_path, name="x").train) == 9


def test_folder_with_two_eval_splits_says_which_it_took(tmp_path: Path) -> None:
    for number, split in enumerate(["train", "test", "validation"]):
        write(tmp_path / f"{split}.jsonl", rows(3 + number, start=10 * number))
    task = read_task(tmp_path, name="x")
    assert len(task.eval) == 5
    assert task.notes == ("took validation.jsonl as the eval split; did not use test.jsonl",)


def test_folder_of_several_tasks_lists_them(tmp_path: Path) -> None:
    for name in ("qa", "sa"):
        write(tmp_path / f"{name}.train.jsonl", rows(3))
        write(tmp_path / f"{name}.test.jsonl", rows(3, start=3))
    with pytest.raises(TaskError, match=r"several tasks: qa, sa; name a single file, such as .*\.train\.jsonl"):
        read_task(tmp_path)


def test_folder_with_two_train_files(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(3))
    write(tmp_path / "train.json", rows(3))
    with pytest.raises(TaskError, match=r"two train files, train\.json and train\.jsonl"):
        read_task(tmp_path)


def test_folder_without_a_train_split_lists_what_is_there(tmp_path: Path) -> None:
    write(tmp_path / "contest.jsonl", rows(3))  # ends with the letters of test, but is no test split
    with pytest.raises(TaskError, match=r"no train split: found contest\.jsonl; expected"):
        read_task(tmp_path)


def test_single_file_does_not_use_its_sibling(tmp_path: Path) -> None:
    path = write(tmp_path / "sa.train.jsonl", rows(10))
    write(tmp_path / "sa.test.jsonl", rows(10, start=10))
    task = read_task(path)
    assert {row.where.partition(":")[0] for row in task.train + task.eval} == {"sa.train.jsonl"}


@pytest.mark.parametrize("content", ["", "\n \r\n"])
def test_file_without_rows(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(TaskError, match=r"x\.jsonl (is empty|holds no rows); expected rows with `messages`"):
        read_task(tmp_path / "x.jsonl")


def test_empty_eval_file(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(3))
    write(tmp_path / "eval.jsonl", [])
    with pytest.raises(TaskError, match=r"eval\.jsonl is empty"):
        read_task(tmp_path, name="x")


def test_other_kinds_of_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,response\n")
    with pytest.raises(TaskError, match=r"x\.csv is not a task file; expected a \.jsonl"):
        read_task(tmp_path / "x.csv")


def test_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(TaskError, match="is no file"):
        read_task(tmp_path / "x.jsonl")


@pytest.mark.parametrize("source", ["", " ", "missing.jsonl", "./missing", "../missing/x", "a\0b"])
def test_missing_path_that_cannot_be_a_dataset_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match="is no file, no folder and no dataset id; expected"):
        read_task(source)


def test_path_that_the_system_refuses(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"cannot read .*File name too long"):
        read_task(tmp_path / ("x" * 300 + ".jsonl"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", rows(3)).chmod(0)
    with pytest.raises(TaskError, match=r"cannot read .*Permission denied"):
        read_task(tmp_path / "x.jsonl")


# The hub, without a network: its address is a closed port, and its cache is made here.


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def cached_dataset(no_hub: Any, tmp_path: Path) -> None:
    """`team/chat` with the config `short`, as load_dataset leaves it in its cache."""
    import datasets

    values = {"train": rows(6), "test": rows(4, start=6)}
    values = {split: [{**row, "image": "x"} for row in given] for split, given in values.items()}
    folder = tmp_path / "cache/team___chat/short/0.0.0/abc"
    folder.mkdir(parents=True)
    splits = datasets.SplitDict()
    for split, given in values.items():
        table = datasets.Dataset.from_list(given)
        path = str(folder / f"chat-{split}.arrow")
        with datasets.arrow_writer.ArrowWriter(path=path, features=table.features) as out:
            out.write_table(table.data.table)
            out.finalize()
        splits.add(datasets.SplitInfo(split, num_examples=len(given), dataset_name="chat"))
    info = datasets.DatasetInfo(features=table.features, splits=splits, config_name="short", version="0.0.0")
    info.write_to_directory(str(folder))


@pytest.mark.parametrize("source", ["owner/missing", "missing", "owner/missing:config"])
def test_without_a_network_both_readings_are_named_at_once(no_hub: Any, source: str) -> None:
    start = time.monotonic()
    with pytest.raises(TaskError) as error:
        read_task(source)
    assert str(error.value).startswith(f"there is no file or folder '{source}', and the Hugging Face hub could not be")
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 10


def test_ids_that_the_hub_cannot_have_are_unknown(no_hub: Any) -> None:
    with pytest.raises(TaskError, match="no file or folder 'a--b/c', and the Hugging Face hub knows no such dataset"):
        read_task("a--b/c")


def test_loader_names_do_not_read_the_working_folder(no_hub: Any, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", rows(9))
    with pytest.raises(TaskError, match="knows no such dataset"):
        read_task("json")


def test_cached_dataset_is_read_without_a_network(cached_dataset: Any) -> None:
    task = read_task("team/chat:short")
    assert (task.name, len(task.train), len(task.eval)) == ("chat-short", 6, 4)
    assert task.train[0].where == "team/chat:short train: row 1"
    assert task.notes[0].startswith("read from the cache, as the Hugging Face hub could not be reached")


def test_hub_lookup_leaves_the_offline_setting_as_it_was(cached_dataset: Any) -> None:
    import datasets

    read_task("team/chat:short")
    assert datasets.config.HF_HUB_OFFLINE is False


def test_path_wins_over_a_dataset_of_that_id(cached_dataset: Any, tmp_path: Path) -> None:
    write(tmp_path / "team/chat/train.jsonl", rows(20))
    assert len(read_task("team/chat").train) == 18
