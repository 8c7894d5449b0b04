"""The split forward pass: packed rows give what padded rows give, gradients included."""

from __future__ import annotations

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from see_ray.models.prefix_kv import forward, forward_packed, packs, prefill

SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
PREFIXES = [[3, 4, 5, 6, 7, 8], [9], [10, 11, 12]]
ROWS = [[13], [14, 15, 16, 17, 18], [19, 20]]


def model(kind: str):
    torch.manual_seed(0)
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SHAPE)),
        # A window shorter than the texts.
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
        "eager": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="eager")),
    }[kind]()
    return made.eval()


def whole_text_states(made, prefixes, rows) -> torch.Tensor:
    """Hidden states of the rows' tokens, each text read alone and at once."""
    states = []
    for prefix, row in zip(prefixes, rows, strict=True):
        hidden = made.get_decoder()(input_ids=torch.tensor([[*prefix, *row]])).last_hidden_state
        states.append(hidden[0, len(prefix) :])
    return torch.cat(states)


@pytest.mark.parametrize("kind", ["llama", "gemma", "mistral", "eager"])
@pytest.mark.parametrize("prefixes", [PREFIXES, [[], [], []]], ids=["prefixes", "no prefixes"])
def test_packed_rows_are_as_texts_read_alone(kind, prefixes):
    made = model(kind)
    packed = forward_packed(made, prefill(made, prefixes), ROWS)
    assert packed.shape == (sum(map(len, ROWS)), SHAPE["hidden_size"])
    assert torch.allclose(packed, whole_text_states(made, prefixes, ROWS), atol=2e-6)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_gradients_through_packed_rows_are_those_through_padded_ones(kind):
    grads = []
    for packed in (True, False):
        made = model(kind)
        prefix = prefill(made, PREFIXES)
        if packed:
            states = forward_packed(made, prefix, ROWS)
        else:
            hidden, _ = forward(made, prefix, ROWS)
            states = torch.cat([hidden[number, : len(row)] for number, row in enumerate(ROWS)])
        (states * torch.linspace(-1, 1, states.numel()).reshape(states.shape)).sum().backward()
        grads.append({name: value.grad for name, value in made.named_parameters() if value.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-5, rtol=1e-4), name


def test_a_model_is_left_as_it_was():
    made = model("llama")
    before = forward(made, prefill(made, PREFIXES), ROWS)[0]
    forward_packed(made, prefill(made, PREFIXES), ROWS)
    assert torch.equal(before, forward(made, prefill(made, PREFIXES), ROWS)[0])


def test_models_without_sdpa_are_run_padded():
    assert packs(model("llama"))
    assert not packs(model("eager"))
