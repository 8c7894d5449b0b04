"""AR, BWT, FWT, confusion and ROC against numbers worked out by hand, and against scikit-learn."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from sklearn.metrics import confusion_matrix, roc_auc_score, roc_curve

from see_ray.evaluate.continual_metrics import (
    ar_over_time,
    bootstrap,
    confusion,
    continual,
    mean_and_spread,
    roc,
    share_right,
)

R = [
    [0.1, 0.2, 0.3],  # nothing learned
    [0.9, 0.3, 0.3],
    [0.7, 0.8, 0.1],
    [0.6, 0.9, 0.6],
]


def test_ar_is_the_mean_of_the_last_row() -> None:
    assert continual(R).ar == pytest.approx((0.6 + 0.9 + 0.6) / 3)


def test_bwt_is_what_later_tasks_gave_or_took() -> None:
    assert continual(R).bwt == pytest.approx(((0.6 - 0.9) + (0.9 - 0.8)) / 2)


def test_fwt_is_what_a_task_gained_before_it_was_learned() -> None:
    assert continual(R).fwt == pytest.approx(((0.3 - 0.2) + (0.1 - 0.3)) / 2)


def test_a_system_that_never_changes_forgets_and_gains_nothing() -> None:
    found = continual([[0.4, 0.5]] * 3)
    assert (found.bwt, found.fwt) == (0, 0)
    assert found.ar == pytest.approx(0.45)


def test_a_single_task_has_no_transfer() -> None:
    assert continual([[0.1], [0.9]]).bwt == 0


@pytest.mark.parametrize("wrong", [[], [[0.1]], [[0.1, 0.2], [0.1, 0.2]], [[0.1], [0.1, 0.2]]])
def test_a_matrix_of_another_shape_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"T \+ 1 rows of T scores"):
        continual(wrong)


def test_ar_over_time_counts_only_tasks_learned_so_far() -> None:
    assert ar_over_time(R) == pytest.approx([0.9, 0.75, 0.7])


def test_confusion_counts_as_scikit_learn_does() -> None:
    rng = random.Random(3)
    names = ["a", "b", "generalist"]
    pairs = [(rng.choice(names), rng.choice(names)) for _ in range(200)]
    theirs = confusion_matrix(*zip(*pairs, strict=True), labels=names)
    ours = confusion(pairs)
    assert [[ours[owner].get(who, 0) for who in names] for owner in names] == theirs.tolist()


def test_the_share_right_is_that_of_equal_pairs() -> None:
    assert share_right([("a", "a"), ("a", "b"), ("b", "b"), ("b", "generalist")]) == 0.5


@pytest.mark.parametrize("steps", [1000, 7])  # 7: many ties
def test_auroc_is_that_of_scikit_learn(steps: int) -> None:
    rng = random.Random(5)
    own = [round(rng.gauss(0.7, 0.3) * steps) / steps for _ in range(150)]
    foreign = [round(rng.gauss(0.2, 0.4) * steps) / steps for _ in range(90)]
    found = roc(own, foreign)
    labels = [1] * len(own) + [0] * len(foreign)
    assert found.auroc == pytest.approx(roc_auc_score(labels, own + foreign))
    false, true, _ = roc_curve(labels, own + foreign, drop_intermediate=False)
    assert found.false_accepts == pytest.approx(false.tolist())
    assert found.true_accepts == pytest.approx(true.tolist())


def test_auroc_by_hand() -> None:
    # Of the six pairs (own, foreign), own is higher in four, and one is a tie.
    assert roc([3, 2], [1, 2, 2.5]).auroc == pytest.approx((3 + 1 + 0.5) / 6)


def test_infinite_margins_are_the_first_and_the_last() -> None:
    """An empty sequence gives every query a margin of minus infinity, and a P(accept) of 1 one of plus infinity."""
    found = roc([math.inf, 0.5], [-math.inf, 0.5])
    assert found == roc([2.0, 1.0], [0.0, 1.0])
    assert found.auroc == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert (found.false_accepts, found.true_accepts) == ([0, 0, 0.5, 1], [0, 0.5, 1, 1])


def test_margins_that_are_all_alike_tell_nothing() -> None:
    assert roc([-math.inf] * 2, [-math.inf] * 3).auroc == 0.5


def test_a_roc_curve_needs_both_sides() -> None:
    with pytest.raises(ValueError, match="both sides"):
        roc([1.0], [])


def test_one_seed_has_no_spread_and_two_have_the_sample_deviation() -> None:
    assert mean_and_spread([0.5]) == (0.5, None)
    mean, spread = mean_and_spread([0.4, 0.6])
    assert mean == pytest.approx(0.5)
    assert spread == pytest.approx(0.1414, abs=1e-4)


def test_the_bootstrap_interval_is_the_normal_one_for_many_queries() -> None:
    draw = random.Random(0)
    by_task = [[draw.gauss(mean, spread) for _ in range(400)] for mean, spread in ((0.2, 0.1), (0.4, 0.3))]
    found = bootstrap(by_task)
    assert found.mean == pytest.approx(sum(sum(task) / 400 for task in by_task) / 2)
    half = 1.96 * (0.1**2 / 400 + 0.3**2 / 400) ** 0.5 / 2  # of the mean of two means
    assert found.low == pytest.approx(found.mean - half, abs=half / 5)
    assert found.high == pytest.approx(found.mean + half, abs=half / 5)


def test_the_bootstrap_draws_each_task_by_itself() -> None:
    found = bootstrap([[0.0] * 10, [1.0] * 30])  # queries of a task agree, so there is nothing to chance
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)
