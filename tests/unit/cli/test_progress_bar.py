"""What a terminal and a log see of long work."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import threading
import time
from collections.abc import Callable

import pytest

from see_ray.cli import progress_bar


def play(listener: progress_bar.TerminalListener) -> None:
    with listener:
        listener.step("Reading [the] task")
        listener.note("dropped 3 exact duplicates")
        listener.step("Fitting sa")
        listener.progress("starting workers", 0, 1)
        for done in range(4):
            listener.progress("fitting", done, 3, f"loss {1 - done / 10:.1f}, ")
        listener.progress("fitting", 3, 3, "loss 0.7")
        listener.step("Publishing")


def test_a_log_has_each_step_once_and_the_end_of_each_progress() -> None:
    log = io.StringIO()
    play(progress_bar.TerminalListener(log))
    assert log.getvalue().splitlines() == [
        "Reading [the] task",
        "  note: dropped 3 exact duplicates",
        "Fitting sa",
        "  fitting 3/3, 0 s, loss 0.7",
        "Publishing",
    ]


def test_a_log_tells_of_progress_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "PLAIN_EVERY_S", 0.05)
    log, begun = io.StringIO(), time.monotonic()
    with progress_bar.TerminalListener(log) as listener:
        for done in range(100):
            listener.progress("fitting", done, 100)
            time.sleep(0.002)
    lines = log.getvalue().splitlines()
    assert 2 <= len(lines) <= (time.monotonic() - begun) / 0.05 + 1
    assert lines[-1].startswith("  fitting 99/100, ")  # where it stood when it ended


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[progress_bar.TerminalListener], None]], str]:
    """Gives what a terminal got from a listener that was used in some way."""
    monkeypatch.setenv("TERM", "xterm-256color")

    def show(use: Callable[[progress_bar.TerminalListener], None]) -> str:
        controller, worker = pty.openpty()
        shown = bytearray()

        def read() -> None:
            with contextlib.suppress(OSError):  # the other end is closed
                while part := os.read(controller, 4096):
                    shown.extend(part)

        reader = threading.Thread(target=read)
        reader.start()
        with os.fdopen(worker, "w") as stream:
            use(progress_bar.TerminalListener(stream))
        reader.join()
        os.close(controller)
        return shown.decode()

    return show


def test_a_terminal_has_a_bar_and_keeps_a_line_of_it(
    on_terminal: Callable[[Callable[[progress_bar.TerminalListener], None]], str],
) -> None:
    shown = on_terminal(play)
    assert "━" in shown
    assert "Reading [the] task" in shown
    assert "  fitting 3/3, 0 s, loss 0.7\r\n" in shown


def test_an_interrupted_terminal_is_left_clean(
    on_terminal: Callable[[Callable[[progress_bar.TerminalListener], None]], str],
) -> None:
    def interrupt(listener: progress_bar.TerminalListener) -> None:
        with contextlib.suppress(KeyboardInterrupt), listener:
            listener.step("Fitting sa")
            listener.progress("fitting", 2, 3)
            raise KeyboardInterrupt

    shown = on_terminal(interrupt)
    hidden, visible = "\x1b[?25l", "\x1b[?25h"  # the cursor
    assert shown.count(hidden) == shown.count(visible) >= 1
    assert shown.rindex(visible) > shown.rindex(hidden)


def test_each_step_on_a_terminal_has_a_clock_of_its_own(
    on_terminal: Callable[[Callable[[progress_bar.TerminalListener], None]], str],
) -> None:
    started: list[float | None] = []

    def two_steps(listener: progress_bar.TerminalListener) -> None:
        with listener:
            for title in ("Connecting to Ray", "Starting the endpoint"):
                listener.step(title)
                assert listener._bar is not None
                started.append(listener._bar.tasks[0].start_time)

    on_terminal(two_steps)
    first, second = started
    assert first is not None
    assert second is not None
    assert second > first
