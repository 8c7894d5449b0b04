"""A candidate's decisions become a threshold and a verdict, the same for `see learn` and the comparison of methods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from see_ray.admission.calibrate import calibrate
from see_ray.admission.candidate import Candidate
from see_ray.config import GateConfig
from see_ray.data.reconstruct import Example, Kind, Reconstruction
from see_ray.data.rows import Row
from see_ray.fit.report import Comparison
from see_ray.models.base_model import BaseModel

OWN = [0.9, 0.95, 0.97, 0.99]
FOREIGN = [("general", 0.01), ("general", 0.02)]
RATE = 0.01
BASE = ("tiny", "f" * 64)
BETTER = Comparison(rows=4, expert_loss=0.5, generalist_loss=2.0, change=9.0, seconds=1.0)


@pytest.fixture
def candidate() -> Candidate:
    return Candidate(OWN, FOREIGN, {"sa": 0}, BETTER, BASE, RATE)


def test_a_fits_decisions_are_told_apart_by_the_kind_of_their_examples() -> None:
    row = (Row((("user", "q"),), "r", "sa:1"), [1])
    kinds: list[Kind] = ["general", "accept", "rehearsal", "accept"]
    held_out = [Example((number,), (0,), kind) for number, kind in enumerate(kinds)]
    foreign = [("general", [0]), ("sa", [2])]
    reconstruction = Reconstruction(
        train=[], own=[row, row], foreign=foreign, claimed={"sa": 1}, held_out=held_out, rehearsal=[]
    )
    base = BaseModel(BASE[0], Path("unused"), BASE[1])
    candidate = Candidate.from_fit(reconstruction, [0.1, 0.9, 0.2, 0.8], BETTER, base, RATE)
    assert candidate == Candidate([0.9, 0.8], [("general", 0.1), ("sa", 0.2)], {"sa": 1}, BETTER, BASE, RATE)


def test_its_threshold_is_the_calibrated_one(candidate: Candidate) -> None:
    assert candidate.calibration == calibrate(OWN, FOREIGN, RATE)


def test_newcomers_far_from_its_own_queries_change_little(candidate: Candidate) -> None:
    after = candidate.with_foreign([("new", 0.05)], {})
    assert after is not None
    assert after.calibration.own_accepted == 1.0
    assert after.calibration.threshold > 0.05


def test_newcomers_nearer_raise_the_threshold(candidate: Candidate) -> None:
    after = candidate.with_foreign([("new", 0.85)], {})
    assert after is not None
    assert after.calibration.threshold > max(0.85, candidate.calibration.threshold)


def test_it_must_be_fitted_again_if_it_takes_newcomers_for_its_own(candidate: Candidate) -> None:
    assert candidate.with_foreign([("new", 0.96)], {}) is None


def test_one_that_accepted_few_before_need_not_accept_more() -> None:
    weak = Candidate([0.1, 0.2, 0.97, 0.99], [("general", 0.9)], {}, BETTER, BASE, RATE)
    assert weak.calibration.own_accepted == 0.5
    assert weak.with_foreign([("new", 0.95)], {}) is not None
    assert weak.with_foreign([("new", 0.98)], {}) is None


def test_newcomers_count_in_the_verdict(candidate: Candidate) -> None:
    limits = GateConfig()
    assert candidate.judge(limits, BASE).passed
    after = candidate.with_foreign([("new", 0.05)], {"new": 40})
    assert after is not None
    assert after.claimed == {"sa": 0, "new": 40}
    assert [(f.limit, f.about) for f in after.judge(limits, BASE).findings if not f.passed] == [("taken", "new")]


def test_the_verdict_is_on_its_threshold_and_its_base_model(candidate: Candidate) -> None:
    weak = replace(candidate, own=[0.001] * 4)
    assert {f.limit for f in weak.judge(GateConfig(), BASE).findings if not f.passed} == {"own_accepted"}
    assert not candidate.judge(GateConfig(), ("other", "0" * 64)).passed
    assert candidate.judge(GateConfig()).passed
