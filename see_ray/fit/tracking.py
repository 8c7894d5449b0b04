"""Tracking of a fit: TensorBoard files, MLflow where its address is set, and a picture of the loss.

The figures arrive at the driver, so nothing here needs storage that all nodes share.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from see_ray.fit.report import FitSummary


class Tracker:
    """Writes the figures of one fit while it runs.

    Args:
        folder: gets a folder of TensorBoard files, named after the fit.
        name: of the fit; also the name of the MLflow run.
        settings: written once, for MLflow's parameters.
        note: hears where to look, and when a tracker does not answer.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any], note: Callable[[str], None]):
        from torch.utils.tensorboard import SummaryWriter

        self._note = note
        self._board = SummaryWriter(str(folder / name))
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
        except Exception as error:  # whatever the client raises: a fit does not stop for its tracker
            self._lost(error)

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Write what was measured after a step."""
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        if self._mlflow is not None:
            try:
                self._mlflow.log_metrics({name.replace("/", "."): value for name, value in figures.items()}, step=step)
            except Exception as error:
                self._lost(error)

    def _lost(self, error: Exception) -> None:
        self._mlflow = None
        self._note(f"MLflow at {os.environ['MLFLOW_TRACKING_URI']} does not take figures, going on without: {error}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._board.close()
        if self._mlflow is not None:
            self._mlflow.end_run("FINISHED" if error is None else "FAILED")


def draw_losses(summary: FitSummary, path: Path) -> None:
    """A picture of the losses over the steps, and of what the held-out rows showed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    steps = range(1, summary.steps + 1)
    left.plot(steps, _floored(summary.indicator_losses), label="indicator")
    left.plot(steps, _floored(summary.response_losses), label="response")
    looks = summary.evaluations
    if looks:
        left.plot(
            [e["step"] for e in looks], _floored([e["response_loss"] for e in looks]), "o", label="held-out response"
        )
        for share, label in (("own_accuracy", "own accepted"), ("foreign_accuracy", "foreign passed")):
            right.plot([e["step"] for e in looks], [e[share] for e in looks], "o-", label=label)
        right.legend()
    left.set(xlabel="step", ylabel="loss per token", yscale="log", title="loss")
    right.set(xlabel="step", ylabel="share", ylim=(-0.03, 1.03), title="held-out decisions at 0.5")
    left.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _floored(losses: Sequence[float]) -> list[float]:
    """What a logarithmic axis can show."""
    return [max(loss, 1e-5) for loss in losses]
