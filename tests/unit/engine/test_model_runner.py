"""The model with its memory, on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from see_ray.config import BaseModelConfig
from see_ray.engine import model_runner
from see_ray.models.base_model import BaseModel


def test_memory_is_bounded_where_keys_and_values_have_different_head_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DeepseekV3Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        first_k_dense_replace=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(config).eval()
    monkeypatch.setattr(model_runner, "load_model", lambda *args: model)
    runner = model_runner.ModelRunner(BaseModel("tiny", Path(), ""), BaseModelConfig(), "cpu", kv_gb=0.001)
    token_bytes = 2 * 4 * (16 + 8 + 16) * 4  # layers, heads, head sizes of keys and values, bytes of a float32
    assert runner.kv_cache.max_tokens == 1_000_000 // token_bytes
