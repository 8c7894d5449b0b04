"""What people see in a terminal: how learning goes, and results as text.

:class:`TerminalListener` writes to stderr: a bar that moves where that is a terminal, plain lines
in a log. The functions below it make text of other modules' results; they know nothing of commands.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from see_ray.data.reconstruct import KINDS, Example, render
from see_ray.models.activation import Activation
from see_ray.pipeline import Learned, Prepared
from see_ray.progress import Listener
from see_ray.store.records import ExpertSequence, Manifest

if TYPE_CHECKING:
    from see_ray.client import Piece

PLAIN_EVERY_S = 10.0
"""Seconds between two lines about the same thing in a log."""

SHOWN_PROMPT = 800
"""Characters of a prompt that :func:`print_prepared` shows."""


class TerminalListener(Listener):
    """Shows how learning goes; leaves the terminal clean at the end of its `with` block.

    Threads may call it. On a terminal the current step has a bar, and what is finished stays as a
    line above it; elsewhere there are only lines: each step once, progress at most every
    :data:`PLAIN_EVERY_S` seconds and at its end.

    Args:
        stream: where to write; stderr where None.
    """

    def __init__(self, stream: IO[str] | None = None):
        stream = stream or sys.stderr
        self._lock = threading.RLock()
        self._phase: _Phase | None = None
        self._bar: _Bar | None = None
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False)
        if stream.isatty() and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = _Bar(self._console)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._lock:
            self._end_phase()
            if self._bar:
                self._bar.hide()

    def step(self, title: str) -> None:
        """A step begins: its title stays as a line."""
        with self._lock:
            self._end_phase()
            self._line(title)
            if self._bar:
                self._bar.show()

    def note(self, text: str) -> None:
        """A line of its own."""
        with self._lock:
            self._line(f"  note: {text}")

    def progress(self, title: str, done: int, total: int, detail: str = "") -> None:
        """How far the step is; another title ends what was in progress."""
        with self._lock:
            if self._phase is None or self._phase.title != title:
                self._end_phase()
                self._phase = _Phase(title)
            phase = self._phase
            phase.done, phase.total, phase.detail = done, total, detail.strip(", ")
            if self._bar:
                self._bar.show(phase)
            elif phase.is_due():
                self._line(phase.line())

    def _end_phase(self) -> None:
        """What was in progress stays as a line, unless that line is there already or says nothing."""
        if self._phase and self._phase.is_news():
            self._line(self._phase.line())
        self._phase = None

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


@dataclass(eq=False)
class _Phase:
    """Something in progress."""

    title: str
    done: int = 0
    total: int = 0
    detail: str = ""
    started: float = field(default_factory=time.monotonic)
    written: tuple[float, int] | None = None
    """When its last line was written, and what was done then."""

    def is_due(self) -> bool:
        """For a log: it is at its end, or the last line about it is old."""
        if self.is_news() and self.done >= self.total:
            return True
        return time.monotonic() - (self.written[0] if self.written else self.started) >= PLAIN_EVERY_S

    def is_news(self) -> bool:
        return self.total > 1 and (self.written is None or self.written[1] != self.done)

    def line(self) -> str:
        now = time.monotonic()
        self.written = now, self.done
        count = f" {self.done}/{self.total}" if self.total > 1 else ""  # of workers that start, say, nothing is counted
        detail = f", {self.detail}" if self.detail else ""
        return f"  {self.title}{count}, {now - self.started:.0f} s{detail}"


class _Bar:
    """The one bar at the bottom of a terminal, of what is in progress; it pulses where nothing is counted."""

    def __init__(self, console: Console):
        self._console = console
        self._progress: Progress | None = None
        self._id = TaskID(0)
        self._shown: tuple[_Phase | None, bool] = (None, False)

    def show(self, phase: _Phase | None = None) -> None:
        counted = phase is not None and phase.total > 1
        if self._progress is None or phase is None or self._shown != (phase, counted):
            self.hide()
            self._progress = self._start(counted)
            total = phase.total if phase and counted else None
            self._id = self._progress.add_task(phase.title if phase else "working", total=total, detail="")
            self._shown = phase, counted
        if phase and counted:
            self._progress.update(self._id, completed=phase.done, detail=phase.detail)

    def hide(self) -> None:
        if self._progress:
            self._progress.stop()
        self._progress = None

    def _start(self, counted: bool) -> Progress:
        columns: list[ProgressColumn] = [TextColumn("  {task.description}", markup=False), BarColumn(bar_width=30)]
        if counted:
            detail = TextColumn("left  {task.fields[detail]}", markup=False)
            columns += [MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), detail]
        else:
            columns += [TimeElapsedColumn()]
        progress = Progress(
            *columns,
            console=self._console,
            transient=True,
            refresh_per_second=4,
            redirect_stdout=sys.stdout.isatty(),  # `> file` keeps what a command prints
        )
        progress.start()
        return progress


# --- results as text -------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, two spaces apart; the last one may be of any width."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def fields(pairs: Iterable[tuple[str, object]]) -> str:
    """One `name  value` a line, values aligned."""
    pairs = list(pairs)
    width = max(len(name) for name, _ in pairs)
    return "\n".join(f"  {name.ljust(width)}  {value}".rstrip() for name, value in pairs)


def trace_text(trace: dict[str, Any]) -> str:
    """A trace: who answered and why, and every expert that was asked, in order."""
    head = f"answered by {trace['answered_by']}: {trace['reason']}"
    head += f" (sequence version {trace['sequence_version']}, {trace['ms']:g} ms)"
    rows = [
        [ask["expert"], ask["decision"], _number(ask["p_accept"]), _number(ask["threshold"]), f"{ask['ms']:g}"]
        for ask in trace["asked"]
    ]
    return head + ("\n" + table(["expert", "decision", "P(accept)", "threshold", "ms"], rows) if rows else "")


def print_answer(pieces: Iterable[Piece]) -> None:
    """An answer to stdout as it comes, then its trace to stderr."""
    trace = finish_reason = None
    try:
        for piece in pieces:
            click.echo(piece.text, nl=False)
            trace, finish_reason = trace or piece.trace, piece.finish_reason
    finally:
        if trace:  # an answer that broke off ends its line too
            click.echo()
    if finish_reason == "length":
        click.echo("(cut off: the answer reached its limit of tokens; see --max-tokens)", err=True)
    if trace:
        click.echo(trace_text(trace), err=True)


def endpoint_text(url: str, health: dict[str, Any], needs_key: bool) -> str:
    """What a started endpoint serves, and how to ask it; `health` is the body of its `/health`."""
    lines = [f"serving {health['base_model']} at {url}, sequence version {health['sequence_version']}"]
    names = [f"{expert['name']}@{expert['version']}" for expert in health["experts"]]
    lines.append(f"experts, in the order asked: {', '.join(names) or 'none yet; teach one with `see learn`'}")
    lines += [f"not running: {expert}: {reason}" for expert, reason in health["failed"].items()]
    key = ' -H "Authorization: Bearer $SEE_API_KEY"' if needs_key else ""
    body = '{"model": "see", "messages": [{"role": "user", "content": "Hello"}]}'
    lines.append(f"try: curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    return "\n".join([*lines, "Ctrl-C stops it"])


def expert_table(url: str, head: ExpertSequence, live: Sequence[Manifest], stored: Sequence[Manifest]) -> str:
    """The live experts in the order in which they are asked, then those only stored."""
    if not live and not stored:
        return f"no experts in {url} yet; teach one with `see learn`"
    rows = [
        [m.id, _state(m, m in live), _number(m.threshold), f"{m.created_at:%Y-%m-%d %H:%M}", m.task]
        for m in (*live, *stored)
    ]
    title = f"sequence version {head.version} in {url}, in the order asked (newest first)"
    return f"{title}\n{table(['expert', 'state', 'threshold', 'created (UTC)', 'task'], rows)}"


def _state(manifest: Manifest, live: bool) -> str:
    if live:
        return "live, forced" if manifest.gate == "forced" else "live"
    return "set aside" if manifest.gate == "set aside" else "stored"


def history_table(versions: Sequence[ExpertSequence]) -> str:
    """Sequence versions in the order given, experts in the order asked."""
    if not versions:
        return "nothing published yet"
    rows = [
        [
            str(v.version),
            f"{v.created_at:%Y-%m-%d %H:%M:%S}",
            v.change + (" (forced)" if v.forced else ""),
            ", ".join(ref.id for ref in v.newest_first()) or "none",
        ]
        for v in versions
    ]
    return table(["version", "created (UTC)", "change", "experts, in the order asked"], rows)


def manifest_text(manifest: Manifest, head: ExpertSequence) -> str:
    """An expert's manifest, and whether it is live in `head`."""
    state = "stored, not live"
    if manifest.ref in head.experts:
        place = head.newest_first().index(manifest.ref) + 1
        state = f"live in sequence version {head.version}, place {place} of {len(head.experts)} in the order asked"
    adapted = "the whole sequence"
    if manifest.activation_tokens is not None:
        last = f"the last {manifest.activation_tokens} of the generation prompt's {len(manifest.generation_prompt)}"
        adapted = f"{last} tokens, and what follows"
    pairs: list[tuple[str, object]] = [
        ("state", state),
        ("task", manifest.task),
        ("created", f"{manifest.created_at:%Y-%m-%d %H:%M:%S} UTC"),
        ("base model", f"{manifest.base_model} (fingerprint {manifest.fingerprint[:12]})"),
        ("form", manifest.form),
        ("adapts", adapted),
        ("LoRA rank", manifest.r),
        ("indicator tokens", "accept {}, pass {}".format(*manifest.indicator_tokens)),
        ("threshold", _number(manifest.threshold)),
        *((name, f"{value:g}") for name, value in manifest.metrics.items()),
        ("gate", manifest.gate),
        *(("", sentence) for sentence in manifest.gate_failed),
        ("files", ", ".join(sorted(manifest.files))),
    ]
    return f"{manifest.id}\n{fields(pairs)}"


