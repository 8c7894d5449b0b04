"""Results as text."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from see_ray.admission.calibrate import Calibration
from see_ray.admission.gate import Finding, Verdict
from see_ray.cli import render
from see_ray.data.prepared import Prepared
from see_ray.data.reconstruct import Example, Reconstruction
from see_ray.data.task import Task
from see_ray.fit.report import FitSummary
from see_ray.models.activation import Activation
from see_ray.pipeline import Learned


def test_a_table_is_aligned_and_takes_cells_as_they_are() -> None:
    rows = [["1", "[bold]x[/bold] :smile:", "y" * 300], ["22", "", ""]]
    assert render.table(["a", "column", "last"], rows).splitlines() == [
        "a   column                  last",
        "1   [bold]x[/bold] :smile:  " + "y" * 300,
        "22",
    ]


def test_a_table_of_markdown() -> None:
    assert render.table(["a", "b"], [["1", "long"]], markdown=True).splitlines() == [
        "| a | b    |",
        "|---|------|",
        "| 1 | long |",
    ]


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def prepared(prompt: str) -> Prepared:
    train = [Example(tuple(map(ord, prompt)), (ord("A"), ord("!")), "accept")] * 12
    train.append(Example(tuple(map(ord, "a general query>")), (ord("P"),), "general"))
    made = Reconstruction(train, [], [], {}, [], [])
    task: Any = Task("sa", (), (), ())
    base: Any = SimpleNamespace()
    return Prepared(task, base, Letters(), Activation((ord(">"),), 1, ord("A"), ord("P")), made, frozenset())


def test_a_dry_run_shows_the_loss_mask_of_every_kind_of_example(capsys: pytest.CaptureFixture[str]) -> None:
    render.print_prepared(prepared("is this ‖ good?>"))
    out = capsys.readouterr().out
    assert "sa would be fitted on 13 examples" in out
    assert out.count("is this ‖ good?‖>⟦A!⟧\n") == 9
    assert out.count("a general query‖>⟦P⟧\n") == 1
    assert "── accept: 16 prompt tokens, 2 with loss" in out


def test_a_dry_run_has_colours_on_a_terminal() -> None:
    shown = io.StringIO()
    render.print_prepared(prepared("x" * 2000 + "?>"), Console(file=shown, force_terminal=True))
    assert "\x1b[1;32m⟦A!⟧\x1b[0m" in shown.getvalue()
    assert "[… 1203 characters …]" in shown.getvalue()


def test_a_summary_of_what_was_learned(store: Any) -> None:
    manifest, sequence = store.experts()[0], store.head()
    fit = FitSummary(
        steps=60, examples=200, tokens=9000, seconds=30.0, setup_seconds=9.0, tokens_per_s=300.0, first_loss=2.0,
        last_loss=0.5, losses=[], indicator_losses=[], response_losses=[], evaluations=[], fewest_reads=3,
        most_reads=3, resumed=0, stopped_early=False, kv_store_gb=4.0, kv_hit_rate=0.5, padding_share=0.1,
        memory_gb=1.5, workers=1, zero_stage=2, dtype="bfloat16",
    )  # fmt: skip
    calibration = Calibration(0.625, 0.98, 0.0625, 0.283, 50, 16, {"general": 1})
    findings = (
        Finding("taken", "sa", 0.0, 0.05, True, "it would take 0 % of sa's 50 kept queries"),
        Finding("change", "", 7.0, 0.01, True, "its adapter changes something"),
        Finding("own_accepted", "", 0.5, 0.75, False, "it accepts 50 % of its own"),
    )
    verdict = Verdict(findings, 1.25)
    text = render.learned_text(Learned(manifest, sequence, calibration, verdict, fit, {"prepare": 1.0, "fit": 30.5}))
    assert text.splitlines() == [
        "qa@1 is live in sequence version 2",
        "  threshold         0.6250",
        "  own accepted      98.0% of 50 held-out rows",
        "  foreign accepted  6.2% of 16 held-out queries (95% upper bound 28.3%)",
        "  accepted from     general 1",
        "  gate              it would take 0 % of sa's 50 kept queries",
        "  gate              it accepts 50 % of its own",
        "  gate took         1.2 s",
        "  fit               60 steps, 300 tokens/s, 0.50 s a step, last loss 0.500",
        "  seconds           prepare 1, fit 30.5",
        "next: `see serve`, with the same settings; a running endpoint picks the expert up within 15 s",
    ]


def test_a_started_endpoint_says_how_to_ask_it() -> None:
    body = {"base_model": "tiny", "sequence_version": 7, "failed": {"qa@1": "no room"}}
    health = body | {"experts": [{"name": "sa", "version": 2}]}
    text = render.endpoint_text("http://127.0.0.1:8000", health, needs_key=True)
    assert "experts, in the order asked: sa@2" in text
    assert "not running: qa@1: no room" in text
    assert "curl http://127.0.0.1:8000/v1/chat/completions" in text
    assert "Bearer $SEE_API_KEY" in text
