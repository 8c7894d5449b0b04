"""Who is let in, who is refused, and how soon it is said to come again; time is a number here."""

from __future__ import annotations

import pytest

from see_ray.errors import RequestError
from see_ray.serving.admission_control import ALWAYS, AdmissionController


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def line(clock) -> AdmissionController:
    """A place costs half a second; a wait of 10 s is allowed."""
    line = AdmissionController(10, clock)
    for _ in range(20):
        with line.admit():
            clock.now += 0.5
    return line


def enter(line: AdmissionController, count: int) -> list:
    """Turns of that many who wait for as long as the list is kept."""
    turns = [line.admit() for _ in range(count)]
    for turn in turns:
        turn.__enter__()
    return turns


def test_a_place_costs_what_the_last_ones_took(line):
    assert line.seconds_per_position() == pytest.approx(0.5)


def test_a_place_costs_less_where_many_are_served_together(line, clock):
    for _ in range(2):
        turns = enter(line, 16)
        clock.now += 2
        for turn in turns:
            turn.__exit__(None, None, None)
    assert line.seconds_per_position() == pytest.approx(2 * 16 / sum(range(1, 17)))


def test_a_few_are_let_in_before_anything_is_known(clock):
    line = AdmissionController(10, clock)
    _kept = enter(line, ALWAYS)
    with pytest.raises(RequestError):
        enter(line, 1)


def test_as_many_wait_as_can_be_served_in_time(line):
    _kept = enter(line, 20)  # half a second each
    with pytest.raises(RequestError):
        enter(line, 1)


def test_a_refusal_is_a_429_that_says_when_to_come_again(line):
    _kept = enter(line, 20)
    with pytest.raises(RequestError) as refused, line.admit():
        pass
    assert (refused.value.status, refused.value.type) == (429, "rate_limit_error")
    assert refused.value.retry_after_s == 5  # half of the line is served by then


def test_a_few_are_always_let_in(clock):
    line = AdmissionController(0.001, clock)
    with line.admit():
        clock.now += 60
    assert len(enter(line, ALWAYS)) == ALWAYS


def test_one_served_makes_room_for_one(line, clock):
    turns = enter(line, 20)
    clock.now += 0.5
    turns.pop().__exit__(None, None, None)
    assert len(enter(line, 1)) == 1


def test_a_failure_leaves_the_line_and_tells_nothing(line, clock):
    turn = line.admit()
    turn.__enter__()
    clock.now += 60
    turn.__exit__(ValueError, ValueError(), None)
    assert line.waiting == 0
    assert line.seconds_per_position() == pytest.approx(0.5)


def test_idle_time_does_not_matter(line, clock):
    clock.now += 3600
    assert line.seconds_per_position() == pytest.approx(0.5)
