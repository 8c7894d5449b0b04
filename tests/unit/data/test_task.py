import json
import os
import pickle
import time
from pathlib import Path

import pytest

from see_ray.data.task import Row, read_task
from see_ray.errors import BadRowsError, ConfigError, TaskError

SUPERNI = Path(os.environ.get("SEE_SUPERNI", Path(__file__).parents[3] / "../shared/superni"))


def rows(n, start=0):
    return [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(start, start + n)]


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def read_one(tmp_path, value):
    """The row that ``value`` becomes, read beside two good ones."""
    task = read_task(write(tmp_path / "one.jsonl", [value, *rows(2)]))
    return next(row for row in task.train + task.eval if row.where == "one.jsonl:1")


def refusal(tmp_path, line):
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


def prompts(split):
    return [row.prompt[-1][1] for row in split]


# Shapes of rows.


def test_prompt_and_response(tmp_path):
    row = read_one(tmp_path, {"prompt": "Hi", "response": "Hello", "references": ["x"]})
    assert (row.prompt, row.response) == ((("user", "Hi"),), "Hello")


def test_prompt_may_be_a_list_of_messages(tmp_path):
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert read_one(tmp_path, {"prompt": turns, "response": "Hello"}).messages == turns


def test_instruction_and_input_are_joined_by_a_blank_line(tmp_path):
    row = read_one(tmp_path, {"instruction": "Translate.", "input": "Hi", "output": "Hola"})
    assert row.messages == [{"role": "user", "content": "Translate.\n\nHi"}]


@pytest.mark.parametrize("value", [{}, {"input": ""}, {"input": " "}, {"input": None}])
def test_instruction_without_input_stands_alone(tmp_path, value):
    row = read_one(tmp_path, {"instruction": "Sing.", "output": "La", **value})
    assert row.prompt == (("user", "Sing."),)


def test_messages_keep_system_prompt_and_several_turns(tmp_path):
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")]
    messages = [{"role": role, "content": content} for role, content in [*turns, ("assistant", "See you")]]
    row = read_one(tmp_path, {"messages": messages})
    assert (row.prompt, row.response) == (tuple(turns), "See you")


def test_text_parts_of_a_message_are_joined_by_newlines(tmp_path):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "three"}]
    assert read_one(tmp_path, {"messages": messages}).prompt == (("user", "one\ntwo"),)


def test_messages_win_over_a_prompt_beside_them(tmp_path):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert read_one(tmp_path, {"prompt": "x", "response": "y", "messages": messages}).response == "Hello"


def test_null_counts_as_missing(tmp_path):
    assert read_one(tmp_path, {"messages": None, "prompt": "Hi", "response": "Hello"}).response == "Hello"


def test_shapes_may_differ_from_row_to_row(tmp_path):
    mixed = [*rows(1), {"instruction": "Sing.", "output": "La"}]
    task = read_task(write(tmp_path / "mixed.jsonl", mixed))
    assert sorted(row.response for row in task.train + task.eval) == ["La", "answer 0"]


def test_text_is_kept_exactly(tmp_path):
    text = "  e\u0301 \u2028 \ufb01\t😀\r\n "  # combining accent, line separator, ligature: none is normalised
    row = read_one(tmp_path, {"prompt": text, "response": text})
    assert (row.prompt[0][1], row.response) == (text, text)


def test_raw_line_separator_does_not_end_a_row(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a\u2028b", "response": "c"}\n{"prompt": "d", "response": "e"}\n', encoding="utf-8")
    assert sum(map(len, (read_task(path).train, read_task(path).eval))) == 2


def test_byte_order_mark_crlf_and_blank_lines_are_fine(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in rows(3)) + b"\r\n \r\n")
    task = read_task(path)
    assert sorted(row.where for row in task.train + task.eval) == ["x.jsonl:1", "x.jsonl:3", "x.jsonl:5"]


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
def test_bad_row_says_why(tmp_path, line, reason):
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
def test_bad_messages_say_why(tmp_path, turns, reason):
    messages = [{"role": role, "content": content} for role, content in turns]
    assert refusal(tmp_path, {"messages": messages}).startswith(reason)


