"""Rows that models write themselves: what is shown, what is kept."""

from __future__ import annotations

import importlib.util

import pytest

from see_ray.data.rows import Row
from see_ray.data.task import Task
from see_ray.evaluate.baselines import routers, ssr

INSTRUCTION = "Say whether the review is good.\nAnswer in one word.\n\n"


def task(instruction: str = INSTRUCTION) -> Task:
    rows = [Row((("user", f"{instruction}Review {number}"),), "good", f"r:{number}") for number in range(20)]
    return Task("reviews", tuple(rows), tuple(rows[:1]), ())


def test_the_instruction_is_what_all_begin_with_up_to_a_lines_end() -> None:
    assert ssr.common_start([row.prompt[-1][1] for row in task().train]) == INSTRUCTION
    assert ssr.common_start(["abc", "abd"]) == ""


@pytest.mark.skipif(
    importlib.util.find_spec(routers.EMBEDDING_PACKAGE) is None,
    reason="the embedding model is installed by make embeddings",
)
def test_the_instruction_is_shown_once_and_copied_to_what_is_written() -> None:
    asked: list[str] = []

    def write(contexts: list[str], seed: int) -> list[str]:
        asked.extend(contexts)
        return [f" Text {number}\n\nInput: another" for number in range(len(contexts))]

    found = ssr.synthesize_inputs(task(), 2, write, seed=0)
    assert len(asked) == 2 * ssr.OVERSAMPLING
    assert all(context.count("Answer in one word.") == 1 for context in asked)
    assert all(context.count("Input: Review") == ssr.SHOTS for context in asked)
    assert all(text.startswith(f"{INSTRUCTION}Text ") and "another" not in text for text in found)


def test_copies_of_shown_rows_and_of_each_other_are_dropped() -> None:
    found = ssr.synthesize_inputs(task(), 3, lambda contexts, seed: [" Review 1", " New", " New", ""] * 2, seed=0)
    assert found == [f"{INSTRUCTION}New"]


def test_rows_without_an_answer_are_dropped() -> None:
    rows = ssr.as_rows(["a", "b"], ["yes", " "], task())
    assert [(row.prompt, row.response) for row in rows] == [((("user", "a"),), "yes")]
