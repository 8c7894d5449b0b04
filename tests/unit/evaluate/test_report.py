"""A summary becomes report.json, report.md and pictures that say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from see_ray.evaluate.report import CAPTIONS, write_report
from see_ray.evaluate.results import Result, summary

TASKS = ("sa", "pe")


def score(sa: float, pe: float) -> dict[str, dict[str, float]]:
    return {"sa": {"accuracy": sa, "rouge_l": 0.1}, "pe": {"accuracy": 0.2, "rouge_l": pe}}


def result(method: str, seed: int, last: float, **more: Any) -> Result:
    kinds = {"sa": "accuracy", "pe": "rouge_l"}
    scores = [score(0.2, 0.1), score(0.9, 0.1), score(last, 0.6)]
    return Result(method, seed, TASKS, kinds, scores, rows=[10, 20], seconds=[1.0, 3.0], **more)


ROUTED = {
    "routes": [("sa", "sa", "sa"), ("pe", "pe", "generalist"), ("generalist", "trec", "generalist"),
               ("generalist", "trec", "sa")],
    "margins": [2.0, -1.0, -2.0, 1.0],
    "decisions": {"sa": [0.9, 0.1, 0.1, 0.7], "pe": [0.1, 0.3, 0.2, 0.1]},
    "thresholds": {"sa": 0.5, "pe": 0.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("report")
    results = [result("see", seed, last, **ROUTED) for seed, last in ((0, 0.9), (1, 0.7))]
    results.append(result("sequential", 0, 0.4))
    text = write_report(summary(results), {"setting": "quick"}, folder)
    return folder, text, json.loads((folder / "report.json").read_text())


def test_r_is_made_of_each_tasks_kind_of_score() -> None:
    assert result("see", 0, 0.8).matrix == [[0.2, 0.1], [0.9, 0.1], [0.8, 0.6]]


def test_figures_are_means_over_seeds_with_their_spread(written: Any) -> None:
    found = written[2]["methods"]["see"]["figures"]
    assert found["ar"] == {"mean": pytest.approx((0.75 + 0.65) / 2), "spread": pytest.approx(0.0707, abs=1e-4)}
    assert found["bwt"]["mean"] == pytest.approx((0.0 - 0.2) / 2)
    assert written[2]["methods"]["sequential"]["figures"]["ar"] == {"mean": 0.5, "spread": None}


def test_routing_figures_tell_the_tasks_from_nobodys(written: Any) -> None:
    found = {key: value["mean"] for key, value in written[2]["methods"]["see"]["figures"].items()}
    assert (found["routing_accuracy"], found["own_to_generalist"]) == (0.5, 0.5)
    assert found["trec to generalist"] == 0.5
    assert found["auroc"] == 0.75  # of four pairs, -1 against 1 is the wrong way round
    assert "routing_accuracy" not in written[2]["methods"]["sequential"]["figures"]


def test_confusion_adds_up_over_seeds(written: Any) -> None:
    found = written[2]["methods"]["see"]["confusion"]
    assert found == {"sa": {"sa": 2}, "pe": {"generalist": 2}, "generalist": {"generalist": 2, "sa": 2}}


def test_the_page_says_what_the_json_says(written: Any) -> None:
    text = written[1]
    assert "| see | 2 | 70.0 ± 7.1 | -10.0 ± 14.1 | 0.0 ± 0.0 |" in text
    assert "| sequential | 1 | 50.0 | -50.0 | 0.0 |" in text
    assert "| pe | 0 | 0 | 2 |" in text
    assert "- setting: quick" in text
    assert "| at least 99 % of the tasks' queries reach their expert | 50.0 % | **no** |" in text
    assert (written[0] / "report.md").read_text() == text


def test_every_picture_is_drawn_and_shown(written: Any) -> None:
    for name in CAPTIONS:
        assert (written[0] / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in written[1]


def test_methods_that_route_nothing_need_no_routing_pictures(tmp_path: Path) -> None:
    text = write_report(summary([result("sequential", 0, 0.4)]), {}, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"matrix.png", "ar.png", "cost.png"}
    assert "## Routing" not in text


def query_scores(*sa: float) -> dict[str, dict[str, list[float]]]:
    return {"sa": {"accuracy": list(sa)}, "pe": {"rouge_l": [0.5] * len(sa)}}


def test_a_method_is_held_against_see_on_the_same_queries_and_seeds(tmp_path: Path) -> None:
    results = [
        result("see", 0, 0.9, **ROUTED, query_scores=query_scores(1, 0, 1, 1)),
        result("see", 1, 0.9, **ROUTED, query_scores=query_scores(1, 1, 1, 1)),
    ]
    results.append(result("sequential", 0, 0.4, query_scores=query_scores(0, 0, 0, 1)))
    found = summary(results)
    behind = found["methods"]["sequential"]["behind_see"]
    assert behind["mean"] == pytest.approx((2 / 4) / 2)  # of two tasks, one alike; seed 1 has nothing beside it
    assert behind["low"] == pytest.approx(0.0)
    assert behind["high"] == pytest.approx(0.5)
    assert "behind_see" not in found["methods"]["see"]
    text = write_report(found, {}, tmp_path)
    assert "| sequential | 1 | 50.0 | -50.0 | 0.0 | +25.0 (+0.0 to +50.0) |" in text
    assert "| see | 2 | 75.0 ± 0.0 | 0.0 ± 0.0 | 0.0 ± 0.0 | – |" in text