def test_not_utf8_names_the_byte_in_the_file(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a", "response": "b"}\n{"prompt": "\xe9", "response": "b"}\n')
    with pytest.raises(BadRowsError) as error:
        read_task(path)
    position = path.read_bytes().index(b"\xe9")
    assert error.value.rows == (("latin.jsonl:2", f"not UTF-8 at byte {position} of the file (from 0)"),)


def test_surrogates_in_ignored_columns_do_no_harm(tmp_path):
    assert read_one(tmp_path, {"prompt": "a", "response": "b", "note": "\ud800"}).response == "b"


def test_one_run_reports_every_bad_row_and_shows_twenty(tmp_path):
    bad = [{"prompt": f"q{i}", "response": ""} for i in range(25)]
    with pytest.raises(BadRowsError) as error:
        read_task(write(tmp_path / "x.jsonl", [*rows(5), *bad]))
    lines = str(error.value).splitlines()
    assert lines[0] == "25 of 30 rows cannot be used:"
    assert lines[1:21] == [f"x.jsonl:{i}: response is empty" for i in range(6, 26)]
    assert lines[21] == "… and 5 more"
    assert "--skip-bad-rows" in lines[22]
    assert len(error.value.rows) == 25


def test_bad_rows_of_both_splits_are_reported_together(tmp_path):
    write(tmp_path / "train.jsonl", [*rows(3), {"prompt": "a"}])
    write(tmp_path / "eval.jsonl", [*rows(3, start=10), {"prompt": "b"}])
    with pytest.raises(BadRowsError) as error:
        read_task(tmp_path, name="x")
    assert [where for where, _ in error.value.rows] == ["train.jsonl:4", "eval.jsonl:4"]


def test_bad_rows_error_survives_pickling(tmp_path):
    with pytest.raises(BadRowsError) as error:
        read_task(write(tmp_path / "x.jsonl", [*rows(2), {}]))
    copy = pickle.loads(pickle.dumps(error.value))
    assert (str(copy), copy.rows) == (str(error.value), error.value.rows)


def test_skipped_bad_rows_are_counted(tmp_path):
    path = write(tmp_path / "x.jsonl", [*rows(4), {}, {"prompt": "", "response": "a"}])
    task = read_task(path, skip_bad_rows=True)
    assert len(task.train) + len(task.eval) == 4
    assert task.notes[0] == "skipped 2 bad rows"


def test_too_long_row_names_both_numbers(tmp_path):
    path = write(tmp_path / "x.jsonl", [*rows(3), {"prompt": "word " * 50, "response": "a b"}])
    with pytest.raises(BadRowsError, match=r"x\.jsonl:4: 52 tokens long; at most 40 fit"):
        read_task(path, max_length=40, count_tokens=lambda row: len(f"{row.prompt[-1][1]} {row.response}".split()))


def test_row_of_exactly_max_length_is_kept(tmp_path):
    task = read_task(write(tmp_path / "x.jsonl", rows(3)), max_length=7, count_tokens=lambda row: 7)
    assert len(task.train) + len(task.eval) == 3


def test_row_that_cannot_be_counted_is_bad(tmp_path):
    def count(row: Row) -> int:
        if row.response == "answer 1":
            raise TaskError("the chat template refuses it")
        return 1

    with pytest.raises(BadRowsError) as error:
        read_task(write(tmp_path / "x.jsonl", rows(4)), max_length=9, count_tokens=count)
    assert error.value.rows == (("x.jsonl:2", "the chat template refuses it"),)


def test_train_prompt_in_the_eval_split_is_a_bad_row(tmp_path):
    write(tmp_path / "train.jsonl", [*rows(3), {"prompt": "shared", "response": "one"}])
    write(tmp_path / "eval.jsonl", [*rows(1, start=10), {"prompt": "shared", "response": "two"}])
    with pytest.raises(BadRowsError) as error:
        read_task(tmp_path, name="x")
    assert error.value.rows == (("train.jsonl:4", "its prompt is also in the eval split (eval.jsonl:2)"),)


def test_skipping_takes_overlapping_rows_out_of_train(tmp_path):
    write(tmp_path / "train.jsonl", rows(5))
    write(tmp_path / "eval.jsonl", rows(5, start=3))
    task = read_task(tmp_path, name="x", skip_bad_rows=True)
    assert prompts(task.train) == ["question 0", "question 1", "question 2"]
    assert len(task.eval) == 5


# Duplicates and splits.


def test_exact_duplicates_are_dropped_and_counted(tmp_path):
    task = read_task(write(tmp_path / "x.jsonl", [*rows(4), *rows(3)]))
    assert sorted(prompts(task.train + task.eval)) == [f"question {i}" for i in range(4)]
    assert task.notes[0] == "dropped 3 exact duplicates"


def test_one_prompt_may_have_several_responses(tmp_path):
    write(tmp_path / "train.jsonl", [{"prompt": "a", "response": f"r{i}"} for i in range(3)])
    write(tmp_path / "eval.jsonl", rows(1))
    assert len(read_task(tmp_path, name="x").train) == 3


def test_given_eval_split_is_kept_whole(tmp_path):
    write(tmp_path / "train.jsonl", rows(5))
    write(tmp_path / "eval.jsonl", rows(5, start=5))
    task = read_task(tmp_path, name="x")
    assert (prompts(task.train), prompts(task.eval)) == (
        [f"question {i}" for i in range(5)],
        [f"question {i}" for i in range(5, 10)],
    )
    assert task.notes == ()


def test_held_out_share(tmp_path):
    task = read_task(write(tmp_path / "x.jsonl", rows(200)))
    assert (len(task.train), len(task.eval)) == (180, 20)
    assert task.notes == ("held out 20 of 200 rows as the eval split (10 %)",)
    assert set(prompts(task.train)).isdisjoint(prompts(task.eval))


@pytest.mark.parametrize(("share", "split"), [(0.01, (4, 1)), (0.99, (1, 4))])
def test_each_side_gets_at_least_one_row(tmp_path, share, split):
    task = read_task(write(tmp_path / "x.jsonl", rows(5)), eval_share=share)
    assert (len(task.train), len(task.eval)) == split


def test_holding_out_is_seeded(tmp_path):
    path = write(tmp_path / "x.jsonl", rows(100))
    assert read_task(path, seed=3) == read_task(path, seed=3)
    assert read_task(path, seed=3).eval != read_task(path, seed=4).eval


def test_rows_of_one_prompt_stay_on_one_side(tmp_path):
    values = [{"prompt": f"q{i % 10}", "response": f"r{i}"} for i in range(100)]
    for seed in range(5):
        task = read_task(write(tmp_path / "x.jsonl", values), eval_share=0.25, seed=seed)
        assert len(task.eval) == 20  # two whole prompts of ten rows; a third would pass 25
        assert set(prompts(task.train)).isdisjoint(prompts(task.eval))


def test_smallest_prompt_is_held_out_where_all_are_large(tmp_path):
    values = [{"prompt": "big", "response": f"r{i}"} for i in range(9)]
    values += [{"prompt": "small", "response": f"r{i}"} for i in range(3)]
    assert prompts(read_task(write(tmp_path / "x.jsonl", values)).eval) == ["small"] * 3


def test_single_prompt_cannot_be_split(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": "a", "response": f"r{i}"} for i in range(5)])
    with pytest.raises(TaskError, match="same prompt"):
        read_task(path)


def test_max_rows_keeps_the_first_and_holds_out_from_the_rest(tmp_path):
    task = read_task(write(tmp_path / "x.jsonl", rows(60)), max_rows=40)
    assert prompts(task.train) == [f"question {i}" for i in range(40)]
    assert len(task.eval) == 4
    assert set(prompts(task.eval)) <= {f"question {i}" for i in range(40, 60)}


def test_rest_with_prompts_of_train_is_not_held_out(tmp_path):
    values = [{"prompt": f"q{i % 10}", "response": f"r{i}"} for i in range(20)]
    task = read_task(write(tmp_path / "x.jsonl", values), max_rows=10)
    assert (len(task.train), len(task.eval)) == (9, 1)
    assert set(prompts(task.train)).isdisjoint(prompts(task.eval))


def test_max_rows_holds_out_from_within_where_the_rest_is_short(tmp_path):
    task = read_task(write(tmp_path / "x.jsonl", rows(42)), max_rows=40)
    assert (len(task.train), len(task.eval)) == (36, 4)
    assert set(prompts(task.train + task.eval)) == {f"question {i}" for i in range(40)}


def test_max_rows_leaves_a_given_eval_split_alone(tmp_path):
    write(tmp_path / "train.jsonl", rows(20))
    write(tmp_path / "eval.jsonl", rows(7, start=20))
    task = read_task(tmp_path, name="x", max_rows=5)
    assert (prompts(task.train), len(task.eval)) == ([f"question {i}" for i in range(5)], 7)


def test_max_eval_rows_samples_a_given_eval_split(tmp_path):
    write(tmp_path / "train.jsonl", rows(5))
    write(tmp_path / "eval.jsonl", rows(1000, start=1000))
    task = read_task(tmp_path, name="x", max_eval_rows=10)
    numbers = [int(prompt.split()[1]) for prompt in prompts(task.eval)]
    assert len(numbers) == 10
    assert numbers == sorted(numbers)
    assert numbers[-1] > 1200  # not just the first ten


def test_max_eval_rows_leaves_more_to_train_on(tmp_path):
    task = read_task(write(tmp_path / "x.jsonl", rows(100)), max_eval_rows=3)
    assert (len(task.train), len(task.eval)) == (97, 3)


@pytest.mark.parametrize("values", [rows(1), [*rows(1), *rows(1)]])
def test_fewer_than_two_rows_are_no_task(tmp_path, values):
    with pytest.raises(TaskError, match="too few usable rows: 1 to train on"):
        read_task(write(tmp_path / "x.jsonl", values))


def test_skipping_down_to_one_row_is_no_task(tmp_path):
    with pytest.raises(TaskError, match="too few usable rows: 1 to train on, 0 to evaluate on, 3 bad"):
        read_task(write(tmp_path / "x.jsonl", [*rows(1), {}, {}, {}]), skip_bad_rows=True)


@pytest.mark.parametrize(
    "settings", [{"eval_share": 0}, {"eval_share": 10}, {"max_rows": 0}, {"max_eval_rows": -1}, {"max_length": 9}]
)
def test_settings_out_of_bounds(tmp_path, settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        read_task(write(tmp_path / "x.jsonl", rows(5)), **settings)


# Sources.


def test_parquet_reads_like_json_lines(tmp_path):
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


def test_parquet_row_that_is_not_utf8_is_bad(tmp_path):
    import pyarrow
    import pyarrow.parquet

    prompt = pyarrow.array([b"ok", b"a\xff", b"fine"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": prompt, "response": ["a", "b", "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(BadRowsError) as error:
        read_task(tmp_path / "x.parquet")
    assert error.value.rows == (("x.parquet: row 2", "a text that is not UTF-8 at its byte 1 (from 0)"),)


def test_other_parquet_columns_are_not_read(tmp_path):
    import pyarrow
    import pyarrow.parquet

    broken = pyarrow.array([b"\xff"] * 3).view(pyarrow.string())
    columns = {"prompt": ["a", "b", "c"], "response": ["d", "e", "f"], "note": broken}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    assert len(read_task(tmp_path / "x.parquet").train) == 2


def test_parquet_without_known_columns_lists_its_own(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "label": [1]}), tmp_path / "x.parquet")
    with pytest.raises(TaskError, match="has the columns text, label; expected `messages`"):
        read_task(tmp_path / "x.parquet")


def test_file_that_is_no_parquet(tmp_path):
    (tmp_path / "x.parquet").write_text("hello")
    with pytest.raises(TaskError, match=r"cannot read .*x\.parquet as parquet"):
        read_task(tmp_path / "x.parquet")


def test_json_array_is_refused_with_the_way_out(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(rows(5)))
    with pytest.raises(TaskError, match=r"one JSON array.*jq -c"):
        read_task(tmp_path / "x.json")


@pytest.mark.parametrize("split", ["eval", "validation", "dev", "test"])
def test_folder_with_a_single_task(tmp_path, split):
    write(tmp_path / "sa.train.jsonl", rows(4))
    write(tmp_path / f"sa.{split}.jsonl", rows(3, start=4))
    write(tmp_path / "sa.extra.jsonl", rows(9, start=100))
    task = read_task(tmp_path)
    assert (task.name, len(task.train), len(task.eval)) == ("sa", 4, 3)


def test_folder_without_an_eval_split_holds_rows_out(tmp_path):
    write(tmp_path / "x" / "train.jsonl", rows(10))
    assert len(read_task(tmp_path / "x").eval) == 1


def test_hidden_files_of_a_folder_are_passed_over(tmp_path):
    write(tmp_path / "train.jsonl", rows(10))
    (tmp_path / "._train.jsonl").write_bytes(b"\0")  # macOS leaves these on shared disks
    assert len(read_task(tmp_path, name="x").train) == 9


def test_folder_with_two_eval_splits_says_which_it_took(tmp_path):
    for number, split in enumerate(["train", "test", "validation"]):
        write(tmp_path / f"{split}.jsonl", rows(3 + number, start=10 * number))
    task = read_task(tmp_path, name="x")
    assert len(task.eval) == 5
    assert task.notes == ("took validation.jsonl as the eval split and left test.jsonl alone",)


def test_folder_of_several_tasks_lists_them(tmp_path):
    for name in ("qa", "sa"):
        write(tmp_path / f"{name}.train.jsonl", rows(3))
        write(tmp_path / f"{name}.test.jsonl", rows(3, start=3))
    with pytest.raises(TaskError, match=r"several tasks: qa, sa; name a single file, such as .*\.train\.jsonl"):
        read_task(tmp_path)


def test_folder_with_two_train_files(tmp_path):
    write(tmp_path / "train.jsonl", rows(3))
    write(tmp_path / "train.json", rows(3))
    with pytest.raises(TaskError, match=r"two train files, train\.json and train\.jsonl"):
        read_task(tmp_path)


def test_folder_without_a_train_split_lists_what_is_there(tmp_path):
    write(tmp_path / "contest.jsonl", rows(3))  # ends with the letters of test, but is no test split
    with pytest.raises(TaskError, match=r"no train split: found contest\.jsonl; expected"):
        read_task(tmp_path)


def test_single_file_does_not_use_its_sibling(tmp_path):
    path = write(tmp_path / "sa.train.jsonl", rows(10))
    write(tmp_path / "sa.test.jsonl", rows(10, start=10))
    task = read_task(path)
    assert {row.where.partition(":")[0] for row in task.train + task.eval} == {"sa.train.jsonl"}


@pytest.mark.parametrize("content", ["", "\n \r\n"])
def test_file_without_rows(tmp_path, content):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(TaskError, match=r"x\.jsonl (is empty|holds no rows); expected rows with `messages`"):
        read_task(tmp_path / "x.jsonl")


def test_empty_eval_file(tmp_path):
    write(tmp_path / "train.jsonl", rows(3))
    write(tmp_path / "eval.jsonl", [])
    with pytest.raises(TaskError, match=r"eval\.jsonl is empty"):
        read_task(tmp_path, name="x")


def test_other_kinds_of_files_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,response\n")
    with pytest.raises(TaskError, match=r"x\.csv is not a task file; expected a \.jsonl"):
        read_task(tmp_path / "x.csv")


def test_named_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(TaskError, match="is no file"):
        read_task(tmp_path / "x.jsonl")


@pytest.mark.parametrize("source", ["", " ", "missing.jsonl", "./missing", "../missing/x", "a\0b"])
def test_missing_path_that_cannot_be_a_dataset_id(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TaskError, match="is no file, no folder and no dataset id; expected"):
        read_task(source)


def test_path_that_the_system_refuses(tmp_path):
    with pytest.raises(TaskError, match=r"cannot read .*File name too long"):
        read_task(tmp_path / ("x" * 300 + ".jsonl"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_unreadable_file(tmp_path):
    write(tmp_path / "x.jsonl", rows(3)).chmod(0)
    with pytest.raises(TaskError, match=r"cannot read .*Permission denied"):
        read_task(tmp_path / "x.jsonl")


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
def test_name_derives_from_the_file(tmp_path, path, name):
    assert read_task(write(tmp_path / path, rows(3))).name == name


def test_name_of_a_folder(tmp_path, monkeypatch):
    write(tmp_path / "Reviews" / "train.jsonl", rows(3))
    monkeypatch.chdir(tmp_path / "Reviews")
    assert read_task(".").name == "reviews"


@pytest.mark.parametrize("name", ["", "SA", "-sa", "s a", "sa\n", "x" * 64, "see", "generalist"])
def test_given_name_must_fit_the_rule(tmp_path, name):
    with pytest.raises(TaskError, match="cannot be the task's name; expected up to 63"):
        read_task(write(tmp_path / "x.jsonl", rows(3)), name=name)


@pytest.mark.parametrize("stem", ["see", "Generalist", "日本"])
def test_derived_name_must_fit_the_rule_too(tmp_path, stem):
    with pytest.raises(TaskError, match="choose one with --name"):
        read_task(write(tmp_path / f"{stem}.jsonl", rows(3)))


# The hub, without a network: its address is a closed port, and its cache is made here.


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def cached_dataset(no_hub, tmp_path):
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
def test_without_a_network_both_readings_are_named_at_once(no_hub, source):
    start = time.monotonic()
    with pytest.raises(TaskError) as error:
        read_task(source)
    assert str(error.value).startswith(f"there is no file or folder '{source}', and the Hugging Face hub could not be")
    assert "\n" not in str(error.value)
    assert time.monotonic() - start < 10


def test_ids_that_the_hub_cannot_have_are_unknown(no_hub):
    with pytest.raises(TaskError, match="no file or folder 'a--b/c', and the Hugging Face hub knows no such dataset"):
        read_task("a--b/c")


def test_loader_names_do_not_read_the_working_folder(no_hub, tmp_path):
    write(tmp_path / "train.jsonl", rows(9))
    with pytest.raises(TaskError, match="knows no such dataset"):
        read_task("json")


def test_cached_dataset_is_read_without_a_network(cached_dataset):
    task = read_task("team/chat:short")
    assert (task.name, len(task.train), len(task.eval)) == ("chat-short", 6, 4)
    assert task.train[0].where == "team/chat:short train: row 1"
    assert task.notes[0].startswith("read from the cache, as the Hugging Face hub could not be reached")


def test_hub_lookup_leaves_the_offline_setting_as_it_was(cached_dataset):
    import datasets

    read_task("team/chat:short")
    assert datasets.config.HF_HUB_OFFLINE is False


def test_path_wins_over_a_dataset_of_that_id(cached_dataset, tmp_path):
    write(tmp_path / "team/chat/train.jsonl", rows(20))
    assert len(read_task("team/chat").train) == 18


# Real tasks, where they are at hand.


@pytest.mark.skipif(not (SUPERNI / "sa.train.jsonl").is_file(), reason="no SuperNI rows: set SEE_SUPERNI")
def test_superni_rows_are_all_good(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"sa.{split}.jsonl").symlink_to((SUPERNI / f"sa.{split}.jsonl").resolve())
    task = read_task(tmp_path)
    assert (task.name, len(task.train), len(task.eval)) == ("sa", 2000, 500)
    assert {row.response for row in task.train} == {"positive", "negative"}
    assert task.train[0].prompt[0][1].startswith("In this task, You are given a review of Amazon's food products.")
