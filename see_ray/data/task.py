"""An arriving task: a named dataset with a train and an eval split, read, checked and split.

    read_task("sa.jsonl")                   a JSON Lines (.jsonl, .json) or .parquet file
    read_task("tasks/sa")                   a folder: train.jsonl, eval.jsonl; or sa.train.jsonl, sa.test.jsonl
    read_task("owner/name:config")          a Hugging Face dataset id, where no such path exists

In a folder, and on the hub, the eval split is the first there is of eval, validation, dev, test. A row is
an object with the first it has of these sets of keys (null counts as missing, other keys are ignored):

    messages                      OpenAI chat; the last message is the assistant's: the response
    prompt, response              prompt: a string, or messages that end with the user's
    instruction, output (input)   the user's turn is instruction, blank line, input if there is any

What becomes of a row:

    kept            as written, without Unicode normalisation; CRLF and a byte order mark are fine;
                    text parts of a message are joined by newlines, as the endpoint
                    joins them; a prompt may have several responses
    passed over     blank lines
    dropped         exact duplicates (same prompt, same response) within a split; counted in the notes
    bad             not UTF-8; invalid JSON; not an object; missing keys; wrong types; other roles than
                    system (first only), user, assistant; turns in the wrong order; blank prompt, turn
                    or response (a system prompt may be blank); NUL characters; lone surrogates; more
                    tokens than allowed; a train row whose prompt is in the given eval split

Bad rows are collected over the whole task and refused together, or skipped and counted in the notes.
This module knows nothing of tokenizers: the caller brings ``count_tokens``.
"""

from __future__ import annotations

import codecs
import json
import os
import random
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from see_ray.errors import BadRowsError, ConfigError, SeeError, TaskError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": …}
Prompt = tuple[tuple[str, str], ...]  # (role, content) of every turn before the response, the last the user's

EVAL_SPLITS = ("eval", "validation", "dev", "test")
RESERVED_NAMES = ("generalist", "see")
BAD_ROWS_SHOWN = 20
HUB_TIMEOUT_S = 10

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_SHAPES = (("messages",), ("prompt", "response"), ("instruction", "output"))
_COLUMNS = ("messages", "prompt", "response", "instruction", "input", "output")
_KEYS = "`messages`, or `prompt` and `response`, or `instruction` and `output`"
_SUFFIXES = (".jsonl", ".json", ".parquet")
_SOURCES = "a .jsonl, .json or .parquet file, a folder with train.jsonl, or a Hugging Face dataset id"
_SPLIT_FILE = re.compile(rf"(?:(?P<task>.+)[._-])?(?P<split>train|{'|'.join(EVAL_SPLITS)})")
_UNUSABLE = re.compile(r"[\0\ud800-\udfff]")
_HUB_ID = re.compile(r"(?P<id>(?:\w[\w.-]*/)?\w[\w.-]*)(?::(?P<config>[^\s/]+))?", re.ASCII)


@dataclass(frozen=True)
class Row:
    """One sample. Two rows are equal if their prompt and response are."""

    prompt: Prompt
    response: str
    where: str = field(compare=False)
    """For messages to people: ``sa.jsonl:17``, ``sa.parquet: row 17``, ``owner/name train: row 17``, from 1."""

    @property
    def messages(self) -> list[Message]:
        """The prompt as OpenAI chat messages."""
        return [{"role": role, "content": content} for role, content in self.prompt]


@dataclass(frozen=True)
class Task:
    """A task with at least one row in each split, and no prompt in both."""

    name: str
    train: tuple[Row, ...]
    eval: tuple[Row, ...]
    notes: tuple[str, ...]
    """What was done to get here: ``dropped 3 exact duplicates``."""


