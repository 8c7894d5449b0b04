"""Evaluation on held-out rows, held against plain transformers on the whole texts; a small random model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from see_ray.config import FitConfig
from see_ray.data.reconstruct import Example
from see_ray.fit.held_out import EvalResult, HeldOutRows
from see_ray.fit.peft_adapter import with_adapter
from see_ray.fit.rank_model import RankModel
from see_ray.fit.report import Progress
from see_ray.models.activation import Activation, p_accept

ACCEPT, PASS = 60, 61
ACTIVATION = Activation((1, 2, 3), 1, ACCEPT, PASS)
ROWS = [
    Example((11, 1, 2, 3), (PASS,), "general"),
    Example((7, 8, 9, 1, 2, 3), (ACCEPT, 20, 21, 0), "accept"),
    Example((12, 13, 1, 2, 3), (PASS,), "rehearsal"),
    Example((14, 1, 2, 3), (ACCEPT, 22, 0), "accept"),
]


def nothing(progress: Progress) -> None: ...


@pytest.fixture(scope="module")
def peft() -> Any:
    """A base model with an adapter that changes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    shape = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    model = with_adapter(LlamaForCausalLM(shape).eval(), FitConfig(r=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def full(peft: Any) -> RankModel:
    """In the full form, which plain PEFT computes, too."""
    return RankModel(SimpleNamespace(module=SimpleNamespace(model=peft)), Activation((1, 2, 3), None, ACCEPT, PASS))


@torch.no_grad()
def logits(peft: Any, row: Example) -> torch.Tensor:
    """At the places that predict the target."""
    return peft(input_ids=torch.tensor([[*row.prompt, *row.target[:-1]]])).logits[0, len(row.prompt) - 1 :]


def response_losses(peft: Any, row: Example) -> torch.Tensor:
    return cross_entropy(logits(peft, row)[1:], torch.tensor(row.target[1:]), reduction="none")


def test_decisions_and_response_loss_are_those_of_the_whole_texts(peft: Any, full: RankModel) -> None:
    result = HeldOutRows(full, ROWS, kept_tokens=0).evaluate(nothing)
    peft.eval()
    decisions = [p_accept(*logits(peft, row)[0, [ACCEPT, PASS]].tolist()) for row in ROWS]
    losses = torch.cat([response_losses(peft, row) for row in ROWS if row.is_own])
    assert result.decisions == pytest.approx(decisions, rel=1e-5)
    assert result.response_loss == pytest.approx(losses.mean().item(), rel=1e-5)


def test_prefixes_that_are_kept_give_the_same_result(peft: Any) -> None:
    model = RankModel(SimpleNamespace(module=SimpleNamespace(model=peft)), ACTIVATION)
    kept = HeldOutRows(model, ROWS, kept_tokens=1000)
    assert kept.evaluate(nothing) == kept.evaluate(nothing) == HeldOutRows(model, ROWS, kept_tokens=0).evaluate(nothing)


def test_the_comparison_is_of_the_whole_texts_with_and_without_the_adapter(peft: Any, full: RankModel) -> None:
    comparison = HeldOutRows(full, ROWS, kept_tokens=0).compare()
    peft.eval()
    own = [row for row in ROWS if row.is_own]
    expert = [response_losses(peft, row) for row in own]
    with peft.disable_adapter():
        plain = [Example(row.prompt, row.target[1:], "accept") for row in own]
        generalist = [cross_entropy(logits(peft, row), torch.tensor(row.target), reduction="none") for row in plain]
    assert comparison is not None
    assert comparison.rows == 2
    assert comparison.expert_loss == pytest.approx(torch.cat(expert).mean().item(), rel=1e-5)
    assert comparison.generalist_loss == pytest.approx(torch.cat(generalist).mean().item(), rel=1e-5)
    assert comparison.change > 0


def test_without_own_rows_there_is_no_comparison(full: RankModel) -> None:
    assert HeldOutRows(full, [row for row in ROWS if not row.is_own], kept_tokens=0).compare() is None


# --- a row is own or foreign by its kind alone: not by the length of its target, its first token, or its place ---


def test_a_foreign_row_is_not_compared_whatever_its_target(full: RankModel) -> None:
    foreign = Example((15, 1, 2, 3), (PASS, 0), "mixed")
    with_it, without = (HeldOutRows(full, rows, kept_tokens=0).compare() for rows in ([foreign, *ROWS], ROWS))
    assert with_it is not None
    assert without is not None
    assert with_it.rows == without.rows == 2
    assert with_it.expert_loss == pytest.approx(without.expert_loss, rel=1e-5)


def test_accuracy_counts_rows_by_their_kind() -> None:
    rows = [
        Example((1,), (ACCEPT, 5), "general"),
        Example((2,), (PASS,), "accept"),
        Example((3,), (PASS,), "mixed"),
    ]
    assert EvalResult([0.9, 0.9, 0.1], 0.0).accuracy(rows) == (1.0, 0.5)
    assert EvalResult([0.9], 0.0).accuracy(rows[:1]) == (1.0, 0.0)
