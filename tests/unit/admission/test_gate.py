"""Each limit of the gate, on made-up decisions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from see_ray.admission.calibrate import calibrate
from see_ray.admission.gate import Evidence, judge
from see_ray.config import GateConfig
from see_ray.fit.report import Comparison

BASE = ("tiny", "f" * 64)
BETTER = Comparison(rows=32, expert_loss=0.5, generalist_loss=2.0, change=9.0, seconds=1.0)
LIMITS = GateConfig()


def evidence(
    own: Any, foreign: Any, *, claimed: Any = None, comparison: Any = BETTER, rate: Any = 0.01, live: Any = BASE
) -> Evidence:
    return Evidence(calibrate(own, foreign, rate), own, foreign, claimed or {}, comparison, BASE, live)


def good(**changes: Any) -> Evidence:
    """Of an expert that passes: far from 50 queries of sa, and from 20 general ones."""
    return evidence([0.99] * 40, [("sa", 0.01)] * 50 + [("general", 0.02)] * 20, **changes)


def failed(found: Evidence, limits: Any = LIMITS) -> list[tuple[str, str]]:
    return [(finding.limit, finding.about) for finding in judge(found, limits).findings if not finding.passed]


def test_an_expert_that_keeps_to_all_limits_passes() -> None:
    verdict = judge(good(), LIMITS)
    assert verdict.passed
    assert {finding.limit for finding in verdict.findings} == {"base_model", "taken", "own_accepted", "gain", "change"}


def test_the_first_expert_has_nobody_to_take_from() -> None:
    found = evidence([0.99] * 40, [("general", 0.02)] * 20, live=None)
    assert [finding.limit for finding in judge(found, LIMITS).findings].count("taken") == 0
    assert judge(found, LIMITS).passed


def test_an_expert_may_not_take_an_older_ones_queries() -> None:
    # A rate of 20 % lets them through: the gate looks at each older expert apart.
    foreign = [("sa", 0.99)] * 10 + [("sa", 0.01)] * 40 + [("general", 0.01)] * 50
    found = evidence([0.99] * 40, foreign, rate=0.2)
    assert failed(found) == [("taken", "sa")]
    (sentence,) = judge(found, LIMITS).failed
    assert "20 % of sa's 50 kept queries (at most 5 %" in sentence


def test_of_few_kept_queries_a_single_one_may_be_taken() -> None:
    foreign = [("sa", 0.99)] + [("sa", 0.01)] * 7 + [("general", 0.01)] * 92
    assert failed(evidence([0.999] * 40, foreign, rate=0.05)) == []


def test_rows_that_an_older_expert_has_kept_count_as_taken() -> None:
    assert failed(good(claimed={"sa": 40})) == [("taken", "sa")]
    assert "40 of them are rows of this task, too" in judge(good(claimed={"sa": 40}), LIMITS).failed[0]


def test_an_expert_that_cannot_tell_its_own_queries_from_foreign_ones_fails() -> None:
    own = [0.9 + 0.002 * number for number in range(40)]
    found = evidence(own, [("sa", p) for p in own] + [("general", 0.01)] * 20)
    assert failed(found) == [("own_accepted", "")]
    assert "75 % of sa's queries" in judge(found, LIMITS).failed[0]


def test_an_over_accepting_expert_is_told_what_it_takes() -> None:
    found = evidence([0.99] * 40, [("general", 0.99)] * 20 + [("mixed", 0.995)] * 8)
    assert failed(found) == [("own_accepted", "")]
    assert "100 % of the general queries, 100 % of the mixed queries" in judge(found, LIMITS).failed[0]


@pytest.mark.parametrize(("loss", "passes"), [(1.98, True), (2.0, False), (3.0, False)])
def test_an_expert_must_be_better_than_the_generalist(loss: float, passes: bool) -> None:
    found = good(comparison=replace(BETTER, expert_loss=loss))
    assert failed(found) == ([] if passes else [("gain", "")])


def test_a_null_adapter_fails() -> None:
    found = good(comparison=replace(BETTER, expert_loss=2.0, change=1e-6))
    assert failed(found) == [("gain", ""), ("change", "")]
    assert "it is null" in judge(found, LIMITS).failed[1]


def test_an_expert_for_another_base_model_fails() -> None:
    found = good(live=("other", "0" * 64))
    assert failed(found) == [("base_model", "")]
    assert "but the live experts to other (000000000000)" in judge(found, LIMITS).failed[0]


@pytest.mark.parametrize(
    ("limits", "found"),
    [
        ({"max_taken": 1.0}, {"claimed": {"sa": 40}}),
        ({"min_gain": -9.0}, {"comparison": replace(BETTER, expert_loss=3.0)}),
        ({"min_change": 0.0}, {"comparison": replace(BETTER, change=0.0)}),
    ],
)
def test_limits_are_settings(limits: dict[str, Any], found: dict[str, Any]) -> None:
    assert failed(good(**found))
    assert not failed(good(**found), GateConfig(**limits))


def test_the_report_is_for_programs_and_for_people(tmp_path: Path) -> None:
    verdict = judge(good(claimed={"sa": 40}), LIMITS)
    verdict.write(tmp_path)
    report = json.loads((tmp_path / "gate.json").read_text())
    assert report["passed"] is False
    assert [(f["limit"], f["found"], f["allowed"]) for f in report["findings"] if not f["passed"]] == [
        ("taken", pytest.approx(40 / 90), 0.05)
    ]
    text = (tmp_path / "gate.md").read_text()
    assert f"- **failed**: {verdict.failed[0]}" in text
    assert text.count("- kept: ") == len(report["findings"]) - 1
