"""How a long operation reports what it does: steps, notes and progress."""

from __future__ import annotations


class Listener:
    """Receives reports and ignores them; `TerminalListener` of the command line shows them."""

    def step(self, title: str) -> None:
        """A step begins; `title` says what it does."""

    def note(self, text: str) -> None:
        """A remark for the user, such as a warning."""

    def progress(self, title: str, done: int, total: int, detail: str = "") -> None:
        """Progress inside the current step: `done` of `total`."""
