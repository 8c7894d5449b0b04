"""Random Llama models, LoRA adapters and tokens, and a clock, for benchmarks: cost does not depend on what was learned.

Nothing is downloaded, and no tokenizer is needed.
"""

from __future__ import annotations

import gc
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from see_ray.engine.lora import linear_layers
from see_ray.models.activation import Activation

# Layers, hidden size, heads, key-value heads, feed-forward size, vocabulary, tied embeddings:
# one for a trial, Llama-3.2-1B, Llama-3.1-8B.
SHAPES = {
    "tiny": (2, 64, 4, 2, 128, 512, True),
    "1b": (16, 2048, 32, 8, 8192, 128256, True),
    "8b": (32, 4096, 32, 8, 14336, 128256, False),
}
ACTIVATION = Activation(generation_prompt=(1, 2, 3), tokens=1, accept=4, refuse=5)
FIRST_TOKEN = 16  # of those drawn at random
RANK = 16


def random_model(name: str) -> Any:
    """A frozen model of that shape in bfloat16, which never ends an answer."""
    layers, hidden, heads, kv_heads, inner, vocabulary, tied = SHAPES[name]
    config = LlamaConfig(
        num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads,
        intermediate_size=inner, vocab_size=vocabulary, tie_word_embeddings=tied, max_position_embeddings=8192,
        eos_token_id=None,
    )  # fmt: skip
    with torch.device(device()):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False).eval()


def random_tokens(model: Any, count: int) -> list[int]:
    return torch.randint(FIRST_TOKEN, model.config.vocab_size, (count,)).tolist()


def write_adapter(model: Any, folder: Path, seed: int) -> int:
    """Write a PEFT folder with a random bfloat16 adapter on all linear layers but the output; bytes of its weights."""
    draw = partial(torch.randn, generator=torch.Generator(model.device).manual_seed(seed), device=model.device)
    weights: dict[str, torch.Tensor] = {}
    for path, linear in linear_layers(model).items():
        down, up = draw(RANK, linear.in_features) / linear.in_features**0.5, draw(linear.out_features, RANK) / 100
        weights |= {f"base_model.model.{path}.lora_{side}.weight": w.bfloat16() for side, w in (("A", down), ("B", up))}
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=RANK, target_modules="all-linear").save_pretrained(folder)
    return sum(w.nbytes for w in weights.values())


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def now() -> float:
    """Seconds, when the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def allocated() -> int:
    """Bytes of tensors on the GPU; 0 without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