def read_task(
    source: str | Path,
    *,
    name: str | None = None,
    eval_share: float = 0.1,
    seed: int = 0,
    max_rows: int | None = None,
    max_eval_rows: int | None = None,
    skip_bad_rows: bool = False,
    max_length: int | None = None,
    count_tokens: Callable[[Row], int] | None = None,
) -> Task:
    """Read, check, deduplicate and split a task.

    Args:
        source: a file, a folder or a Hugging Face dataset id.
        name: the task's name; None: that of the file, folder or dataset.
        eval_share: share of the rows (at least one) held out as the eval split where the source
            brings none; all rows with the same prompt on the same side.
        seed: decides which rows are held out, and which a cap on the eval split keeps.
        max_rows: train on the first so many good rows. Where the source brings no eval split, it is
            drawn from the rows after these if they suffice, else from within these.
        max_eval_rows: upper bound of the eval split; a larger one is sampled.
        skip_bad_rows: go on without the bad rows rather than refuse the task.
        max_length: rows with more tokens than this are bad; needs ``count_tokens``.
        count_tokens: prompt and response of a row in tokens. A SeeError that it raises (say, the
            chat template takes no system prompt) makes the row a bad one.

    Raises:
        BadRowsError: some rows are bad; the message shows the first 20, ``rows`` holds all.
        TaskError: no such source, not readable, too few good rows, no usable name.
        ConfigError: a number is out of bounds, or ``max_length`` comes without ``count_tokens``.
    """
    if not 0 < eval_share < 1:
        raise ConfigError(f"eval_share is {eval_share}; expected a share between 0 and 1")
    if any(cap is not None and cap < 1 for cap in (max_rows, max_eval_rows, max_length)):
        raise ConfigError(f"expected at least 1 each, found {max_rows=}, {max_eval_rows=}, {max_length=}")
    if max_length and not count_tokens:
        raise ConfigError("max_length needs count_tokens, which says how many tokens a row has")
    limit = (max_length, count_tokens) if max_length and count_tokens else None

    found = _find(str(source))
    name = _task_name(name, found.name)
    held, bad_held = _read_rows(found.eval, limit, {}) if found.eval else ([], [])
    train, bad = _read_rows(found.train, limit, {row.prompt: row.where for row in held})
    bad += bad_held
    notes = list(found.notes)
    if bad:
        if not skip_bad_rows:
            raise BadRowsError(_describe(bad, len(train) + len(held) + len(bad)), tuple(bad))
        notes.append(f"skipped {len(bad)} bad row{'s' * (len(bad) > 1)}")
    good = len(train) + len(held)
    train, held = list(dict.fromkeys(train)), list(dict.fromkeys(held))
    if dropped := good - len(train) - len(held):
        notes.append(f"dropped {dropped} exact duplicate{'s' * (dropped > 1)}")
    if len(train) < (1 if found.eval else 2) or (found.eval and not held):
        counts = f"{len(train)} to train on, {len(held)} to evaluate on, {len(bad)} bad"
        raise TaskError(f"{source} has too few usable rows: {counts}; expected at least 2, one of them to evaluate on")

    rng = random.Random(seed)
    cap = len(train) if max_rows is None else max_rows
    kept, spare = train[:cap], train[cap:]
    if spare:
        notes.append(f"kept the first {len(kept)} of {len(train)} train rows")
    if found.eval:
        if max_eval_rows and len(held) > max_eval_rows:  # not the first ones: files are often sorted by class
            notes.append(f"drew {max_eval_rows} of {len(held)} eval rows")
            held = [held[i] for i in sorted(rng.sample(range(len(held)), max_eval_rows))]
    else:
        wanted = min(max(1, round(eval_share * len(kept))), max_eval_rows or len(kept))
        prompts = {row.prompt for row in kept}
        spare = [row for row in spare if row.prompt not in prompts]
        if len(spare) >= wanted:
            held = [spare[i] for i in sorted(rng.sample(range(len(spare)), wanted))]
            notes.append(f"held out {wanted} of the {len(spare)} after these as the eval split")
        else:
            kept, held = _hold_out(kept, wanted, rng, str(source))
            rows = len(kept) + len(held)
            notes.append(f"held out {len(held)} of {rows} rows as the eval split ({100 * len(held) / rows:.0f} %)")
    return Task(name, tuple(kept), tuple(held), tuple(notes))


# A record is (where, value): the value is what JSON or parquet held, or a _BadRow if that could not
# be decoded, so that one pass meets every bad row. A split is (its name in messages, its records).
_Record = tuple[str, Any]
_Split = tuple[str, Iterable[_Record]]


