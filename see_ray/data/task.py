"""An arriving task: a named dataset with a train and an eval split.

    source ─► open_source (sources.py) ─► read_rows (rows.py) ─► drop duplicates ─► cap, hold out ─► Task

Where the source brings no eval split, one is held out of its rows; rows with the same prompt stay on the same side.
Exact duplicates (same prompt, same response) within a split are dropped; a prompt may have several responses. Bad rows
are collected over the whole task and refused together, or skipped; `Task.notes` counts what was dropped and skipped.

This module does not use a tokenizer: the caller passes a function that counts tokens.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pathlib import Path

from see_ray.data.rows import Prompt, Row, TokenLimit, read_rows
from see_ray.data.sources import TaskSource, open_source
from see_ray.errors import BadRowsError, ConfigError, TaskError

RESERVED_NAMES = ("generalist", "see")
"""Names that requests use for something else, so that no task may have them."""

BAD_ROWS_SHOWN = 20
"""Bad rows that an error message lists; the error itself holds all of them."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


@dataclass(frozen=True)
class Task:
    """A task with at least one row in each split, and no prompt in both."""

    name: str
    train: tuple[Row, ...]
    eval: tuple[Row, ...]
    notes: tuple[str, ...]
    """What was done to the rows: `dropped 3 exact duplicates`."""


@dataclass(frozen=True)
class SplitOptions:
    """How many rows to take, and how to hold out an eval split.

    Attributes:
        eval_share: share of the rows, at least one, that is held out where the source brings no eval split.
        seed: decides which rows are held out, and which of a larger eval split are kept.
        max_rows: train on the first so many good rows. Where the source brings no eval split, it is drawn from the
            rows after these if there are enough, else from these.
        max_eval_rows: upper bound of the eval split; a larger one is sampled.

    Raises:
        ConfigError: a value is out of bounds.
    """

    eval_share: float = 0.1
    seed: int = 0
    max_rows: int | None = None
    max_eval_rows: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.eval_share < 1:
            raise ConfigError(f"eval_share is {self.eval_share}; expected a share between 0 and 1")
        for name, cap in (("max_rows", self.max_rows), ("max_eval_rows", self.max_eval_rows)):
            if cap is not None and cap < 1:
                raise ConfigError(f"expected a {name} of at least 1, found {cap}")


def read_task(
    source: str | Path,
    *,
    name: str | None = None,
    split: SplitOptions | None = None,
    token_limit: TokenLimit | None = None,
    skip_bad_rows: bool = False,
) -> Task:
    """Read, check, deduplicate and split a task.

    Args:
        source: a file, a folder or a Hugging Face dataset id.
        name: the task's name; None: that of the file, folder or dataset.
        split: numbers of rows, and how to hold out an eval split; None: all defaults.
        token_limit: longer rows are bad.
        skip_bad_rows: continue without the bad rows instead of refusing the task.

    Raises:
        BadRowsError: some rows are bad; the message shows the first 20, `rows` holds all.
        TaskError: no such source, not readable, too few good rows, or no usable name.
    """
    options = split or SplitOptions()
    opened = open_source(str(source))
    name = _task_name(name, opened.name)
    train, held_out, bad = _read_splits(opened, token_limit)
    notes = list(opened.notes)
    if bad:
        if not skip_bad_rows:
            raise BadRowsError(_describe(bad, len(train) + len(held_out) + len(bad)), tuple(bad))
        notes.append(f"skipped {len(bad)} bad row{'s' * (len(bad) > 1)}")
    good = len(train) + len(held_out)
    train, held_out = list(dict.fromkeys(train)), list(dict.fromkeys(held_out))
    if dropped := good - len(train) - len(held_out):
        notes.append(f"dropped {dropped} exact duplicate{'s' * (dropped > 1)}")
    if len(train) < (1 if opened.eval else 2) or (opened.eval and not held_out):
        counts = f"{len(train)} to train on, {len(held_out)} to evaluate on, {len(bad)} bad"
        raise TaskError(f"{source} has too few usable rows: {counts}; expected at least 2, one of them to evaluate on")

    rng = random.Random(options.seed)
    kept = train[: options.max_rows]
    spare = train[len(kept) :]
    if spare:
        notes.append(f"kept the first {len(kept)} of {len(train)} train rows")
    if opened.eval:
        held_out = _sample_eval(held_out, options.max_eval_rows, rng, notes)
    else:
        kept, held_out = _hold_out(kept, spare, options, rng, notes, str(source))
    return Task(name, tuple(kept), tuple(held_out), tuple(notes))


