"""The loss of a micro-batch, held against plain transformers on the whole texts; a small random model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from see_ray.config import FitConfig
from see_ray.fit.loss import ExpertLoss
from see_ray.fit.peft_adapter import with_adapter
from see_ray.models.activation import Activation
from see_ray.models.prefix_kv import prefill

ACTIVATION = Activation((1, 2, 3), 1, 60, 61)
PROMPTS = [[7, 8, 9, 1, 2, 3], [11, 1, 2, 3]]
TARGETS = [(60, 20, 21, 0), (61,)]


@pytest.fixture(scope="module")
def peft() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return with_adapter(LlamaForCausalLM(shape).eval(), FitConfig(r=4))


def loss_of(peft: Any, **settings: Any) -> tuple[float, list[float]]:
    splits = [ACTIVATION.split(prompt) for prompt in PROMPTS]
    with peft.disable_adapter():
        prefix = prefill(peft.get_base_model(), [left for left, _ in splits])
    module = ExpertLoss(peft, ACTIVATION, FitConfig(**settings))
    loss, parts = module(prefix, [right for _, right in splits], TARGETS, per_indicator=0.5, per_token=0.25)
    return loss.item(), parts.tolist()


def logits(peft: Any, row: int) -> torch.Tensor:
    """At the places that predict the target; adapters are new, so they change nothing."""
    ids = torch.tensor([[*PROMPTS[row], *TARGETS[row][:-1]]])
    with torch.no_grad():
        return peft.get_base_model()(input_ids=ids).logits[0, len(PROMPTS[row]) - 1 :]


def test_with_vocabulary_weight_1_an_indicator_is_a_token_like_any_other(peft: Any) -> None:
    _, (indicators, _) = loss_of(peft, vocabulary_weight=1)
    plain = sum(float(cross_entropy(logits(peft, row)[0], torch.tensor(TARGETS[row][0]))) for row in (0, 1))
    assert indicators == pytest.approx(0.5 * plain, rel=1e-5)


def test_with_vocabulary_weight_0_it_is_the_decision_alone(peft: Any) -> None:
    _, (indicators, _) = loss_of(peft, vocabulary_weight=0)
    plain = sum(
        float(cross_entropy(logits(peft, row)[0, [60, 61]], torch.tensor(TARGETS[row][0] - 60))) for row in (0, 1)
    )
    assert indicators == pytest.approx(0.5 * plain, rel=1e-5)


def test_a_response_has_the_loss_that_it_has_in_the_whole_text(peft: Any) -> None:
    _, (_, responses) = loss_of(peft)
    plain = float(cross_entropy(logits(peft, 0)[1:], torch.tensor(TARGETS[0][1:]), reduction="sum"))
    assert responses == pytest.approx(0.25 * plain, rel=1e-5)


def test_the_loss_is_the_weighted_sum_of_its_parts(peft: Any) -> None:
    loss, (indicators, responses) = loss_of(peft, indicator_weight=3)
    assert loss == pytest.approx(3 * indicators + responses, rel=1e-6)
