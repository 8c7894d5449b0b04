"""Requests of the embedded engine, on a tiny model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from see_ray.config import BaseModelConfig
from see_ray.engine import model_runner
from see_ray.engine.engine import EmbeddedEngine
from see_ray.engine.interface import GenerateRequest, SamplingParams
from see_ray.models.base_model import BaseModel


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> EmbeddedEngine:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    monkeypatch.setattr(model_runner, "load_model", lambda *args: model)
    return EmbeddedEngine(BaseModel("tiny", Path(), ""), BaseModelConfig(), device="cpu", kv_gb=0.01)


async def test_beside_other_answers_the_step_after_a_decision_starts_its_answer(engine: EmbeddedEngine) -> None:
    other = engine.generate(GenerateRequest((3, 4, 5), sampling=SamplingParams(60, ignore_eos=True)))
    await anext(other)
    reading = asyncio.ensure_future(anext(other))
    for number in range(5):
        prompt = (6, 7, 8, 9, 10 + number)
        await engine.decide(prompt, [], fallback=True)
        decided = engine.stats()["num_steps"]
        answer = engine.generate(GenerateRequest(prompt, sampling=SamplingParams(1, ignore_eos=True)))
        await anext(answer)
        assert engine.stats()["num_steps"] == decided + 1
        await answer.aclose()
    await reading
    await other.aclose()