def _read_splits(
    source: TaskSource, token_limit: TokenLimit | None
) -> tuple[list[Row], list[Row], list[tuple[str, str]]]:
    """Train rows, eval rows, and (where, reason) of the bad rows of both."""
    held_out, bad_held_out = read_rows(source.eval, token_limit) if source.eval else ([], [])
    train, bad = read_rows(source.train, token_limit, {row.prompt: row.where for row in held_out})
    return train, held_out, bad + bad_held_out


def _sample_eval(rows: list[Row], max_rows: int | None, rng: random.Random, notes: list[str]) -> list[Row]:
    """At most `max_rows` rows of a given eval split: a sample, since files are often sorted by class."""
    if max_rows is None or len(rows) <= max_rows:
        return rows
    notes.append(f"drew {max_rows} of {len(rows)} eval rows")
    return _sample(rows, max_rows, rng)


def _hold_out(
    kept: list[Row], spare: list[Row], options: SplitOptions, rng: random.Random, notes: list[str], source: str
) -> tuple[list[Row], list[Row]]:
    """Train and eval rows where the source brings no eval split.

    The eval rows are drawn from `spare`, the rows after the first `max_rows`, if it has enough rows with other prompts;
    else they are taken out of `kept`.
    """
    count = min(max(1, round(options.eval_share * len(kept))), options.max_eval_rows or len(kept))
    prompts = {row.prompt for row in kept}
    spare = [row for row in spare if row.prompt not in prompts]
    if len(spare) >= count:
        notes.append(f"held out {count} of the {len(spare)} rows after these as the eval split")
        return kept, _sample(spare, count, rng)
    train, held_out = _split_by_prompt(kept, count, rng, source)
    share = f"{100 * len(held_out) / len(kept):.0f} %"
    notes.append(f"held out {len(held_out)} of {len(kept)} rows as the eval split ({share})")
    return train, held_out


def _split_by_prompt(rows: list[Row], count: int, rng: random.Random, source: str) -> tuple[list[Row], list[Row]]:
    """Train and eval rows. More than `count` are held out only if every prompt has more rows than that."""
    by_prompt: dict[Prompt, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row.prompt, []).append(row)
    if len(by_prompt) < 2:
        raise TaskError(f"all usable rows of {source} have the same prompt, so none can be held out; add an eval split")
    groups = list(by_prompt.values())
    rng.shuffle(groups)
    held_out: set[Row] = set()
    for group in groups:
        if len(held_out) + len(group) <= min(count, len(rows) - 1):
            held_out.update(group)
    held_out = held_out or set(sorted(groups, key=len)[0])
    return [row for row in rows if row not in held_out], [row for row in rows if row in held_out]


def _sample(rows: list[Row], count: int, rng: random.Random) -> list[Row]:
    """`count` of the rows, in their order."""
    return [rows[i] for i in sorted(rng.sample(range(len(rows)), count))]


def _task_name(requested: str | None, default: str) -> str:
    name = re.sub(r"[^a-z0-9_-]", "-", default.lower()) if requested is None else requested
    if not _NAME.fullmatch(name) or name in RESERVED_NAMES:
        rule = (
            "expected 1 to 63 characters of a-z, 0-9, _ and -, the first a letter or digit, "
            f"and not {' or '.join(RESERVED_NAMES)}"
        )
        raise TaskError(f"{name!r} cannot be the task's name; {rule}; choose one with --name")
    return name


def _describe(bad: list[tuple[str, str]], total: int) -> str:
    shown = [f"{where}: {reason}" for where, reason in bad[:BAD_ROWS_SHOWN]]
    more = [f"… and {len(bad) - BAD_ROWS_SHOWN} more"] if len(bad) > BAD_ROWS_SHOWN else []
    advice = "Correct them, or go on without them: --skip-bad-rows"
    return "\n".join([f"{len(bad)} of {total} rows cannot be used:", *shown, *more, advice])
