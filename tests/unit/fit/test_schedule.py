"""Who reads which example when, over many sizes: of the task, of a step, and of the cluster."""

import itertools
import random
from collections import Counter
from typing import Any

import pytest

from see_ray.config import FitConfig
from see_ray.fit.schedule import PREFILL_TOKENS, Schedule

NUMBERS = [1, 2, 3, 5, 8, 13, 29, 64]
BATCHES = [1, 2, 3, 8, 16]
WORLD_SIZES = [1, 2, 3, 4, 7, 8, 20]
SIZES = list(itertools.product(NUMBERS, BATCHES, WORLD_SIZES))


def schedule(n: Any, batch: Any = 8, world_size: Any = 1, epochs: Any = 1, seed: Any = 0, lengths: Any = None) -> Any:
    config = FitConfig(train_batch_size=batch, num_train_epochs=epochs, seed=seed)
    return Schedule(lengths or [10] * n, config, world_size)


def epochs_of(made: Any, epochs: Any) -> Any:
    """The steps of each epoch, as a list of lists."""
    steps = list(made)
    length = len(steps) // epochs
    return [steps[start : start + length] for start in range(0, len(steps), length)]


def varied(n: Any, seed: Any = 0) -> Any:
    """Prefix lengths from a few tokens to more than a batch holds."""
    draw = random.Random(seed)
    return [draw.choice([3, 17, 17, 200, 700, 1500, 3000]) for _ in range(n)]


# --- every example, once an epoch ----------------------------------------------------------


def test_each_example_is_read_exactly_once_an_epoch() -> None:
    for n, batch, world_size in SIZES:
        for steps in epochs_of(schedule(n, batch, world_size, epochs=3), 3):
            read = Counter(number for step in steps for number in step)
            assert read == Counter(range(n)), (n, batch, world_size)


def test_steps_is_the_number_of_steps_given() -> None:
    for n, batch, world_size in SIZES:
        made = schedule(n, batch, world_size, epochs=2)
        assert made.steps == len(list(made)), (n, batch, world_size)


def test_no_step_is_empty() -> None:
    for n, batch, world_size in SIZES:
        assert all(schedule(n, batch, world_size)), (n, batch, world_size)


def test_every_step_but_the_last_of_an_epoch_has_the_batch_size() -> None:
    for n, batch, world_size in SIZES:
        if world_size <= batch:
            *full, last = schedule(n, batch, world_size)
            assert all(len(step) == batch for step in full), (n, batch, world_size)
            assert len(last) == (n % batch or batch), (n, batch, world_size)


def test_it_can_be_iterated_again() -> None:
    made = schedule(29, batch=8, world_size=2, epochs=2)
    assert list(made) == list(made)


# --- any number of workers -----------------------------------------------------------------


def test_steps_are_the_same_on_any_number_of_workers() -> None:
    for n, batch in itertools.product(NUMBERS, BATCHES):
        alone = list(schedule(n, batch, 1, epochs=2))
        for world_size in WORLD_SIZES:
            if world_size <= batch:
                assert list(schedule(n, batch, world_size, epochs=2)) == alone, (n, batch, world_size)


def test_the_workers_shares_are_disjoint_and_make_up_the_step() -> None:
    for n, batch, world_size in SIZES:
        made = schedule(n, batch, world_size, epochs=2)
        for step in made:
            shares = [number for rank in range(world_size) for number in made.part(step, rank)]
            assert sorted(shares) == sorted(step), (n, batch, world_size)


def test_the_workers_shares_differ_by_at_most_one() -> None:
    for n, batch, world_size in SIZES:
        made = schedule(n, batch, world_size, epochs=2)
        for step in made:
            sizes = [len(made.part(step, rank)) for rank in range(world_size)]
            assert max(sizes) - min(sizes) <= 1, (n, batch, world_size, sizes)


def test_an_example_stays_with_its_worker_in_every_epoch() -> None:
    for n, batch, world_size in SIZES:
        made = schedule(n, batch, world_size, epochs=4)
        workers = {(number, rank) for step in made for rank in range(world_size) for number in made.part(step, rank)}
        assert len(workers) == n, (n, batch, world_size)


def test_more_workers_than_places_change_nothing_about_the_steps() -> None:
    few, many = schedule(64, batch=3, world_size=1), schedule(64, batch=3, world_size=20)
    assert list(few) == list(many)
    assert sum(bool(many.part(next(iter(many)), rank)) for rank in range(20)) == 3


