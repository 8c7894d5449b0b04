"""How good one answer is: four kinds of score from 0 to 1, and which one a task takes.

    accuracy      the right label, apart from capitals, spaces and a full stop
    exact_match   the right text, apart from spaces around it
    token_f1      words shared with the reference, in any order
    rouge_l       words shared with the reference, in order: the longest common subsequence

The kind follows from a task's references (`kind_of`), unless somebody names one. token_f1 and rouge_l are
rouge-score's ROUGE-1 and ROUGE-L F-measures without stemming; its words are runs of a-z and 0-9, so they
say little about other scripts.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KINDS = ("accuracy", "exact_match", "token_f1", "rouge_l")

MOST_LABELS = 10
LONGEST_LABEL = 3
"""Words of a label."""
SHORT_ANSWER = 5
"""Words, in the median, up to which an answer counts as short."""


def kind_of(references: Sequence[str]) -> str:
    """The kind of score for a task with these references, by the first rule that holds:

    1. accuracy: a few labels. At most 10 different references of at most 3 words, each there twice on average.
    2. exact_match: data, not prose. Every reference is a JSON object or list, or at most half letters.
    3. token_f1: short answers. The median reference has at most 5 words.
    4. rouge_l: everything else.
    """
    different = {_plain(text) for text in references}
    lengths = sorted(len(text.split()) for text in references)
    if len(different) <= min(MOST_LABELS, len(references) // 2) and lengths[-1] <= LONGEST_LABEL:
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


def each_score(answered: Iterable[tuple[str, str, str]]) -> dict[str, dict[str, list[float]]]:
    """The scores of (task, answer, reference) by task and kind, in the order given."""
    found: dict[str, dict[str, list[float]]] = {}
    for task, answer, reference in answered:
        lists = found.setdefault(task, {kind: [] for kind in KINDS})
        for kind, score in scores(answer, reference).items():
            lists[kind].append(score)
    return found


def mean_scores(each: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[str, float]]:
    """Means of `each_score`."""
    return {task: {kind: sum(some) / len(some) for kind, some in kinds.items()} for task, kinds in each.items()}


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
        seen = [character for character in text if not character.isspace()]
        return 2 * sum(character.isalpha() for character in seen) <= len(seen)
