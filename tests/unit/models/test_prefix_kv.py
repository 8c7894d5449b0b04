"""Split forwards: packed rows give the states and gradients of padded rows and of whole texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from see_ray.models.attention_override import supports_packing
from see_ray.models.prefix_kv import Prefix, forward, forward_packed, kv_bytes_per_token, prefill

SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
PREFIXES = [[3, 4, 5, 6, 7, 8], [9], [10, 11, 12]]
ROWS = [[13], [14, 15, 16, 17, 18], [19, 20]]


def tiny_model(kind: str) -> Any:
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SHAPE)),
        # A window shorter than the texts.
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
        "eager": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager")),
    }[kind]()
    return model.eval()


def whole_text_states(model: Any, prefixes: Any, rows: Any) -> torch.Tensor:
    """Hidden states of the rows' tokens, each text read alone and at once."""
    states = []
    for prefix, row in zip(prefixes, rows, strict=True):
        hidden = model.get_decoder()(input_ids=torch.tensor([[*prefix, *row]])).last_hidden_state
        states.append(hidden[0, len(prefix) :])
    return torch.cat(states)


@pytest.mark.parametrize("kind", ["llama", "gemma", "mistral", "eager"])
@pytest.mark.parametrize("prefixes", [PREFIXES, [[], [], []]], ids=["prefixes", "no prefixes"])
def test_packed_rows_are_as_texts_read_alone(kind: str, prefixes: Any) -> None:
    model = tiny_model(kind)
    packed = forward_packed(model, prefill(model, prefixes), ROWS)
    assert packed.shape == (sum(map(len, ROWS)), SHAPE["hidden_size"])
    assert torch.allclose(packed, whole_text_states(model, prefixes, ROWS), atol=2e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_gradients_through_packed_rows_are_those_through_padded_ones(kind: str) -> None:
    grads = []
    for packed in (True, False):
        model = tiny_model(kind)
        prefix = prefill(model, PREFIXES)
        if packed:
            states = forward_packed(model, prefix, ROWS)
        else:
            hidden, _ = forward(model, prefix, ROWS)
            states = torch.cat([hidden[number, : len(row)] for number, row in enumerate(ROWS)])
        (states * torch.linspace(-1, 1, states.numel()).reshape(states.shape)).sum().backward()
        grads.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-5, rtol=1e-4), name


def test_a_model_is_left_as_it_was() -> None:
    model = tiny_model("llama")
    before = forward(model, prefill(model, PREFIXES), ROWS)[0]
    forward_packed(model, prefill(model, PREFIXES), ROWS)
    assert torch.equal(before, forward(model, prefill(model, PREFIXES), ROWS)[0])


def test_models_without_sdpa_are_run_padded() -> None:
    assert supports_packing(tiny_model("llama"))
    assert not supports_packing(tiny_model("eager"))


@pytest.mark.parametrize("kind", ["llama", "gemma", "mistral"])
def test_bytes_per_token_are_those_of_the_tensors(kind: str) -> None:
    model = tiny_model(kind)
    prefix = prefill(model, [[3, 4, 5]])
    size = sum(tensor.numel() * tensor.element_size() for pair in prefix.layers for tensor in pair)
    assert kv_bytes_per_token(model, model.dtype) == size / 3


def test_a_prefix_survives_the_way_through_arrays() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama").to(dtype)
        prefix = prefill(model, [[3, 4, 5]])
        copy = Prefix.of_arrays(prefix.arrays(), prefix.layers[0][0])
        assert copy.lengths == prefix.lengths
        for pair, pair_copy in zip(prefix.layers, copy.layers, strict=True):
            assert all(map(torch.equal, pair, pair_copy))
