"""Test queries: the tasks' own first, then foreign ones."""

from __future__ import annotations

from typing import Any

from see_ray.data.rows import Row
from see_ray.evaluate.queries import as_chat, encode_queries, general_chats
from see_ray.models.activation import encode_prompt


def test_queries_are_the_tasks_own_and_then_foreign_ones(tokenizer: Any) -> None:
    rows = [Row((("user", "How much?"),), "Two", "sa:1"), Row((("user", "Where?"),), "Here", "sa:2")]
    queries = encode_queries({"sa": rows}, [("trec", [as_chat("Who?")])], tokenizer)
    assert [(query.owner, query.source, query.reference) for query in queries] == [
        ("sa", "sa", "Two"),
        ("sa", "sa", "Here"),
        (None, "trec", ""),
    ]
    assert [list(query.prompt) for query in queries] == [encode_prompt(tokenizer, query.messages) for query in queries]
    assert queries[2].messages == [{"role": "user", "content": "Who?"}]


def test_general_questions_are_chats_of_one_turn() -> None:
    chats = general_chats(3)
    assert len(chats) == 3
    assert all(len(chat) == 1 and chat[0]["role"] == "user" for chat in chats)