class _BadRow(TaskError):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class _Found:
    name: str
    train: _Split
    eval: _Split | None = None
    notes: tuple[str, ...] = ()


def _find(source: str) -> _Found:
    path = Path(os.path.expanduser(source))
    try:
        if source.strip() and path.is_dir():
            return _find_in_folder(path)
        if path.is_file():
            match = _SPLIT_FILE.fullmatch(path.stem.lower())
            name = (match["task"] or path.resolve().parent.name) if match else path.stem
            return _Found(name, _open(path))
        match = None if path.exists() else _HUB_ID.fullmatch(source)
    except OSError as error:
        raise TaskError(f"cannot read {source}: {error.strerror}") from error
    if match and Path(match["id"]).suffix.lower() not in _SUFFIXES:
        return _find_on_hub(source, match["id"], match["config"])
    raise TaskError(f"{source!r} is no file, no folder and no dataset id; expected {_SOURCES}")


def _find_in_folder(folder: Path) -> _Found:
    files = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    tasks: dict[str, dict[str, Path]] = {}
    for file in files:
        match = _SPLIT_FILE.fullmatch(file.stem.lower())
        if match and file.suffix.lower() in _SUFFIXES:
            other = tasks.setdefault(match["task"] or "", {}).setdefault(match["split"], file)
            if other != file:
                raise TaskError(f"{folder} has two {match['split']} files, {other.name} and {file.name}; remove one")
    if len(tasks) > 1:
        names = ", ".join(task or "one without a name" for task in sorted(tasks))
        advice = f"name a single file, such as {other} (its eval split is then held out of it)"
        raise TaskError(f"{folder} holds files of several tasks: {names}; {advice}, or give one task its own folder")
    task, splits = next(iter(tasks.items()), ("", {}))
    if "train" not in splits:
        names = ", ".join(file.name for file in files[:10]) or "no files"
        raise TaskError(f"{folder} has no train split: found {names}; expected {_SOURCES}, and eval.jsonl if there is")
    chosen, notes = _choose_eval({split: file.name for split, file in splits.items()})
    eval_split = _open(splits[chosen]) if chosen else None
    return _Found(task or folder.resolve().name, _open(splits["train"]), eval_split, notes)


def _choose_eval(splits: dict[str, str]) -> tuple[str | None, tuple[str, ...]]:
    """The eval split among these (split to label), and a note if others like it are left alone."""
    there = [split for split in EVAL_SPLITS if split in splits]
    others = ", ".join(splits[split] for split in there[1:])
    notes = (f"took {splits[there[0]]} as the eval split and left {others} alone",) if others else ()
    return (there[0] if there else None), notes


def _open(path: Path) -> _Split:
    if path.suffix.lower() not in _SUFFIXES:
        raise TaskError(f"{path} is not a task file; expected {_SOURCES}")
    if path.stat().st_size == 0:
        raise TaskError(f"{path} is empty; expected rows with {_KEYS}")
    return str(path), _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_json_lines(path)


def _read_json_lines(path: Path) -> Iterator[_Record]:
    offset = 0
    try:
        # Binary, so that only \n ends a line (JSON strings may hold U+2028) and bad bytes cost one row.
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                offset += len(line)
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                    if line.startswith(b"[") and path.suffix.lower() == ".json":
                        command = f"jq -c '.[]' {path} > {path.stem}.jsonl"
                        raise TaskError(f"{path} is one JSON array; expected one object a line: {command}")
                if not line.strip():
                    continue
                try:
                    value = json.loads(line.decode())
                except UnicodeDecodeError as error:
                    value = _BadRow(f"not UTF-8 at byte {offset - len(line) + error.start} of the file (from 0)")
                except (ValueError, RecursionError) as error:  # also numbers too long, brackets too deep for Python
                    value = _BadRow(f"invalid JSON: {error}")
                yield f"{path.name}:{number}", value
    except OSError as error:
        raise TaskError(f"cannot read {path}: {error.strerror}") from error