def learned_text(learned: Learned) -> str:
    """What learning a task came to."""
    fit, calibration = learned.fit, learned.calibration
    foreign = f"{_percent(calibration.foreign_accepted)} of {calibration.foreign} held-out queries"
    taken = ", ".join(f"{kind} {count}" for kind, count in calibration.taken.items())
    speed = f"{fit.tokens_per_s:.0f} tokens/s, {fit.seconds / max(1, fit.steps):.2f} s a step"
    pairs: list[tuple[str, object]] = [
        ("threshold", _number(calibration.threshold)),
        ("own accepted", f"{_percent(calibration.own_accepted)} of {calibration.own} held-out rows"),
        ("foreign accepted", f"{foreign} (95% upper bound {_percent(calibration.foreign_bound)})"),
        *([("accepted from", taken)] if taken else []),
        *(("gate", f.sentence) for f in learned.gate.findings if f.limit in ("taken", "gain") or not f.passed),
        ("gate took", f"{learned.gate.seconds:.1f} s"),
        ("fit", f"{fit.steps} steps, {speed}, last loss {fit.last_loss:.3f}"),
        ("seconds", ", ".join(f"{step} {seconds:g}" for step, seconds in learned.seconds.items())),
    ]
    title = f"{learned.manifest.id} is live in sequence version {learned.sequence.version}"
    hint = "next: `see serve`, with the same settings; a running endpoint picks the expert up within 15 s"
    return f"{title}\n{fields(pairs)}\n{hint}"


