"""What a record must look like to become a row."""

import json
from pathlib import Path
from typing import Any

import pytest

from see_ray.data.rows import Row, TokenLimit
from see_ray.data.task import read_task
from see_ray.errors import BadRowsError, ConfigError, TaskError


def rows(n: Any, start: Any = 0) -> Any:
    return [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(start, start + n)]


def write(path: Any, values: Any) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def read_one(tmp_path: Path, value: Any) -> Any:
    """The row that ``value`` becomes, read beside two good ones."""
    task = read_task(write(tmp_path / "one.jsonl", [value, *rows(2)]))
    return next(row for row in task.train + task.eval if row.where == "one.jsonl:1")


def refusal(tmp_path: Path, line: Any) -> Any:
    """Why the line (bytes, or a value to write as JSON) is a bad row, read between two good ones."""
    line = line if isinstance(line, bytes) else json.dumps(line).encode()
    good = [json.dumps(row).encode() for row in rows(2)]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\n".join([good[0], line, good[1]]) + b"\n")
    with pytest.raises(BadRowsError) as error:
        read_task(path)
    ((where, reason),) = error.value.rows
    assert where == "bad.jsonl:2"
    return reason


# Shapes of rows.


def test_prompt_and_response(tmp_path: Path) -> None:
    row = read_one(tmp_path, {"prompt": "Hi", "response": "Hello", "references": ["x"]})
    assert (row.prompt, row.response) == ((("user", "Hi"),), "Hello")


def test_prompt_may_be_a_list_of_messages(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert read_one(tmp_path, {"prompt": turns, "response": "Hello"}).messages == turns


def test_instruction_and_input_are_joined_by_a_blank_line(tmp_path: Path) -> None:
    row = read_one(tmp_path, {"instruction": "Translate.", "input": "Hi", "output": "Hola"})
    assert row.messages == [{"role": "user", "content": "Translate.\n\nHi"}]


@pytest.mark.parametrize("value", [{}, {"input": ""}, {"input": " "}, {"input": None}])
def test_instruction_without_input_stands_alone(tmp_path: Path, value: dict[str, Any]) -> None:
    row = read_one(tmp_path, {"instruction": "Sing.", "output": "La", **value})
    assert row.prompt == (("user", "Sing."),)


def test_messages_keep_system_prompt_and_several_turns(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    messages = [{"role": role, "content": content} for role, content in [*turns, ("assistant", "See you")]]
    row = read_one(tmp_path, {"messages": messages})
    assert (row.prompt, row.response) == (tuple(turns), "See you")


def test_text_parts_of_a_message_are_joined_by_newlines(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "three"}]
    assert read_one(tmp_path, {"messages": messages}).prompt == (("user", "one\ntwo"),)


def test_messages_win_over_a_prompt_beside_them(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert read_one(tmp_path, {"prompt": "x", "response": "y", "messages": messages}).response == "Hello"


def test_null_counts_as_missing(tmp_path: Path) -> None:
    assert read_one(tmp_path, {"messages": None, "prompt": "Hi", "response": "Hello"}).response == "Hello"


def test_shapes_may_differ_from_row_to_row(tmp_path: Path) -> None:
    mixed = [*rows(1), {"instruction": "Sing.", "output": "La"}]
    task = read_task(write(tmp_path / "mixed.jsonl", mixed))
    assert sorted(row.response for row in task.train + task.eval) == ["La", "answer 0"]


def test_text_is_kept_exactly(tmp_path: Path) -> None:
    text = "  e\u0301 \u2028 \ufb01\t😀\r\n "  # combining accent, line separator, ligature: none is normalised
    row = read_one(tmp_path, {"prompt": text, "response": text})
    assert (row.prompt[0][1], row.response) == (text, text)


# Bad rows.


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a", "response"', "invalid JSON"),
        (b"[" * 100_000, "invalid JSON"),
        (b'{"prompt": ' + b"1" * 5000 + b', "response": "b"}', "invalid JSON"),
        (b"[1, 2]", "the row is of type list; expected an object"),
        ({}, "missing keys: found none"),
        ({"prompt": "a", "response": None}, "missing keys: found 'prompt', 'response' (null)"),
        ({"instruction": "a", "input": "b"}, "missing keys: found 'instruction', 'input'; expected `messages`"),
        ({"prompt": 7, "response": "b"}, "prompt is of type int; expected text"),
        ({"prompt": "a", "response": ["b"]}, "response is of type list; expected text"),
        ({"instruction": "a", "input": {}, "output": "b"}, "input is of type dict; expected text"),
        ({"prompt": "", "response": "b"}, "prompt is empty"),
        ({"prompt": [], "response": "b"}, "prompt is list []; expected a list of messages"),
        ({"instruction": " ", "input": "a", "output": "b"}, "instruction is empty"),
        ({"prompt": "a", "response": ""}, "response is empty"),
        ({"prompt": "a", "response": " \n\t"}, "response is empty"),
        ({"prompt": "a\0", "response": "b"}, "prompt has a NUL character at position 1"),
        ({"prompt": "a", "response": "ab\ud800"}, "response has a lone surrogate at position 2"),
        ({"messages": "a"}, "messages is str 'a'; expected a list of messages"),
        ({"messages": ["a"]}, "messages[0] is of type str; expected an object"),
    ],
)
def test_bad_row_says_why(tmp_path: Path, line: Any, reason: str) -> None:
    assert refusal(tmp_path, line).startswith(reason)


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([("user", "a")], "the last message is the user's; expected the assistant's"),
        ([("assistant", "a")], "no turn before the response; expected the user's"),
        ([("system", "a"), ("assistant", "b")], "system turn before the response; expected the user's"),
        ([("user", "a"), ("assistant", "b"), ("assistant", "c")], "assistant turn before the response"),
        ([("user", "a"), ("system", "b"), ("user", "c"), ("assistant", "d")], "messages[1] is a system message; only"),
        ([("tool", "a"), ("user", "b"), ("assistant", "c")], "messages[0].role is 'tool'; expected system"),
        ([(["user"], "a"), ("assistant", "b")], "messages[0].role is ['user']; expected system"),
        ([("user", None), ("assistant", "b")], "messages[0].content is of type NoneType; expected text"),
        ([("user", " "), ("assistant", "b")], "messages[0].content is empty"),
        ([("user", "a"), ("assistant", "")], "messages[1].content is empty"),
        ([("user", [{"type": "image_url"}]), ("assistant", "b")], "messages[0].content has parts that are not of"),
        ([("user", [{"type": "text", "text": 3}]), ("assistant", "b")], "messages[0].content is of type int"),
    ],
)
def test_bad_messages_say_why(tmp_path: Path, turns: Any, reason: str) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    assert refusal(tmp_path, {"messages": messages}).startswith(reason)


