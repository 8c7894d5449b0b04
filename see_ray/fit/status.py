"""The status of a running fit, from its workers to the driver.

    rank 0 ── StatusReporter ──► FitStatusActor ◄── polled by status_forwarded ──► FitListener

`TorchTrainer.fit` blocks the driver until the end, and a worker's memory is lost when it dies. So the status is in an
actor of its own.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from see_ray.errors import FitError, SeeError
from see_ray.fit.report import Progress

POLL_S = 0.5
"""Seconds between two polls of the actor."""


class FitListener:
    """Receives the status of a fit; this one ignores it."""

    def progress(self, progress: Progress) -> None:
        """The present phase, and how far it is."""

    def note(self, text: str) -> None:
        """A message for the user."""

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """Figures measured after a step, by name."""


class FitStatusActor:
    """A Ray actor that holds a fit's progress, notes, figures and failure, and counts failed starts.

    Args:
        max_failures: how often in a row workers may die without a new checkpoint in between.
    """

    def __init__(self, max_failures: int) -> None:
        self._progress = Progress("starting", 0, 1)
        self._notes: list[str] = []
        self._figures: list[tuple[int, dict[str, float]]] = []
        self._failure: SeeError | None = None
        self._max_failures = max_failures
        self._starts = 0

    def workers_started(self) -> None:
        """Count a start, the first one or one after workers died; too many in a row are a failure."""
        self._progress = Progress("starting", 0, 1)
        if self._starts > self._max_failures and self._failure is None:
            self._failure = FitError(
                f"workers died {self._starts} times in a row without a new checkpoint (fit.max_failures is "
                f"{self._max_failures}); if they ran out of memory, lower "
                "fit.max_tokens_per_micro_batch or fit.kv_store_gb; "
                "else see the workers' logs, and start the fit again: it continues from its last checkpoint"
            )
        if self._starts:
            self._notes.append("workers died; starting them again")
        self._starts += 1

    def checkpoint_saved(self) -> None:
        """There is a new checkpoint: start counting failures again."""
        self._starts = 1

    def set_progress(self, progress: Progress) -> None:
        self._progress = progress

    def add_note(self, note: str) -> None:
        self._notes.append(note)

    def add_figures(self, step: int, figures: dict[str, float]) -> None:
        self._figures.append((step, figures))

    def set_failure(self, error: SeeError) -> None:
        """Keep why the fit failed; the first reason counts."""
        self._failure = self._failure or error

    def drain(self) -> tuple[Progress, list[str], list[tuple[int, dict[str, float]]]]:
        """Progress, and the notes and figures since the last call."""
        drained = self._progress, self._notes, self._figures
        self._notes, self._figures = [], []
        return drained

    def failure(self) -> SeeError | None:
        return self._failure


class StatusReporter:
    """Sends a rank's status to the actor without waiting; only rank 0 sends.

    Args:
        actor: handle of `FitStatusActor`.
        rank: of this worker.
    """

    def __init__(self, actor: Any, rank: int):
        self._actor = actor if rank == 0 else None

    def progress(self, progress: Progress) -> None:
        if self._actor is not None:
            self._actor.set_progress.remote(progress)

    def note(self, text: str) -> None:
        if self._actor is not None:
            self._actor.add_note.remote(text)

    def figures(self, step: int, figures: dict[str, float]) -> None:
        if self._actor is not None:
            self._actor.add_figures.remote(step, figures)

    def checkpoint_saved(self) -> None:
        if self._actor is not None:
            self._actor.checkpoint_saved.remote()


@contextlib.contextmanager
def status_forwarded(actor: Any, needed: str, listener: FitListener) -> Iterator[None]:
    """Poll the actor in a thread while the block runs, and hand what is new to a listener.

    Args:
        actor: handle of `FitStatusActor`.
        needed: resources of the workers, as a person reads them while the workers are waiting for them.
        listener: called from that thread, and once more at the end from the caller's.
    """
    stop = threading.Event()

    def poll() -> None:
        while not stop.wait(POLL_S):
            _forward(actor, needed, listener)

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        _forward(actor, needed, listener)  # what came since the last poll


def _forward(actor: Any, needed: str, listener: FitListener) -> None:
    import ray

    # An actor that does not answer must not stop the fit, whose own result reports any failure.
    with contextlib.suppress(ray.exceptions.RayError):
        progress, notes, figures = ray.get(actor.drain.remote(), timeout=5)
        for note in notes:
            listener.note(note)
        for step, measured in figures:
            listener.figures(step, measured)
        if progress.phase == "starting":
            available = ray.available_resources()
            free = ", ".join(f"{available[kind]:g} {kind}" for kind in ("CPU", "GPU") if kind in available)
            progress = replace(progress, waiting=f"for {needed}, {free or 'nothing'} unreserved")
        listener.progress(progress)
