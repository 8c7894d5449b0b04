"""The test queries of an evaluation: rows of the tasks, and foreign queries that belong to no task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from see_ray.data.demo_tasks import general_questions
from see_ray.data.general_queries import Chat
from see_ray.data.rows import Row
from see_ray.data.task import read_task
from see_ray.models.activation import encode_prompt

GENERAL_QUESTIONS = "general questions"
"""Source of the foreign queries that are part of every evaluation."""


@dataclass(frozen=True)
class Query:
    """One test query.

    Attributes:
        owner: the task that it belongs to; None for a foreign query.
        source: the task, or the source of a foreign query.
        prompt: token ids up to and including the generation prompt.
        messages: the same as a chat.
        reference: the right answer; empty for a foreign query.
    """

    owner: str | None
    source: str
    prompt: tuple[int, ...]
    messages: Chat
    reference: str


def encode_queries(
    tests: Mapping[str, Iterable[Row]], foreign: Iterable[tuple[str, Iterable[Chat]]], tokenizer: Any
) -> list[Query]:
    """Tokenize all test queries, foreign ones last.

    Args:
        tests: test rows by task.
        foreign: (source, chats).
        tokenizer: of the base model.
    """

    def encode(owner: str | None, source: str, messages: Chat, reference: str) -> Query:
        return Query(owner, source, tuple(encode_prompt(tokenizer, messages)), messages, reference)

    own = [encode(task, task, row.messages, row.response) for task, rows in tests.items() for row in rows]
    return own + [encode(None, source, chat, "") for source, chats in foreign for chat in chats]


def general_chats(count: int) -> list[Chat]:
    """The first `count` of the general questions, as chats."""
    return [as_chat(text) for text in general_questions()[:count]]


def as_chat(text: str) -> Chat:
    """A chat of one user turn."""
    return [{"role": "user", "content": text}]


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, in its order."""
    task = read_task(path)
    return sorted([*task.train, *task.eval], key=lambda row: int(row.where.rpartition(":")[2].rpartition(" ")[2]))
