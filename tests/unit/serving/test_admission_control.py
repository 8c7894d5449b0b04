"""Which requests are admitted, which rejected, and when those are told to come back; the clock is a number."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest

from see_ray.errors import RequestError
from see_ray.serving.admission_control import ALWAYS_ADMITTED, AdmissionController


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
def controller(clock: Clock) -> AdmissionController:
    """A queue position costs half a second; a wait of 10 s is allowed."""
    controller = AdmissionController(10, clock)
    for _ in range(20):
        with controller.admit():
            clock.now += 0.5
    return controller


def enter(controller: AdmissionController, count: int) -> list[AbstractContextManager[None]]:
    """Admits that many requests, which wait for as long as the list is kept."""
    waiting: list[AbstractContextManager[None]] = [controller.admit() for _ in range(count)]
    for admission in waiting:
        admission.__enter__()
    return waiting


def test_a_position_costs_what_the_last_requests_took(controller: AdmissionController) -> None:
    assert controller.seconds_per_position() == pytest.approx(0.5)


def test_a_position_costs_less_where_many_are_served_together(controller: AdmissionController, clock: Clock) -> None:
    for _ in range(2):
        waiting = enter(controller, 16)
        clock.now += 2
        for admission in waiting:
            admission.__exit__(None, None, None)
    assert controller.seconds_per_position() == pytest.approx(2 * 16 / sum(range(1, 17)))


def test_a_few_are_admitted_before_any_was_served(clock: Clock) -> None:
    controller = AdmissionController(10, clock)
    _kept = enter(controller, ALWAYS_ADMITTED)
    with pytest.raises(RequestError):
        enter(controller, 1)


def test_as_many_are_admitted_as_can_be_served_in_time(controller: AdmissionController) -> None:
    _kept = enter(controller, 20)  # half a second each
    with pytest.raises(RequestError):
        enter(controller, 1)


def test_a_rejection_is_a_429_with_the_time_to_come_back(controller: AdmissionController) -> None:
    _kept = enter(controller, 20)
    with pytest.raises(RequestError) as refused, controller.admit():
        pass
    assert (refused.value.status, refused.value.type) == (429, "rate_limit_error")
    assert refused.value.retry_after_s == 5  # half of the queue is served by then


def test_a_few_are_always_admitted(clock: Clock) -> None:
    controller = AdmissionController(0.001, clock)
    with controller.admit():
        clock.now += 60
    assert len(enter(controller, ALWAYS_ADMITTED)) == ALWAYS_ADMITTED


def test_one_served_makes_room_for_one(controller: AdmissionController, clock: Clock) -> None:
    waiting = enter(controller, 20)
    clock.now += 0.5
    waiting.pop().__exit__(None, None, None)
    assert len(enter(controller, 1)) == 1


def test_a_failed_request_leaves_the_queue_and_is_no_sample(controller: AdmissionController, clock: Clock) -> None:
    admission = controller.admit()
    admission.__enter__()
    clock.now += 60
    admission.__exit__(ValueError, ValueError(), None)
    assert controller.waiting == 0
    assert controller.seconds_per_position() == pytest.approx(0.5)


def test_idle_time_does_not_matter(controller: AdmissionController, clock: Clock) -> None:
    clock.now += 3600
    assert controller.seconds_per_position() == pytest.approx(0.5)
