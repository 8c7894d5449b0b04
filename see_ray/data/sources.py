"""Where a task's rows come from: a file, a folder or a Hugging Face dataset.

    open_source("sa.jsonl")              a JSON Lines (.jsonl, .json) or .parquet file
    open_source("tasks/sa")              a folder: train.jsonl, eval.jsonl; or sa.train.jsonl, sa.test.jsonl
    open_source("owner/name:config")     a Hugging Face dataset id, where no such path exists

In a folder and on the hub, the eval split is the first that exists of eval, validation, dev and test. Blank lines are
skipped; CRLF line ends and a byte order mark are accepted. This module finds and decodes records; what a record must
hold is checked in `see_ray.data.rows`.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from see_ray.data.rows import EXPECTED_KEYS, ROW_COLUMNS, ROW_SHAPES, BadRow, RawSplit, Record
from see_ray.errors import TaskError

EVAL_SPLITS = ("eval", "validation", "dev", "test")

HUB_TIMEOUT_S = 10
"""Seconds to wait for the hub's answer on whether a dataset exists; after that only the local cache is read."""

_SUFFIXES = (".jsonl", ".json", ".parquet")
_SOURCES = "a .jsonl, .json or .parquet file, a folder with train.jsonl, or a Hugging Face dataset id"
_SPLIT_FILE = re.compile(rf"(?:(?P<task>.+)[._-])?(?P<split>train|{'|'.join(EVAL_SPLITS)})")
_HUB_ID = re.compile(r"(?P<id>(?:\w[\w.-]*/)?\w[\w.-]*)(?::(?P<config>[^\s/]+))?", re.ASCII)


@dataclass(frozen=True)
class TaskSource:
    """An opened source.

    Attributes:
        name: of the file, folder or dataset; the task is called so if the user gives no name.
        train: the train split.
        eval: the eval split; None if the source has none.
        notes: what the user should know about how it was read.
    """

    name: str
    train: RawSplit
    eval: RawSplit | None = None
    notes: tuple[str, ...] = ()


def open_source(source: str) -> TaskSource:
    """Find a task's splits; their rows are read when they are iterated over.

    Raises:
        TaskError: there is no such source, or it cannot be read.
    """
    path = Path(os.path.expanduser(source))
    try:
        if source.strip() and path.is_dir():
            return _open_folder(path)
        if path.is_file():
            match = _SPLIT_FILE.fullmatch(path.stem.lower())
            name = (match["task"] or path.resolve().parent.name) if match else path.stem
            return TaskSource(name, _open_file(path))
        match = None if path.exists() else _HUB_ID.fullmatch(source)
    except OSError as error:
        raise TaskError(f"cannot read {source}: {error.strerror}") from error
    if match and Path(match["id"]).suffix.lower() not in _SUFFIXES:
        return _open_hub_dataset(source, match["id"], match["config"])
    raise TaskError(f"{source!r} is no file, no folder and no dataset id; expected {_SOURCES}")


# --- files ---------------------------------------------------------------------------------


def _open_folder(folder: Path) -> TaskSource:
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    tasks: dict[str, dict[str, Path]] = {}
    for file in files:
        match = _SPLIT_FILE.fullmatch(file.stem.lower())
        if match and file.suffix.lower() in _SUFFIXES:
            first = tasks.setdefault(match["task"] or "", {}).setdefault(match["split"], file)
            if first != file:
                raise TaskError(f"{folder} has two {match['split']} files, {first.name} and {file.name}; remove one")
    if len(tasks) > 1:
        names = ", ".join(task or "one without a name" for task in sorted(tasks))
        advice = f"name a single file, such as {first} (its eval split is then held out of it)"
        raise TaskError(f"{folder} holds files of several tasks: {names}; {advice}, or give one task its own folder")
    task, splits = next(iter(tasks.items()), ("", {}))
    if "train" not in splits:
        names = ", ".join(file.name for file in files[:10]) or "no files"
        raise TaskError(
            f"{folder} has no train split: found {names}; expected {_SOURCES}; eval.jsonl beside it is optional"
        )
    chosen, notes = _choose_eval({split: file.name for split, file in splits.items()})
    eval_split = _open_file(splits[chosen]) if chosen else None
    return TaskSource(task or folder.resolve().name, _open_file(splits["train"]), eval_split, notes)


def _choose_eval(labels: dict[str, str]) -> tuple[str | None, tuple[str, ...]]:
    """The eval split among the splits in `labels` (split to label), and a note if there are several."""
    candidates = [split for split in EVAL_SPLITS if split in labels]
    others = ", ".join(labels[split] for split in candidates[1:])
    notes = (f"took {labels[candidates[0]]} as the eval split; did not use {others}",) if others else ()
    return (candidates[0] if candidates else None), notes


