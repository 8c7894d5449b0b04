"""Rows of a task: what a raw record must look like to become a prompt and a response.

A record is an object with the first that it has of these sets of keys (null counts as missing, other keys are ignored):

    messages                      OpenAI chat; the last message is the assistant's: the response
    prompt, response              prompt: a string, or messages that end with the user's
    instruction, output (input)   the user's turn is the instruction, then a blank line and the input if there is one

Text is kept as written, without Unicode normalization. Text parts of a message are joined by newlines, as the endpoint
joins them. A record is bad if it

    cannot be decoded             not UTF-8, or invalid JSON
    has the wrong shape           not an object; keys missing; values of a wrong type
    has no valid conversation     roles other than system (first only), user and assistant; turns in the wrong order
    has unusable text             a blank prompt, turn or response (a system prompt may be blank); NUL characters;
                                  lone surrogates
    does not fit                  more tokens than allowed; a train row whose prompt is in the eval split
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from see_ray.errors import ConfigError, SeeError, TaskError

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": …}
Prompt = tuple[tuple[str, str], ...]  # (role, content) of every turn before the response; the last is the user's

ROW_SHAPES = (("messages",), ("prompt", "response"), ("instruction", "output"))
ROW_COLUMNS = ("messages", "prompt", "response", "instruction", "input", "output")
EXPECTED_KEYS = "`messages`, or `prompt` and `response`, or `instruction` and `output`"

_UNUSABLE = re.compile(r"[\0\ud800-\udfff]")


class BadRow(TaskError):
    """Why one row cannot be used."""


@dataclass(frozen=True)
class Record:
    """A row as it was read, before it is checked.

    Attributes:
        where: its place, for messages: see `Row.where`.
        value: the decoded JSON or parquet value; a `BadRow` if it could not be decoded, so that reading continues and
            all bad rows are reported together.
    """

    where: str
    value: object


@dataclass(frozen=True)
class RawSplit:
    """A split as it was opened: its name in messages, and its records, which are read as they are iterated over."""

    label: str
    records: Iterable[Record]


@dataclass(frozen=True)
class Row:
    """One sample. Two rows are equal if their prompts and responses are."""

    prompt: Prompt
    response: str
    where: str = field(compare=False)
    """For messages: `sa.jsonl:17`, `sa.parquet: row 17` or `owner/name train: row 17`, counted from 1."""

    @property
    def messages(self) -> list[Message]:
        """The prompt as OpenAI chat messages."""
        return [{"role": role, "content": content} for role, content in self.prompt]


@dataclass(frozen=True)
class TokenLimit:
    """Rows with more than `max_length` tokens are bad.

    Attributes:
        max_length: most tokens of prompt and response together.
        count_tokens: the tokens of a row. A SeeError that it raises (for example because the chat template takes no
            system prompt) makes the row a bad one.
    """

    max_length: int
    count_tokens: Callable[[Row], int]

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ConfigError(f"expected a max_length of at least 1, found {self.max_length}")

    def check(self, row: Row) -> None:
        """Raise `BadRow` if the row is too long."""
        if (tokens := self.count_tokens(row)) > self.max_length:
            raise BadRow(f"{tokens} tokens long; at most {self.max_length} fit")


def read_rows(
    split: RawSplit, token_limit: TokenLimit | None = None, eval_places: Mapping[Prompt, str] | None = None
) -> tuple[list[Row], list[tuple[str, str]]]:
    """Read and check all rows of a split.

    Args:
        split: what to read.
        token_limit: longer rows are bad.
        eval_places: prompts of the eval split and where they stand; rows with one of these are bad.

    Returns:
        The good rows, and (where, reason) of the bad ones.

    Raises:
        TaskError: the split holds no rows, or cannot be read.
    """
    rows: list[Row] = []
    bad: list[tuple[str, str]] = []
    for record in split.records:
        try:
            row = parse_row(record)
            if token_limit:
                token_limit.check(row)
            if eval_places and row.prompt in eval_places:
                raise BadRow(f"its prompt is also in the eval split ({eval_places[row.prompt]})")
            rows.append(row)
        except SeeError as error:
            bad.append((record.where, str(error)))
    if not rows and not bad:
        raise TaskError(f"{split.label} holds no rows; expected rows with {EXPECTED_KEYS}")
    return rows, bad


def parse_row(record: Record) -> Row:
    """Check a record and turn it into a row; raises `BadRow` with the reason if it has none of the shapes."""
    if isinstance(record.value, BadRow):
        raise record.value
    value = _object(record.value, "the row")
    cells = {key: cell for key, cell in value.items() if cell is not None}
    if "messages" in cells:
        turns = _turns(cells["messages"], "messages")
        role, response = turns.pop()
        if role != "assistant":
            raise BadRow(f"the last message is the {role}'s; expected the assistant's")
    elif "prompt" in cells and "response" in cells:
        prompt = cells["prompt"]
        turns = _turns(prompt, "prompt") if isinstance(prompt, list) else [("user", _text(prompt, "prompt"))]
        response = _text(cells["response"], "response")
    elif "instruction" in cells and "output" in cells:
        instruction = _text(cells["instruction"], "instruction")
        task_input = _text(cells.get("input", ""), "input", may_be_blank=True)
        turns = [("user", f"{instruction}\n\n{task_input}" if task_input.strip() else instruction)]
        response = _text(cells["output"], "output")
    else:
        keys = ", ".join(f"{key!r:.40}" + (" (null)" if cell is None else "") for key, cell in list(value.items())[:8])
        raise BadRow(f"missing keys: found {keys or 'none'}; expected {EXPECTED_KEYS}")
    if not turns or turns[-1][0] != "user":
        raise BadRow(f"{turns[-1][0] if turns else 'no'} turn before the response; expected the user's")
    return Row(tuple(turns), response, record.where)


def _turns(messages: object, name: str) -> list[tuple[str, str]]:
    """(role, content) of each message of a chat, checked."""
    if not isinstance(messages, list) or not messages:
        raise BadRow(f"{name} is {type(messages).__name__} {messages!r:.40}; expected a list of messages")
    turns = []
    for i, message in enumerate(messages):
        place = f"{name}[{i}]"
        role, content = _object(message, place).get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise BadRow(f"{place}.role is {role!r:.40}; expected system, user or assistant")
        if role == "system" and i > 0:
            raise BadRow(f"{place} is a system message; only the first may be one")
        if isinstance(content, list):
            if any(_object(part, f"{place}.content").get("type") != "text" for part in content):
                raise BadRow(f"{place}.content has parts that are not of the type text")
            content = "\n".join(_text(part.get("text"), f"{place}.content", may_be_blank=True) for part in content)
        turns.append((str(role), _text(content, f"{place}.content", may_be_blank=role == "system")))
    return turns


def _object(value: object, name: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise BadRow(f"{name} is of type {type(value).__name__}; expected an object")
    return value


def _text(value: object, name: str, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is of type {type(value).__name__}; expected text")
    if unusable := _UNUSABLE.search(value):
        kind = "a NUL character" if unusable[0] == "\0" else "a lone surrogate"
        raise BadRow(f"{name} has {kind} at position {unusable.start()} (from 0)")
    if not may_be_blank and not value.strip():
        raise BadRow(f"{name} is empty")
    return value