def _read_parquet(path: Path) -> Iterator[_Record]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _known_columns(file.schema_arrow.names, str(path))
            batches = file.iter_batches(batch_size=1024, columns=columns)
            for number, row in enumerate((batch.slice(i, 1) for batch in batches for i in range(len(batch))), 1):
                try:
                    value = row.to_pylist()[0]
                except UnicodeDecodeError as error:
                    value = _BadRow(f"a text that is not UTF-8 at its byte {error.start} (from 0)")
                yield f"{path.name}: row {number}", value
    except (OSError, pyarrow.ArrowException) as error:
        raise TaskError(f"cannot read {path} as parquet: {_one_line(error)}") from error


def _known_columns(columns: list[str], label: str) -> list[str]:
    """Those that rows are read from: other columns may hold anything, images too."""
    if not any(set(shape) <= set(columns) for shape in _SHAPES):
        raise TaskError(f"{label} has the columns {', '.join(columns) or '(none)'}; expected {_KEYS}")
    return [column for column in columns if column in _COLUMNS]


def _find_on_hub(source: str, dataset_id: str, config: str | None) -> _Found:
    import datasets
    from datasets import packaged_modules
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    neither = f"there is no file or folder {source!r}, and the Hugging Face hub "
    unknown = f"{neither}knows no such dataset (a private one needs $HF_TOKEN)"
    if hasattr(packaged_modules, dataset_id):  # load_dataset("json") would read whatever lies in the working folder
        raise TaskError(unknown)
    offline, unreachable = datasets.config.HF_HUB_OFFLINE, ""
    try:  # load_dataset retries a dead connection for half a minute: ask once, and if in vain let it try its cache only
        HfApi().dataset_info(dataset_id, timeout=HUB_TIMEOUT_S)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise TaskError(unknown) from error
    except Exception as error:  # which network errors there are depends on the HTTP client of the day
        unreachable = _one_line(error)
    try:
        datasets.config.HF_HUB_OFFLINE = offline or bool(unreachable)
        splits = datasets.load_dataset(dataset_id, config)
    except Exception as error:  # ValueError, OSError and a dozen classes of its own
        failed = f"{neither}could not be reached ({unreachable})"
        raise TaskError(failed if unreachable else f"cannot load the dataset {source}: {_one_line(error)}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    if "train" not in splits:
        raise TaskError(f"the Hugging Face dataset {source} has no train split: found {', '.join(map(str, splits))}")

    def open_split(split: str) -> _Split:
        label = f"{source} {split}"
        rows = splits[split].select_columns(_known_columns(splits[split].column_names, label))
        return label, ((f"{label}: row {number}", row) for number, row in enumerate(rows, 1))

    chosen, notes = _choose_eval({str(split): str(split) for split in splits})
    if unreachable:
        notes = (f"read from the cache, as the Hugging Face hub could not be reached ({unreachable})", *notes)
    name = dataset_id.rpartition("/")[2] + (f"-{config}" if config else "")
    return _Found(name, open_split("train"), open_split(chosen) if chosen else None, notes)


def _read_rows(
    split: _Split, limit: tuple[int, Callable[[Row], int]] | None, eval_at: dict[Prompt, str]
) -> tuple[list[Row], list[tuple[str, str]]]:
    """The good rows, and (where, reason) of the bad ones."""
    label, records = split
    rows, bad = [], []
    for where, value in records:
        try:
            row = _row(where, value)
            if limit and (tokens := limit[1](row)) > limit[0]:
                raise _BadRow(f"{tokens} tokens long; at most {limit[0]} fit")
            if row.prompt in eval_at:
                raise _BadRow(f"its prompt is also in the eval split ({eval_at[row.prompt]})")
            rows.append(row)
        except SeeError as error:
            bad.append((where, str(error)))
    if not rows and not bad:
        raise TaskError(f"{label} holds no rows; expected rows with {_KEYS}")
    return rows, bad


def _row(where: str, value: Any) -> Row:
    if isinstance(value, _BadRow):
        raise value
    cells = {key: cell for key, cell in _object(value, "the row").items() if cell is not None}
    if "messages" in cells:
        turns = _turns(cells["messages"], "messages")
        role, response = turns.pop()
        if role != "assistant":
            raise _BadRow(f"the last message is the {role}'s; expected the assistant's")
    elif "prompt" in cells and "response" in cells:
        prompt = cells["prompt"]
        turns = _turns(prompt, "prompt") if isinstance(prompt, list) else [("user", _text(prompt, "prompt"))]
        response = _text(cells["response"], "response")
    elif "instruction" in cells and "output" in cells:
        content = _text(cells["instruction"], "instruction")
        given = _text(cells.get("input", ""), "input", may_be_blank=True)
        turns = [("user", f"{content}\n\n{given}" if given.strip() else content)]
        response = _text(cells["output"], "output")
    else:
        keys = ", ".join(f"{key!r:.40}" + (" (null)" if cell is None else "") for key, cell in list(value.items())[:8])
        raise _BadRow(f"missing keys: found {keys or 'none'}; expected {_KEYS}")
    if not turns or turns[-1][0] != "user":
        raise _BadRow(f"{turns[-1][0] if turns else 'no'} turn before the response; expected the user's")
    return Row(tuple(turns), response, where)


def _turns(messages: Any, what: str) -> list[tuple[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise _BadRow(f"{what} is {type(messages).__name__} {messages!r:.40}; expected a list of messages")
    turns = []
    for i, message in enumerate(messages):
        at = f"{what}[{i}]"
        role, content = _object(message, at).get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise _BadRow(f"{at}.role is {role!r:.40}; expected system, user or assistant")
        if role == "system" and i > 0:
            raise _BadRow(f"{at} is a system message; only the first may be one")
        if isinstance(content, list):
            if any(_object(part, f"{at}.content").get("type") != "text" for part in content):
                raise _BadRow(f"{at}.content has parts that are not of the type text")
            content = "\n".join(_text(part.get("text"), f"{at}.content", may_be_blank=True) for part in content)
        turns.append((role, _text(content, f"{at}.content", may_be_blank=role == "system")))
    return turns


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _BadRow(f"{what} is of type {type(value).__name__}; expected an object")
    return value


def _text(value: Any, what: str, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise _BadRow(f"{what} is of type {type(value).__name__}; expected text")
    if wrong := _UNUSABLE.search(value):
        found = "a NUL character" if wrong[0] == "\0" else "a lone surrogate"
        raise _BadRow(f"{what} has {found} at position {wrong.start()} (from 0)")
    if not may_be_blank and not value.strip():
        raise _BadRow(f"{what} is empty")
    return value


def _hold_out(rows: list[Row], wanted: int, rng: random.Random, source: str) -> tuple[list[Row], list[Row]]:
    """Train and eval rows. More than ``wanted`` are held out only if every prompt has more rows than that."""
    by_prompt: dict[Prompt, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, []).append(row)
    if len(by_prompt) < 2:
        raise TaskError(f"all usable rows of {source} have the same prompt, so none can be held out; add an eval split")
    groups = list(by_prompt.values())
    rng.shuffle(groups)
    held: set[Row] = set()
    for group in groups:
        if len(held) + len(group) <= min(wanted, len(rows) - 1):
            held.update(group)
    held = held or set(sorted(groups, key=len)[0])
    return [row for row in rows if row not in held], [row for row in rows if row in held]


def _task_name(given: str | None, found: str) -> str:
    name = re.sub(r"[^a-z0-9_-]", "-", found.lower()) if given is None else given
    if not _NAME.fullmatch(name) or name in RESERVED_NAMES:
        rule = f"expected up to 63 of a-z, 0-9, _ and -, the first no sign, and not {' or '.join(RESERVED_NAMES)}"
        raise TaskError(f"{name!r} cannot be the task's name; {rule}; choose one with --name")
    return name


def _describe(bad: list[tuple[str, str]], total: int) -> str:
    shown = [f"{where}: {reason}" for where, reason in bad[:BAD_ROWS_SHOWN]]
    more = [f"… and {len(bad) - BAD_ROWS_SHOWN} more"] if len(bad) > BAD_ROWS_SHOWN else []
    advice = "Correct them, or go on without them: --skip-bad-rows"
    return "\n".join([f"{len(bad)} of {total} rows cannot be used:", *shown, *more, advice])


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 300)