def test_surrogates_in_ignored_columns_do_no_harm(tmp_path: Path) -> None:
    assert read_one(tmp_path, {"prompt": "a", "response": "b", "note": "\ud800"}).response == "b"


def test_too_long_row_names_both_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [*rows(3), {"prompt": "word " * 50, "response": "a b"}])
    with pytest.raises(BadRowsError, match=r"x\.jsonl:4: 52 tokens long; at most 40 fit"):
        read_task(path, token_limit=TokenLimit(40, lambda row: len(f"{row.prompt[-1][1]} {row.response}".split())))


def test_row_of_exactly_max_length_is_kept(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "x.jsonl", rows(3)), token_limit=TokenLimit(7, lambda row: 7))
    assert len(task.train) + len(task.eval) == 3


def test_a_limit_below_one_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_length"):
        TokenLimit(0, lambda row: 1)


def test_row_that_cannot_be_counted_is_bad(tmp_path: Path) -> None:
    def count(row: Row) -> int:
        if row.response == "answer 1":
            raise TaskError("the chat template refuses it")
        return 1

    with pytest.raises(BadRowsError) as error:
        read_task(write(tmp_path / "x.jsonl", rows(4)), token_limit=TokenLimit(9, count))
    assert error.value.rows == (("x.jsonl:2", "the chat template refuses it"),)


def test_train_prompt_in_the_eval_split_is_a_bad_row(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [*rows(3), {"prompt": "shared", "response": "one"}])
    write(tmp_path / "eval.jsonl", [*rows(1, start=10), {"prompt": "shared", "response": "two"}])
    with pytest.raises(BadRowsError) as error:
        read_task(tmp_path, name="x")
    assert error.value.rows == (("train.jsonl:4", "its prompt is also in the eval split (eval.jsonl:2)"),)
