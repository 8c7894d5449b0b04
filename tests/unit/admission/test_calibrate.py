"""The accept threshold: how many foreign queries it lets in, and how many own ones it keeps."""

import itertools
import math
import random
from typing import Any

import pytest

from see_ray.admission.calibrate import HIGHEST, LOWEST, calibrate, wilson_upper

RATES = [0.001, 0.01, 0.05, 0.2, 0.5, 0.9]
SIZES = [1, 2, 7, 40, 99, 100, 101, 300]


def general(decisions: Any) -> Any:
    return [("general", p) for p in decisions]


def samples() -> Any:
    """Seeded (own, foreign, rate) of many sizes: apart, overlapping, with ties, in every part of 0 to 1."""
    for seed, size, rate in itertools.product(range(12), SIZES, RATES):
        draw = random.Random(f"{seed} {size} {rate}")
        digits = draw.choice([1, 2, 12])  # few digits make ties
        shapes = draw.choice([((8, 1), (1, 8)), ((2, 2), (1, 3)), ((0.3, 0.3), (0.3, 0.3)), ((1, 9), (1, 30))])
        own, foreign = (
            [min(round(draw.betavariate(*shape), digits), 0.995) for _ in range(count)]
            for shape, count in zip(shapes, (draw.choice(SIZES), size), strict=True)
        )
        yield own, foreign, rate


# --- separable samples ---------------------------------------------------------------------


def test_separable_samples_have_the_threshold_between_them() -> None:
    made = calibrate([0.9, 0.7, 0.95], general([0.1, 0.6, 0.3]), 0.01)
    assert 0.6 < made.threshold < 0.7
    assert (made.own_accepted, made.foreign_accepted) == (1.0, 0.0)


def test_the_threshold_is_two_thirds_up_the_gap_in_log_odds() -> None:
    # Odds 16 and 1/4, a factor of 64 apart: 4 is two thirds of the way up.
    assert calibrate([16 / 17], general([0.2]), 0.01).threshold == pytest.approx(0.8)


@pytest.mark.parametrize(("own", "foreign"), [(0.9, 0.01), (0.51, 0.001), (0.6, 0.3)])
def test_the_threshold_is_at_least_a_half_where_own_rows_allow(own: float, foreign: float) -> None:
    assert calibrate([own] * 5, general([foreign] * 5), 0.01).threshold == pytest.approx(0.5)


def test_the_threshold_is_below_a_half_where_own_rows_need_it() -> None:
    made = calibrate([0.3] * 5, general([0.06] * 5), 0.01)
    assert 0.06 < made.threshold < 0.3
    assert made.own_accepted == 1.0


def test_two_in_a_hundred_own_rows_may_be_given_up() -> None:
    own = [0.01, 0.02] + [0.9] * 98
    made = calibrate(own, general([0.3] * 100), 0.01)
    assert made.threshold >= 0.5
    assert made.own_accepted == 0.98


def test_a_third_low_own_row_in_a_hundred_counts() -> None:
    own = [0.01, 0.02, 0.35] + [0.9] * 97
    assert 0.3 < calibrate(own, general([0.3] * 100), 0.01).threshold < 0.35


# --- the false-accept rate -----------------------------------------------------------------


def test_never_more_foreign_are_accepted_than_the_rate_allows() -> None:
    for own, foreign, rate in samples():
        made = calibrate(own, general(foreign), rate)
        assert sum(p >= made.threshold for p in foreign) <= rate * len(foreign), (own, foreign, rate, made)


def test_every_threshold_of_separable_samples_keeps_all_own_rows_but_two_percent() -> None:
    separable = 0
    for own, foreign, rate in samples():
        if min(own) > max(LOWEST, *foreign):
            separable += 1
            assert calibrate(own, general(foreign), rate).own_accepted >= 0.98, (own, foreign, rate)
    assert separable > 20


def test_every_threshold_is_a_half_or_more_where_own_rows_allow() -> None:
    for own, foreign, rate in samples():
        if min(own) > 0.5:
            assert calibrate(own, general(foreign), rate).threshold >= 0.5, (own, foreign, rate)


def test_one_foreign_query_in_a_hundred_may_be_accepted_at_one_percent() -> None:
    made = calibrate([0.9] * 10, general([0.999] + [0.001] * 99), 0.01)
    assert made.threshold < 0.9
    assert (made.own_accepted, made.foreign_accepted) == (1.0, 0.01)


def test_no_foreign_query_in_ninety_nine_may_be_accepted_at_one_percent() -> None:
    made = calibrate([0.9] * 10, general([0.97] + [0.001] * 98), 0.01)
    assert (made.own_accepted, made.foreign_accepted) == (0.0, 0.0)


def test_overlapping_samples_give_up_own_rows_rather_than_take_foreign_ones() -> None:
    made = calibrate([0.2, 0.4, 0.8, 0.9], general([0.1, 0.6]), 0.01)
    assert made.threshold == pytest.approx(0.6)
    assert (made.own_accepted, made.foreign_accepted) == (0.5, 0.0)


