"""Tracking: files that TensorBoard reads, an MLflow run, a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from see_ray.fit.report import FitSummary
from see_ray.fit.tracking import Tracker, draw_losses

FIGURES = [(1, {"train/loss": 2.0, "train/tokens_per_s": 100.0}), (2, {"train/loss": 1.0, "eval/own_accuracy": 0.5})]


def summary(**changes: Any) -> FitSummary:
    values = {
        "steps": 3,
        "examples": 4,
        "tokens": 9,
        "seconds": 1.0,
        "setup_seconds": 1.0,
        "tokens_per_s": 9.0,
        "first_loss": 2.0,
        "last_loss": 0.0,
        "losses": [2.0, 1.0, 0.0],
        "indicator_losses": [1.0, 0.5, 0.0],
        "response_losses": [1.0, 0.5, 0.0],
        "fewest_reads": 1,
        "most_reads": 1,
        "resumed": 0,
        "stopped_early": False,
        "evaluations": [{"step": 3, "own_accuracy": 1.0, "foreign_accuracy": 0.5, "response_loss": 0.1}],
        "kv_store_gb": 4.0,
        "kv_hit_rate": 1.0,
        "padding_share": 0.0,
        "memory_gb": 1.0,
        "workers": 1,
        "zero_stage": 2,
        "dtype": "float32",
    }
    return FitSummary(**{**values, **changes})


def test_tensorboard_reads_what_was_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    notes: list[str] = []
    with Tracker(tmp_path, "sa-1", {}, notes.append) as tracker:
        for step, figures in FIGURES:
            tracker.log(step, figures)
    read = EventAccumulator(str(tmp_path / "sa-1")).Reload()
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(1, 2.0), (2, 1.0)]
    assert [event.step for event in read.Scalars("eval/own_accuracy")] == [2]
    assert notes == [f"figures of this fit: tensorboard --logdir {tmp_path}"]


@pytest.mark.filterwarnings("ignore")  # MLflow's own
def test_mlflow_gets_a_run_with_parameters_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    notes: list[str] = []
    with Tracker(tmp_path / "board", "sa-1", {"r": 16}, notes.append) as tracker:
        for step, figures in FIGURES:
            tracker.log(step, figures)
    assert len(notes) == 1, notes
    run = mlflow.search_runs(experiment_names=["see_ray"], output_format="list")[0]
    assert (run.info.status, run.data.params["r"]) == ("FINISHED", "16")
    assert run.data.metrics["train.loss"] == 1.0


def test_a_fit_goes_on_where_mlflow_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "no-such-scheme://nowhere")
    notes: list[str] = []
    with Tracker(tmp_path, "sa-1", {}, notes.append) as tracker:
        tracker.log(*FIGURES[0])
    assert any("mlflow" in note.lower() for note in notes[1:])


@pytest.mark.parametrize("evaluations", [[], summary().evaluations], ids=["no evaluations", "evaluations"])
def test_the_losses_are_drawn(tmp_path: Path, evaluations: Any) -> None:
    draw_losses(summary(evaluations=evaluations), tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
