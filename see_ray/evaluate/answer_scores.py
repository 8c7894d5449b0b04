"""Score one answer from 0 to 1: four kinds of score, and which one a task is measured by.

    accuracy      the same label, ignoring case, spaces and a full stop
    exact_match   the same text, ignoring spaces around it
    token_f1      words shared with the reference, in any order
    rouge_l       words shared with the reference, in order: the longest common subsequence

The kind follows from a task's references (`kind_of`) unless the user names one. token_f1 and rouge_l are the ROUGE-1
and ROUGE-L F-measures of rouge-score without stemming. Its words are runs of a-z and 0-9, so these two are
of little use for texts in other scripts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

Scores = dict[str, dict[str, float]]
"""Mean score by task and kind."""
QueryScores = dict[str, dict[str, list[float]]]
"""Score of each test query, in order, by task and kind."""

KINDS = ("accuracy", "exact_match", "token_f1", "rouge_l")

MOST_LABELS = 10
"""Largest number of different labels."""
LONGEST_LABEL = 3
"""Words of the longest label."""
SHORT_ANSWER = 5
"""Largest median number of words of short answers."""


def kind_of(references: Sequence[str]) -> str:
    """The kind of score for a task with these references, by the first rule that applies:

    1. accuracy: a few labels. At most 10 different references of at most 3 words, each used twice on average.
    2. exact_match: data, not prose. Every reference is a JSON object or list, or at most half of it is letters.
    3. token_f1: short answers. The median reference has at most 5 words.
    4. rouge_l: everything else.
    """
    labels = {_plain(text) for text in references}
    lengths = sorted(len(text.split()) for text in references)
    if len(labels) <= min(MOST_LABELS, len(references) // 2) and lengths[-1] <= LONGEST_LABEL:
        return "accuracy"
    if all(map(_is_data, references)):
        return "exact_match"
    return "token_f1" if lengths[len(lengths) // 2] <= SHORT_ANSWER else "rouge_l"


def scores(answer: str, reference: str) -> dict[str, float]:
    """The score of one answer in every kind."""
    rouge = _rouge().score(reference, answer)
    return {
        "accuracy": float(_plain(answer) == _plain(reference)),
        "exact_match": float(answer.strip() == reference.strip()),
        "token_f1": rouge["rouge1"].fmeasure,
        "rouge_l": rouge["rougeL"].fmeasure,
    }


def scores_by_task(answered: Iterable[tuple[str, str, str]]) -> QueryScores:
    """The scores of (task, answer, reference) by task and kind, in the order given."""
    by_task: QueryScores = {}
    for task, answer, reference in answered:
        by_kind = by_task.setdefault(task, {kind: [] for kind in KINDS})
        for kind, score in scores(answer, reference).items():
            by_kind[kind].append(score)
    return by_task


def mean_scores(by_task: QueryScores) -> Scores:
    """The mean of each list of `scores_by_task`."""
    return {
        task: {kind: sum(values) / len(values) for kind, values in kinds.items()} for task, kinds in by_task.items()
    }


@functools.cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(".").casefold()


def _is_data(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict | list)
    except ValueError:
        characters = [character for character in text if not character.isspace()]
        return 2 * sum(character.isalpha() for character in characters) <= len(characters)
