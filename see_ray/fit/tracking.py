"""Tracking of a fit: TensorBoard files, MLflow where `$MLFLOW_TRACKING_URI` is set, and a plot of the losses.

It runs on the driver, so it needs no storage that all nodes share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from see_ray.fit.report import FitSummary


class Tracker:
    """Writes what is measured during one fit; a context manager.

    Args:
        folder: gets a folder of TensorBoard files, named after the fit.
        name: of the fit; also the name of the MLflow run.
        settings: become the parameters of the MLflow run.
        note: called with a message where to look, or that MLflow does not answer.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any], note: Callable[[str], None]):
        from torch.utils.tensorboard import SummaryWriter

        self._note = note
        self._summary_writer = SummaryWriter(str(folder / name))
        note(f"figures of this fit: tensorboard --logdir {folder}")
        self._mlflow: Any = None
        if os.environ.get("MLFLOW_TRACKING_URI"):
            self._start_mlflow(name, settings)

    def _start_mlflow(self, name: str, settings: dict[str, Any]) -> None:
        try:
            import mlflow
        except ImportError:
            self._note("MLFLOW_TRACKING_URI is set, but mlflow is not installed: pip install 'see_ray[tracking]'")
            return
        try:
            mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "see_ray"))
            mlflow.start_run(run_name=name)
            mlflow.log_params({key: str(value)[:500] for key, value in settings.items()})
            self._mlflow = mlflow
        except Exception as error:  # whatever the client raises: tracking does not stop a fit
            self._disable_mlflow(error)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Write what was measured after a step."""
        for name, value in figures.items():
            self._summary_writer.add_scalar(name, value, step)
        if self._mlflow is not None:
            try:
                self._mlflow.log_metrics({name.replace("/", "."): value for name, value in figures.items()}, step=step)
            except Exception as error:
                self._disable_mlflow(error)

    def _disable_mlflow(self, error: Exception) -> None:
        self._mlflow = None
        address = os.environ["MLFLOW_TRACKING_URI"]
        self._note(f"MLflow at {address} does not accept figures; the fit continues without it: {error}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._summary_writer.close()
        if self._mlflow is not None:
            self._mlflow.end_run("FINISHED" if error is None else "FAILED")


def draw_losses(summary: FitSummary, path: Path) -> None:
    """Plot the losses over the steps, and the decisions on held-out rows, to an image file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = range(1, summary.steps + 1)
    left.plot(steps, _floored(summary.indicator_losses), label="indicator")
    left.plot(steps, _floored(summary.response_losses), label="response")
    if evaluations := summary.evaluations:
        evaluated = [e["step"] for e in evaluations]
        left.plot(evaluated, _floored([e["response_loss"] for e in evaluations]), "o", label="held-out response")
        for key, label in (("own_accuracy", "own accepted"), ("foreign_accuracy", "foreign passed")):
            right.plot(evaluated, [e[key] for e in evaluations], "o-", label=label)
        right.legend()
    left.set(xlabel="step", ylabel="loss per token", yscale="log", title="loss")
    right.set(xlabel="step", ylabel="share", ylim=(-0.03, 1.03), title="held-out decisions at 0.5")
    left.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _floored(losses: Sequence[float]) -> list[float]:
    """Losses as a logarithmic axis can show them."""
    return [max(loss, 1e-5) for loss in losses]
