"""How a long operation reports what it does: steps, notes and progress."""

from __future__ import annotations


class Listener:
    """Receives reports and ignores them; `TerminalListener` of the command line shows them."""

    def step(self, title: str) -> None:
        """A step begins.

        Args:
            title: what the step does, for the user.
        """

    def note(self, text: str) -> None:
        """A remark for the user, such as a warning."""

    def progress(self, title: str, done: int, total: int, detail: str = "") -> None:
        """Progress inside the current step.

        Args:
            title: what is counted.
            done: how many are done.
            total: how many there are.
            detail: more about the present state, such as the loss; may be empty.
        """
