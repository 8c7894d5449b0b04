"""The status of a fit: what the actor keeps between workers and driver."""

from __future__ import annotations

from see_ray.errors import FitError
from see_ray.fit.report import Progress
from see_ray.fit.status import FitStatusActor


def test_notes_and_figures_are_drained_once_and_progress_stays() -> None:
    actor = FitStatusActor(3)
    actor.set_progress(Progress("fit", 1, 2))
    actor.add_note("a note")
    actor.add_figures(1, {"train/loss": 2.0})
    assert actor.drain() == (Progress("fit", 1, 2), ["a note"], [(1, {"train/loss": 2.0})])
    assert actor.drain() == (Progress("fit", 1, 2), [], [])


def test_workers_may_die_max_failures_times_in_a_row() -> None:
    actor = FitStatusActor(2)
    for _ in range(3):
        actor.workers_started()
        assert actor.failure() is None
    actor.workers_started()
    assert "died 3 times in a row" in str(actor.failure())
    assert actor.drain()[1] == ["workers died; starting them again"] * 3


def test_failures_before_a_checkpoint_do_not_count() -> None:
    actor = FitStatusActor(1)
    for _ in range(5):
        actor.workers_started()
        actor.checkpoint_saved()
        assert actor.failure() is None


def test_the_first_failure_is_kept() -> None:
    actor = FitStatusActor(0)
    first = FitError("first")
    actor.set_failure(first)
    actor.set_failure(FitError("second"))
    assert actor.failure() is first