def print_prepared(prepared: Prepared, console: Console | None = None) -> None:
    """What would be fitted on: counts, and ten examples of all kinds with their loss mask."""
    console = console or Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    made = prepared.reconstruction
    console.print(f"{prepared.task.name} would be fitted on {len(made.train)} examples")
    console.print(fields(made.counts().items()))
    console.print("‖ from here on the adapter applies (before it, dim: the base model alone); ⟦…⟧ bold: carries loss")
    for example in _of_each_kind(made.train, 10):
        tokens = f"{len(example.prompt)} prompt tokens, {len(example.target)} with loss"
        console.print(f"\n── {example.kind}: {tokens}", style="cyan")
        console.print(_coloured(example, prepared.tokenizer, prepared.activation))
    console.print("\nnothing was fitted (--dry-run)")


def _of_each_kind(examples: Sequence[Example], count: int) -> list[Example]:
    by_kind = ([e for e in examples if e.kind == kind] for kind in KINDS)
    return [example for group in zip_longest(*by_kind) for example in group if example][:count]


def _coloured(example: Example, tokenizer: Any, activation: Activation) -> Text:
    """A rendered example in colours, a long prompt cut in its middle; the marks stay, as a log has no colours."""
    text = Text(render(example, tokenizer, activation))
    prefix, _ = activation.split(list(example.prompt))
    loss = len(text) - len(tokenizer.decode(list(example.target))) - 2  # from ⟦ to ⟧
    text.stylize("dim", 0, len(tokenizer.decode(prefix)))
    text.stylize("bold green", loss)
    if loss > SHOWN_PROMPT:
        half = SHOWN_PROMPT // 2
        cut = Text(f" [… {loss - 2 * half} characters …] ", style="italic")
        text = text[:half] + cut + text[loss - half :]
    return text


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
