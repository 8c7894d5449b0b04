"""A comparison of methods: every method runs for real, parts are kept, and an interrupted run goes on."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from see_ray.errors import ConfigError
from see_ray.evaluate.baselines.compare import compare
from see_ray.evaluate.baselines.methods import METHODS
from see_ray.evaluate.baselines.plan import Plan
from see_ray.evaluate.baselines.routers import EMBEDDING_PACKAGE
from see_ray.progress import Listener

NEED_EMBEDDINGS = {"learned-router", "ssr"}
CHOSEN = [
    name for name in METHODS if name not in NEED_EMBEDDINGS or importlib.util.find_spec(EMBEDDING_PACKAGE) is not None
]
TASKS = ("tickets", "dates")


@pytest.fixture(scope="module")
def plan(general_file: Path) -> Any:
    settings = [
        "base_model.dtype=float32",
        f"reconstruct.general_negatives_file={general_file}",
        "reconstruct.general_negatives=8",
        "reconstruct.mixed_negatives=4",
        "gate.min_own_accepted=0",
        "fit.r=4",
        "fit.train_batch_size=4",
        "fit.num_train_epochs=1",
    ]
    return Plan(None, TASKS, (), 16, 4, 4, 6, "auto", tuple(settings))


def test_an_unknown_method_is_named_before_anything_begins(plan: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no method ewc; methods are generalist, oracle"):
        compare(plan, ["ewc"], [0], tmp_path, Listener())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def ran(plan: Any, ray_here: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A comparison that was interrupted after its first parts, and went on; the parts of the first half."""
    folder = tmp_path_factory.mktemp("compare")
    assert compare(plan, ["oracle"], [0], folder, Listener(), stop_after_s=0) is None
    first = {path: path.stat().st_mtime_ns for path in folder.rglob("parts/**/*.json")}
    assert first
    return compare(plan, CHOSEN, [0], folder, Listener()), folder, first


@pytest.mark.slow
def test_every_method_has_a_whole_matrix_and_its_cost(ran: Any) -> None:
    results, _, _ = ran
    assert [result.method for result in results] == CHOSEN
    for result in results:
        assert [len(row) for row in result.matrix] == [2, 2, 2]
        assert len(result.rows) == len(result.seconds) == 2
        assert result.matrix[0] == results[0].matrix[0]  # before the first task all are the generalist


@pytest.mark.slow
def test_rows_fitted_on_are_those_that_each_method_reads(ran: Any) -> None:
    rows = {result.method: result.rows for result in ran[0]}
    assert rows["generalist"] == [0, 0]
    assert rows["oracle"] == rows["sequential"] == [16, 16]
    assert rows["multitask"] == [16, 32]
    assert (rows["rehearsal-1"], rows["rehearsal-10"]) == ([16, 17], [16, 18])
    assert 16 + 8 < rows["see"][0] <= 16 + 8 + 4
    assert rows["see"] == rows["see-full"]


@pytest.mark.slow
def test_methods_share_the_fits_that_are_the_same(ran: Any) -> None:
    folders = [path.parent for path in ran[1].glob("*/adapters/*/fit_here.json")]
    # SSR's rows are what an adapter of one epoch writes; if that is nothing, its fit is the sequential one.
    ssr = any(result.rows[1] > 16 for result in ran[0] if result.method == "ssr")
    # Two of the oracle; one more each of sequential, both rehearsals and multitask; two of see in either form.
    assert len(folders) == 2 + 4 + ssr + 4


@pytest.mark.slow
def test_parts_of_an_interrupted_run_are_not_run_again(ran: Any) -> None:
    _, _, first = ran
    assert {path: path.stat().st_mtime_ns for path in first} == first


@pytest.mark.slow
def test_the_same_command_again_only_reads(ran: Any, plan: Any) -> None:
    results, folder, _ = ran
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
    again = compare(plan, CHOSEN, [0], folder, Listener())
    assert again is not None
    assert json.dumps([result.matrix for result in again]) == json.dumps([result.matrix for result in results])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")} == before


@pytest.mark.slow
def test_another_order_finds_the_fits_that_it_shares(ran: Any, plan: Any, tmp_path: Path) -> None:
    results, folder, _ = ran
    fits = set(folder.glob("*/adapters/*"))
    turned = dataclasses.replace(plan, tasks=TASKS[::-1])
    compared = compare(turned, ["oracle"], [0], tmp_path, Listener(), shared=folder)
    assert compared is not None
    after = {result.method: result for result in compared}
    assert fits
    assert set(folder.glob("*/adapters/*")) == fits
    before = {result.method: result for result in results}
    for task, at in zip(TASKS, (1, 0), strict=True):  # both orders end with the same two adapters
        assert after["oracle"].matrix[-1][at] == before["oracle"].matrix[-1][TASKS.index(task)]
