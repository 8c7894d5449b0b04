"""Forwards a fit's status to the listener of `learn`, to the tracker and to Prometheus metrics."""

from __future__ import annotations

from see_ray.fit.report import Progress
from see_ray.fit.status import FitListener
from see_ray.fit.tracking import Tracker
from see_ray.observability import metrics
from see_ray.progress import Listener

PHASE_TITLES = {
    "starting": "starting workers",
    "prefix": "reading prefixes",
    "held-out": "deciding on held-out queries",
    "saving": "saving the adapter",
}


class ProgressBridge(FitListener):
    """Hands on progress and notes to a listener, figures to a tracker, and sets the gauges of a fit.

    Args:
        listener: of the whole pipeline.
        tracker: of this fit.
        task: name of the arriving task, the label of the metrics.
    """

    def __init__(self, listener: Listener, tracker: Tracker, task: str):
        self._listener, self._tracker, self._task = listener, tracker, task

    def progress(self, progress: Progress) -> None:
        if progress.phase != "fit":
            title = PHASE_TITLES[progress.phase]
            self._listener.progress(title, progress.done, progress.total, progress.waiting)
            return
        metrics.set_gauge("see_fit_progress_ratio", progress.done / max(1, progress.total), task=self._task)
        loss = rate = ""
        if progress.loss is not None:
            metrics.set_gauge("see_fit_loss", progress.loss, task=self._task)
            loss = f"loss {progress.loss:.3f}"
        if progress.tokens_per_s is not None:
            metrics.set_gauge("see_fit_tokens_per_second", progress.tokens_per_s, task=self._task)
            rate = f"{progress.tokens_per_s:.0f} tokens/s"
        self._listener.progress("fitting", progress.done, progress.total, f"{loss}, {rate}")

    def note(self, text: str) -> None:
        self._listener.note(text)

    def figures(self, step: int, figures: dict[str, float]) -> None:
        self._tracker.log(step, figures)