def test_ties_at_the_barrier_are_all_refused() -> None:
    assert calibrate([0.9] * 20, general([0.9] * 10 + [0.1] * 90), 0.05).foreign_accepted == 0.0


def test_a_gap_as_narrow_as_floats_have_refuses_its_lower_end() -> None:
    draw = random.Random(0)
    for barrier in (draw.random() for _ in range(500)):
        made = calibrate([math.nextafter(barrier, 1.0)], general([barrier]), 0.01)
        assert made.foreign_accepted == 0.0, barrier


@pytest.mark.parametrize(("own", "foreign"), [(1.0, 1 - 1e-12), (1 - 1e-10, 1 - 1e-9)])
def test_decisions_next_to_one_can_be_told_apart(own: float, foreign: int) -> None:
    made = calibrate([own] * 5, general([foreign] * 5), 0.01)
    assert (made.own_accepted, made.foreign_accepted) == (1.0, 0.0)


def test_a_foreign_decision_of_one_is_refused() -> None:
    assert calibrate([1.0] * 5, general([1.0] * 5), 0.01).foreign_accepted == 0.0


# --- bounds and empty samples --------------------------------------------------------------


def test_a_threshold_keeps_its_lower_bound() -> None:
    assert calibrate([0.02] * 5, general([0.001] * 5), 0.01).threshold == LOWEST


def test_a_threshold_keeps_its_upper_bound_where_foreign_decisions_allow() -> None:
    assert calibrate([0.999999] * 5, general([0.9899] * 5), 0.01).threshold == HIGHEST


def test_a_threshold_goes_over_its_upper_bound_for_foreign_decisions_above_it() -> None:
    made = calibrate([0.999] * 5, general([0.996] * 5), 0.01)
    assert HIGHEST < made.threshold <= 0.999
    assert made.foreign_accepted == 0.0


def test_every_threshold_is_within_the_bounds_or_just_above_the_foreign_decisions() -> None:
    for own, foreign, rate in samples():
        threshold = calibrate(own, general(foreign), rate).threshold
        assert LOWEST <= threshold <= max(HIGHEST, math.nextafter(max(foreign), 1.0)), (own, foreign, rate)


def test_without_foreign_queries_the_threshold_is_a_half() -> None:
    made = calibrate([0.9, 0.2], [], 0.01)
    assert (made.threshold, made.own_accepted) == (0.5, 0.5)
    assert (made.foreign, made.foreign_accepted, made.foreign_bound, made.taken) == (0, 0.0, 1.0, {})


def test_without_own_rows_the_threshold_is_a_half() -> None:
    made = calibrate([], general([0.1, 0.2]), 0.01)
    assert (made.threshold, made.own, made.own_accepted) == (0.5, 0, 0.0)


# --- what is reported ----------------------------------------------------------------------


def test_accepted_foreign_queries_are_counted_by_where_they_come_from() -> None:
    foreign = [("general", 0.9), ("sa", 0.8), ("sa", 0.85), ("qa", 0.1), ("general", 0.2)]
    made = calibrate([0.7], foreign, 0.6)
    assert made.taken == {"general": 1, "sa": 2}
    assert made.foreign_accepted == pytest.approx(0.6)


def test_a_foreign_query_at_the_threshold_counts_as_accepted() -> None:
    made = calibrate([], general([0.5, 0.4]), 0.01)
    assert made.foreign_accepted == 0.5


def test_the_order_of_the_rows_does_not_matter() -> None:
    own, foreign = [0.3, 0.9, 0.6, 0.8], [0.1, 0.7, 0.2]
    assert calibrate(own[::-1], general(foreign[::-1]), 0.4) == calibrate(own, general(foreign), 0.4)


def test_the_metrics_name_both_shares_the_bound_and_the_sizes() -> None:
    made = calibrate([0.9] * 3 + [0.01], general([0.95] + [0.06] * 15), 0.1)
    assert made.metrics() == {
        "own_accepted": 0.75,
        "foreign_accepted": 1 / 16,
        "foreign_accepted_upper_95": wilson_upper(1, 16),
        "own_rows": 4,
        "foreign_rows": 16,
    }


# --- Wilson's interval ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hits", "n", "upper"),
    [(0, 16, 0.19361), (5, 100, 0.11175), (0, 100, 0.03699), (50, 100, 0.59617), (1, 2, 0.90547)],
)
def test_the_upper_end_has_its_published_values(hits: int, n: int, upper: float) -> None:
    assert wilson_upper(hits, n) == pytest.approx(upper, abs=2e-5)


def test_the_upper_end_is_where_the_score_test_just_rejects() -> None:
    for n in (2, 3, 16, 250, 10_000):
        for hits in {0, 1, n // 3, n - 1}:
            upper = wilson_upper(hits, n)
            assert hits / n < upper < 1
            assert (upper - hits / n) / math.sqrt(upper * (1 - upper) / n) == pytest.approx(1.96)


def test_the_upper_end_of_nothing_and_of_all_is_one() -> None:
    assert wilson_upper(0, 0) == wilson_upper(7, 7) == 1.0