def test_a_worker_stands_in_with_an_example_of_its_own() -> None:
    for n, batch, world_size in SIZES:
        made = schedule(n, batch, world_size)
        for rank in range(world_size):
            owned = [number for step in made for number in made.part(step, rank)]
            assert made.stand_in(rank) in (owned or range(n)), (n, batch, world_size, rank)


# --- order ---------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_steps() -> None:
    assert list(schedule(64, epochs=2, seed=5)) == list(schedule(64, epochs=2, seed=5))


def test_another_seed_gives_another_order() -> None:
    assert list(schedule(64, seed=5)) != list(schedule(64, seed=6))


def test_another_seed_deals_examples_to_steps_otherwise() -> None:
    steps = [{frozenset(step) for step in schedule(64, seed=seed)} for seed in (5, 6)]
    assert not steps[0] & steps[1]


def test_every_epoch_has_another_order() -> None:
    first, second, third = epochs_of(schedule(64, epochs=3), 3)
    assert first != second != third != first


def test_the_examples_are_not_read_in_the_order_given() -> None:
    assert [number for step in schedule(64) for number in step] != list(range(64))


def test_the_global_random_state_is_left_alone() -> None:
    random.seed(1)
    before = random.getstate()
    list(schedule(29, world_size=2, epochs=2))
    assert random.getstate() == before


# --- prefixes read ahead -------------------------------------------------------------------


def test_with_room_for_all_each_worker_reads_ahead_all_it_owns_once() -> None:
    for n, batch, world_size in SIZES:
        made = schedule(n, batch, world_size, lengths=varied(n))
        for rank in range(world_size):
            owned = [number for step in made for number in made.part(step, rank)]
            ahead = [number for group in made.prefill_batches(rank, 10**9) for number in group]
            assert sorted(ahead) == sorted(owned), (n, batch, world_size, rank)


@pytest.mark.parametrize("budget", [0, 2, 3, 20, 500, 5000, 40_000])
def test_what_is_read_ahead_fits_the_budget(budget: int) -> None:
    lengths = varied(64)
    for rank in range(3):
        groups = schedule(64, world_size=3, lengths=lengths).prefill_batches(rank, budget)
        assert sum(lengths[number] for group in groups for number in group) <= budget


@pytest.mark.parametrize("budget", [3, 20, 500, 5000, 40_000])
def test_the_budget_is_used_until_the_next_shortest_does_not_fit(budget: int) -> None:
    lengths = varied(64)
    made = schedule(64, world_size=3, lengths=lengths)
    for rank in range(3):
        ahead = [number for group in made.prefill_batches(rank, budget) for number in group]
        left = [number for step in made for number in made.part(step, rank) if number not in ahead]
        kept = sum(lengths[number] for number in ahead)
        assert not left or kept + min(lengths[number] for number in left) > budget


def test_the_shortest_prefixes_are_read_ahead_first() -> None:
    lengths = varied(64)
    made = schedule(64, world_size=3, lengths=lengths)
    for rank in range(3):
        order = [lengths[number] for group in made.prefill_batches(rank, 20_000) for number in group]
        owned = sorted(lengths[number] for step in made for number in made.part(step, rank))
        assert order == owned[: len(order)]


def test_a_prefix_that_fills_the_budget_exactly_is_kept() -> None:
    (group,) = schedule(3, lengths=[5, 5, 5]).prefill_batches(0, 15)
    assert sorted(group) == [0, 1, 2]


def test_a_batch_with_its_padding_is_bounded() -> None:
    lengths = varied(200, seed=1)
    for group in schedule(200, lengths=lengths).prefill_batches(0, 10**9):
        padded = len(group) * max(lengths[number] for number in group)
        assert padded <= PREFILL_TOKENS or len(group) == 1


def test_a_batch_is_closed_only_when_the_next_prefix_does_not_fit() -> None:
    lengths = varied(200, seed=1)
    groups = schedule(200, lengths=lengths).prefill_batches(0, 10**9)
    for group, following in itertools.pairwise(groups):
        assert (len(group) + 1) * lengths[following[0]] > PREFILL_TOKENS


def test_a_prefix_longer_than_a_batch_is_read_alone() -> None:
    assert schedule(2, lengths=[PREFILL_TOKENS + 1] * 2).prefill_batches(0, 10**9) in ([[0], [1]], [[1], [0]])
