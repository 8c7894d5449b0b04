"""Results as text: tables and summaries that the commands and the jobs print. It does not use click's commands."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from see_ray.data.reconstruct import KINDS, Example, render

if TYPE_CHECKING:
    from see_ray.client import Piece
    from see_ray.data.prepared import Prepared
    from see_ray.models.activation import Activation
    from see_ray.pipeline import Learned
    from see_ray.store.records import ExpertSequence, Manifest

SHOWN_PROMPT = 800
"""Characters of a prompt that `print_prepared` shows."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, markdown: bool = False) -> str:
    """A header line and aligned columns, two spaces apart; with `markdown`, a table of Markdown."""
    layout: dict[str, Any] = (
        {"box": box.MARKDOWN} if markdown else {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0)}
    )
    grid = Table(**layout)
    for name in head:
        grid.add_column(Text(name), no_wrap=True)
    for row in rows:
        grid.add_row(*map(Text, row))
    return _plain(grid)


def fields(pairs: Iterable[tuple[str, object]]) -> str:
    """One `name  value` a line, values aligned."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, value in pairs:
        grid.add_row(Text(f"  {name}"), Text(str(value)))
    return _plain(grid)


def _plain(grid: Table) -> str:
    """A table as text without colours, as wide as it needs to be."""
    console = Console(file=io.StringIO(), width=100_000, color_system=None, emoji=False)
    with console.capture() as text:
        console.print(grid)
    return "\n".join(line.rstrip() for line in text.get().splitlines()).strip("\n")


def as_json_text(body: Any) -> str:
    """A result as JSON for people and programs: indented, not escaped to ASCII."""
    return json.dumps(body, indent=2, ensure_ascii=False)


def trace_text(trace: dict[str, Any]) -> str:
    """Who answered and why, and a line for each expert that was asked, in order."""
    head = f"answered by {trace['answered_by']}: {trace['reason']}"
    head += f" (sequence version {trace['sequence_version']}, {trace['ms']:g} ms)"
    rows = [
        [ask["expert"], ask["decision"], _number(ask["p_accept"]), _number(ask["threshold"]), f"{ask['ms']:g}"]
        for ask in trace["asked"]
    ]
    return head + ("\n" + table(["expert", "decision", "P(accept)", "threshold", "ms"], rows) if rows else "")


def print_answer(pieces: Iterable[Piece]) -> None:
    """Stream an answer to stdout, then print its trace to stderr."""
    trace = finish_reason = None
    try:
        for piece in pieces:
            click.echo(piece.text, nl=False)
            trace, finish_reason = trace or piece.trace, piece.finish_reason
    finally:
        if trace:  # also after an answer that broke off
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
    """The result of learning a task: calibration, gate, fit and time."""
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
    reconstruction = prepared.reconstruction
    console.print(f"{prepared.task.name} would be fitted on {len(reconstruction.train)} examples")
    console.print(fields(reconstruction.counts().items()))
    console.print("‖ from here on the adapter applies (before it, dim: the base model alone); ⟦…⟧ bold: carries loss")
    for example in _of_each_kind(reconstruction.train, 10):
        tokens = f"{len(example.prompt)} prompt tokens, {len(example.target)} with loss"
        console.print(f"\n── {example.kind}: {tokens}", style="cyan")
        console.print(_coloured(example, prepared.tokenizer, prepared.activation))
    console.print("\nnothing was fitted (--dry-run)")


def _of_each_kind(examples: Sequence[Example], count: int) -> list[Example]:
    by_kind = ([e for e in examples if e.kind == kind] for kind in KINDS)
    return [example for group in zip_longest(*by_kind) for example in group if example][:count]


def _coloured(example: Example, tokenizer: Any, activation: Activation) -> Text:
    """A rendered example in colours, a long prompt cut in the middle. The marks stay, since logs have no colours."""
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
