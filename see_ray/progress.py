"""What a long operation reports while it runs: steps, progress and notes."""

from __future__ import annotations


class Listener:
    """Is told how learning goes; this one ignores it. The command line has one that draws."""

    def step(self, title: str) -> None:
        """A step begins."""

    def note(self, text: str) -> None:
        """Something a person should know."""

    def progress(self, title: str, done: int, total: int, detail: str = "") -> None:
        """How far the step is."""