def _open_file(path: Path) -> RawSplit:
    if path.suffix.lower() not in _SUFFIXES:
        raise TaskError(f"{path} is not a task file; expected {_SOURCES}")
    if path.stat().st_size == 0:
        raise TaskError(f"{path} is empty; expected rows with {EXPECTED_KEYS}")
    records = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_json_lines(path)
    return RawSplit(str(path), records)


def _read_json_lines(path: Path) -> Iterator[Record]:
    offset = 0
    try:
        # Binary, so that only \n ends a line (JSON strings may hold U+2028) and undecodable bytes cost one row.
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                offset += len(line)
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                    if line.startswith(b"[") and path.suffix.lower() == ".json":
                        command = f"jq -c '.[]' {path} > {path.stem}.jsonl"
                        raise TaskError(f"{path} is one JSON array; expected one object per line: {command}")
                if not line.strip():
                    continue
                yield Record(f"{path.name}:{number}", _decode(line, offset - len(line)))
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror}") from error


def _decode(line: bytes, offset: int) -> object:
    """The JSON value of a line that starts at `offset` of its file; a BadRow if it has none."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8 at byte {offset + error.start} of the file (from 0)")
    except (ValueError, RecursionError) as error:  # also numbers too long and brackets too deep for Python
        return BadRow(f"invalid JSON: {error}")


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow.parquet

    value: object
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _row_columns(file.schema_arrow.names, str(path))
            batches = file.iter_batches(batch_size=1024, columns=columns)
            for number, row in enumerate((batch.slice(i, 1) for batch in batches for i in range(len(batch))), 1):
                try:
                    value = row.to_pylist()[0]
                except UnicodeDecodeError as error:
                    value = BadRow(f"a text that is not UTF-8 at its byte {error.start} (from 0)")
                yield Record(f"{path.name}: row {number}", value)
    except (OSError, pyarrow.ArrowException) as error:
        raise TaskError(f"cannot read {path} as parquet: {_one_line(error)}") from error


def _row_columns(columns: list[str], label: str) -> list[str]:
    """The columns that rows are made of. The others are not read: they may hold anything, images for example."""
    if not any(set(shape) <= set(columns) for shape in ROW_SHAPES):
        raise TaskError(f"{label} has the columns {', '.join(columns) or '(none)'}; expected {EXPECTED_KEYS}")
    return [column for column in columns if column in ROW_COLUMNS]


# --- the Hugging Face hub ------------------------------------------------------------------


def _open_hub_dataset(source: str, dataset_id: str, config: str | None) -> TaskSource:
    splits, unreachable = _load_hub_dataset(source, dataset_id, config)
    if "train" not in splits:
        raise TaskError(f"the Hugging Face dataset {source} has no train split: found {', '.join(map(str, splits))}")

    def open_split(split: str) -> RawSplit:
        label = f"{source} {split}"
        rows = splits[split].select_columns(_row_columns(splits[split].column_names, label))
        return RawSplit(label, (Record(f"{label}: row {number}", row) for number, row in enumerate(rows, 1)))

    chosen, notes = _choose_eval({str(split): str(split) for split in splits})
    if unreachable:
        notes = (f"read from the cache, as the Hugging Face hub could not be reached ({unreachable})", *notes)
    name = dataset_id.rpartition("/")[2] + (f"-{config}" if config else "")
    return TaskSource(name, open_split("train"), open_split(chosen) if chosen else None, notes)


def _load_hub_dataset(source: str, dataset_id: str, config: str | None) -> tuple[Any, str]:
    """The dataset by split, and why the hub could not be reached (empty if it was)."""
    import datasets
    from datasets import packaged_modules
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    neither = f"there is no file or folder {source!r}, and the Hugging Face hub "
    unknown = f"{neither}knows no such dataset (a private one needs $HF_TOKEN)"
    if hasattr(packaged_modules, dataset_id):  # load_dataset("json") would read the files of the working directory
        raise TaskError(unknown)
    # load_dataset retries a dead connection for half a minute. So ask the hub once, and if it does not answer let
    # load_dataset read its cache only.
    offline, unreachable = datasets.config.HF_HUB_OFFLINE, ""
    try:
        HfApi().dataset_info(dataset_id, timeout=HUB_TIMEOUT_S)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise TaskError(unknown) from error
    except Exception as error:  # the types of network errors depend on the version's HTTP client
        unreachable = _one_line(error)
    try:
        datasets.config.HF_HUB_OFFLINE = offline or bool(unreachable)
        return datasets.load_dataset(dataset_id, config), unreachable
    except Exception as error:  # ValueError, OSError and a dozen classes of datasets
        reason = f"{neither}could not be reached ({unreachable})"
        raise TaskError(reason if unreachable else f"cannot load the dataset {source}: {_one_line(error)}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 300)
