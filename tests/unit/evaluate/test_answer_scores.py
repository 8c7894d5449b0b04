"""Scores of single answers, and the kind that a task's references ask for."""

from __future__ import annotations

from typing import Any

import pytest

from see_ray.data.demo_tasks import demo_tasks
from see_ray.evaluate.answer_scores import KINDS, kind_of, mean_scores, scores, scores_by_task


def test_a_right_answer_has_the_full_score_in_every_kind() -> None:
    assert scores("It is late.", "It is late.") == dict.fromkeys(KINDS, 1.0)


def test_an_empty_answer_has_none() -> None:
    assert scores("", "It is late.") == dict.fromkeys(KINDS, 0.0)


def test_accuracy_forgives_capitals_spaces_and_a_full_stop_and_exact_match_does_not() -> None:
    found = scores(" positive.", "POSITIVE")
    assert (found["accuracy"], found["exact_match"]) == (1.0, 0.0)


def test_rouge_l_by_hand() -> None:
    # The longest common subsequence is "the cat sat": 3 of 4 words written, 3 of 6 wanted.
    found = scores("the cat sat quietly", "the cat has sat down now")
    precision, recall = 3 / 4, 3 / 6
    assert found["rouge_l"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_token_f1_does_not_mind_the_order() -> None:
    found = scores("sat cat the", "the cat sat")
    assert found["token_f1"] == 1.0
    assert found["rouge_l"] < 1.0


@pytest.mark.parametrize(
    ("references", "kind"),
    [
        (["positive", "negative"] * 4, "accuracy"),
        (["True.", "false", "true", "False"], "accuracy"),
        ([f"{number} rue de la Paix" for number in range(8)], "token_f1"),  # as many as rows: no labels
        (['{"name": "Ann"}', '{"name": "Bo"}', '["a", "b"]', "[1]"], "exact_match"),
        (["2024-03-07", "USD 1234.50", "EUR 12.00"], "exact_match"),
        (["Paris", "the Nile", "in 1912", "Ada Lovelace"], "token_f1"),
        (["Why did she leave the house so early?", "What is it that he wants to say?"], "rouge_l"),
    ],
)
def test_the_kind_follows_from_the_references(references: Any, kind: str) -> None:
    assert kind_of(references) == kind


def test_the_demo_tasks_are_scored_by_their_one_right_answer() -> None:
    kinds = {task.name: kind_of([row["response"] for row in task.test]) for task in demo_tasks(4, 16)}
    assert kinds == {"contacts": "exact_match", "dates": "exact_match", "tickets": "accuracy"}


def test_means_are_by_task() -> None:
    by_task = scores_by_task([("a", "x", "x"), ("a", "x", "y"), ("b", "y", "y")])
    assert (by_task["a"]["accuracy"], by_task["b"]["accuracy"]) == ([1.0, 0.0], [1.0])
    found = mean_scores(by_task)
    assert (found["a"]["accuracy"], found["b"]["accuracy"]) == (0.5, 1.0)
