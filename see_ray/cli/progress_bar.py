"""Progress of a long operation on stderr: one bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from see_ray.progress import Listener

PLAIN_EVERY_S = 10.0
"""Seconds between two lines about the same progress in a log."""


class TerminalListener(Listener):
    """Shows steps, notes and progress; leaves the terminal clean at the end of its `with` block.

    Thread-safe. On a terminal there is one bar at the bottom, and what is finished stays as a line above it. Elsewhere
    there are only lines: each step once, progress at most every `PLAIN_EVERY_S` seconds and at its end.

    Args:
        stream: where to write; stderr where None.
    """

    def __init__(self, stream: IO[str] | None = None):
        stream = stream or sys.stderr
        self._lock = threading.RLock()
        self._phase: _Phase | None = None
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        moving = stream.isatty() and self._console.is_terminal and not self._console.is_dumb_terminal
        self._bar = _Bar(self._console) if moving else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            self._end_phase()
            if self._bar:
                self._bar.stop()

    def step(self, title: str) -> None:
        """Begin a step: its title stays as a line."""
        with self._lock:
            self._end_phase()
            self._line(title)
            if self._bar:
                self._bar.restart("working")

    def note(self, text: str) -> None:
        """Print a line of its own."""
        with self._lock:
            self._line(f"  note: {text}")

    def progress(self, title: str, done: int, total: int, detail: str = "") -> None:
        """Report how far the step is; another title ends the progress before it."""
        with self._lock:
            if self._phase is None or self._phase.title != title:
                self._end_phase()
                self._phase = _Phase(title)
            phase = self._phase
            phase.done, phase.total, phase.detail = done, total, detail.strip(", ")
            if self._bar:
                self._bar.show(title, done, total if phase.is_counted() else None, phase.detail)
            elif phase.is_due():
                self._line(phase.line())

    def _end_phase(self) -> None:
        """Print a last line about the progress that ends, unless the line before it has the same count."""
        if self._phase and self._phase.is_news():
            self._line(self._phase.line())
        self._phase = None

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


@dataclass(eq=False)
class _Phase:
    """Progress under one title, and the last line of it in a log."""

    title: str
    done: int = 0
    total: int = 0
    detail: str = ""
    started: float = field(default_factory=time.monotonic)
    written: tuple[float, int] | None = None
    """When its last line was written, and `done` at that time."""

    def is_counted(self) -> bool:
        return self.total > 1  # of a single piece of work, such as starting workers, nothing is counted

    def is_due(self) -> bool:
        """Whether a log gets a line now: at the end, or when the last line is old."""
        if self.is_news() and self.done >= self.total:
            return True
        return time.monotonic() - (self.written[0] if self.written else self.started) >= PLAIN_EVERY_S

    def is_news(self) -> bool:
        return self.is_counted() and (self.written is None or self.written[1] != self.done)

    def line(self) -> str:
        now = time.monotonic()
        self.written = now, self.done
        count = f" {self.done}/{self.total}" if self.is_counted() else ""
        detail = f", {self.detail}" if self.detail else ""
        return f"  {self.title}{count}, {now - self.started:.0f} s{detail}"


class _Bar(Progress):
    """The one bar at the bottom of a terminal; it pulses where nothing is counted."""

    def __init__(self, console: Console):
        super().__init__(
            TextColumn("  {task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),  # `> file` keeps what a command prints
        )
        self._shown: tuple[str, int | None] | None = None
        self._id = TaskID(0)

    def restart(self, title: str) -> None:
        """Show a title without a count, with its clock at 0."""
        self._shown = None
        self.show(title)

    def show(self, title: str, done: int = 0, total: int | None = None, detail: str = "") -> None:
        """Show this progress in place of what was shown before; its clock starts with a new title or total."""
        count, detail = (f"{done}/{total}", f"left  {detail}") if total else ("", "")
        if self._shown != (title, total):
            for task in self.task_ids:
                self.remove_task(task)
            self._id = self.add_task(title, total=total, count=count, detail=detail)
            self._shown = title, total
            self.start()
        self.update(self._id, completed=done, count=count, detail=detail)
