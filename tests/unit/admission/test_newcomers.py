"""Queries of experts that were published while a task was fitted."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from see_ray.admission import newcomers
from see_ray.data.reconstruct import Example, Reconstruction
from see_ray.store.records import ExpertRef, ExpertSequence


def test_newcomers_queries_that_are_rows_of_the_task_are_counted_and_are_not_foreign() -> None:
    own, passed = Example((1, 2), (8, 5), "accept"), Example((3, 4), (9,), "general")
    reconstruction = Reconstruction(train=[own, passed], own=[], foreign=[], claimed={}, held_out=[], rehearsal=[])
    queries = [("new", [1, 2]), ("new", [3, 4]), ("newer", [5, 6])]
    foreign, claimed = newcomers.split_claimed(queries, reconstruction)
    assert foreign == queries[1:]
    assert claimed == {"new": 1, "newer": 0}


def sequence(*refs: ExpertRef) -> ExpertSequence:
    return ExpertSequence(version=len(refs), experts=refs, created_at=datetime.now(UTC), change="publish")


def test_publishing_is_refused_exactly_while_there_are_newcomers() -> None:
    tickets, dates = ExpertRef(name="tickets", version=1), ExpertRef(name="dates", version=1)
    check = newcomers.refuse_newcomers(frozenset({tickets.id}), "other")
    check(sequence(tickets))
    with pytest.raises(newcomers.NewcomersError) as caught:
        check(sequence(tickets, dates))
    assert caught.value.refs == (dates,)
