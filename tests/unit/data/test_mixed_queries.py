"""Telling instruction from input in a task's queries, and mixing them with foreign instructions."""

import pytest

from see_ray.data.demo_tasks import demo_tasks
from see_ray.data.mixed_queries import Query, instruction_of, is_near, parts

WORDS = ["lamp", "river", "stone", "cloud", "paper", "table"]


def test_what_the_queries_begin_with_alike_is_the_instruction() -> None:
    found = parts([f"Spell it backwards, please.\n\n{word} is here" for word in WORDS])
    assert {(query.instruction, query.joint) for query in found} == {("Spell it backwards, please.", "\n\n")}
    assert [query.input for query in found] == [f"{word} is here" for word in WORDS]


def test_what_the_queries_end_with_alike_is_the_instruction() -> None:
    found = parts([f"The {word} is here.\nSay that in Spanish." for word in WORDS])
    assert {query.instruction for query in found} == {"Say that in Spanish."}
    assert found[0].mixed("Why?") == "The lamp is here.\nWhy?"


def test_a_task_may_have_several_instructions() -> None:
    found = parts([f"{ask} {word}" for word in WORDS for ask in ("Spell:", "Translate it. To Greek:")])
    assert {query.instruction for query in found} == {"Spell:", "Translate it. To Greek:"}


def test_the_longest_shared_beginning_counts() -> None:
    found = parts([f"Read this. Then answer.\n{word}" for word in WORDS])
    assert {query.instruction for query in found} == {"Read this. Then answer."}


def test_what_only_two_queries_share_is_input() -> None:
    found = parts(["Same start. one", "Same start. two", *WORDS])
    assert {query.instruction for query in found} == {""}
    assert [query.input for query in found][:2] == ["Same start. one", "Same start. two"]


def test_queries_without_anything_in_common_are_inputs() -> None:
    assert parts(WORDS) == [Query("", "", word) for word in WORDS]


def test_copies_of_one_query_have_an_input() -> None:
    assert all(query.input for query in parts(["Tell me. A joke."] * 9))


def test_parts_make_up_the_query() -> None:
    for task in demo_tasks(40, 4):
        for row, query in zip(task.train, parts([row["prompt"] for row in task.train]), strict=True):
            assert query.mixed(query.instruction) == row["prompt"] or not query.instruction


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_instructions_of_the_demo_tasks_are_found(number: int) -> None:
    task = demo_tasks(40, 4)[number]
    found = parts([row["prompt"] for row in task.train])
    for row, query in zip(task.train, found, strict=True):
        assert query.instruction.startswith(row["prompt"].split("\n")[0])


def test_an_input_without_instruction_gets_a_paragraph_of_its_own() -> None:
    assert Query("", "", "my parcel").mixed("Why is the sky blue?") == "Why is the sky blue?\n\nmy parcel"


def test_the_first_paragraph_of_a_query_is_its_instruction() -> None:
    assert instruction_of("  Sort these.\n- b\n- a") == "Sort these."


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("Translate the English sentence into Spanish, please.", True),
        ("Your job is to translate from English into Spanish.", True),
        ("Translate the following recipe into emoji for children.", False),
        ("Why is the sky blue?", False),
        ("", False),
    ],
)
def test_other_words_for_the_same_wish_are_near(text: str, near: bool) -> None:
    own = "You are given a sentence in English. Your job is to translate the English sentence into Spanish."
    assert is_near(text, [own]) is near


def test_nothing_is_near_a_task_without_instruction() -> None:
    assert not is_near("Anything at all", [])
