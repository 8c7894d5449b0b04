"""A packed batch of prefill chunks, decision rows and decode steps: each text as if it ran alone, with its adapter."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from see_ray.engine.forward_batch import DecisionRows, DecodeStep, PrefillChunk, run_batch
from see_ray.engine.kv_cache import KVCache
from see_ray.engine.lora import AdapterBank
from see_ray.errors import ServingError
from see_ray.models.prefix_kv import Prefix, forward_packed, logits_of, prefill

SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
EMPTY = Prefix((), (0,))


def base_model(kind: str) -> Any:
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        # The window is shorter than the texts.
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    }[kind]()
    return model.eval()


def adapter_folder(folder: Path, kind: str, seed: int, rank: int) -> Path:
    """A PEFT folder with random weights."""
    torch.manual_seed(seed)
    model = get_peft_model(base_model(kind), LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear"))
    torch.manual_seed(seed)
    for name, value in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "mistral"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, a bank of four adapters of ranks 2 to 5 in it, and the same as PEFT models by adapter index."""
    from peft import PeftModel

    model, peft = base_model(request.param), {0: base_model(request.param)}
    bank = AdapterBank(model)
    for index in range(1, 5):
        folder = adapter_folder(tmp_path_factory.mktemp("adapter"), request.param, seed=index, rank=index + 1)
        bank.add(f"e{index}", folder)
        assert bank.index(f"e{index}") == index
        peft[index] = PeftModel.from_pretrained(base_model(request.param), folder).eval()
    return model, bank, peft


@torch.inference_mode()
def alone(peft: Any, before: list[int], rest: list[int], adapter: int) -> torch.Tensor:
    """Hidden states of `rest` behind `before`, which the base model runs; the adapter applies to `rest` only."""
    from transformers import DynamicCache

    cache = DynamicCache()
    decoder = (peft[adapter].get_base_model() if adapter else peft[0]).get_decoder()
    if before:
        with peft[adapter].disable_adapter() if adapter else nullcontext():
            decoder(input_ids=torch.tensor([before]), past_key_values=cache, use_cache=True)
    return decoder(input_ids=torch.tensor([rest]), past_key_values=cache, use_cache=True).last_hidden_state[0]


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-5)


PROMPT = [3, 4, 5, 6, 7, 8, 9, 10]


@torch.inference_mode()
def run(model: Any, bank: Any, chunks: Any, steps: Any = ()) -> None:
    run_batch(model, bank, chunks, steps)


def test_decision_rows_are_as_each_adapter_alone(models: Any) -> None:
    model, bank, peft = models
    cases = [(7, (10,), (1, 2, 3, 4)), (5, (8, 9, 10), (4, 2)), (7, (10, 11), (0, 3)), (0, (3,), (1,))]
    for prefix_length, token_ids, adapters in cases:
        rows = DecisionRows(prefix_length, token_ids, adapters)
        run(model, bank, [PrefillChunk(EMPTY, tuple(PROMPT[:-1]), decision_rows=(rows,))])
        for index, adapter in enumerate(adapters):
            assert close(rows.hidden[index], alone(peft, PROMPT[:prefix_length], list(token_ids), adapter))


def test_a_prompt_in_chunks_is_as_in_one(models: Any) -> None:
    model, bank, peft = models
    whole = PrefillChunk(EMPTY, tuple(PROMPT))
    first = PrefillChunk(EMPTY, tuple(PROMPT[:3]))
    run(model, bank, [whole, first])
    rows = DecisionRows(8, (11,), (2,))
    second = PrefillChunk(first.prefix, tuple(PROMPT[3:]), decision_rows=(rows,))
    run(model, bank, [second])
    assert second.prefix.lengths == whole.prefix.lengths == (8,)
    for pair, pair_of_whole in zip(second.prefix.layers, whole.prefix.layers, strict=True):
        assert close(pair[0], pair_of_whole[0])
        assert close(pair[1], pair_of_whole[1])
    assert close(rows.hidden[0], alone(peft, PROMPT, [11], 2))


def test_a_prompt_with_an_adapter_is_plain_lora(models: Any) -> None:
    model, bank, peft = models
    rows = DecisionRows(7, (10,), (3,))
    run(model, bank, [PrefillChunk(EMPTY, tuple(PROMPT[:-1]), 3, (rows,))])
    assert close(rows.hidden[0, -1], alone(peft, [], PROMPT, 3)[-1])


def test_everything_in_one_batch_is_as_each_alone(models: Any) -> None:
    """Two prompts, decision rows, and decode steps of different lengths and adapters, in two blocks."""
    model, bank, peft = models
    steps, texts, kv_cache = [], [], None
    for length, adapter, max_length in [(3, 1, 8), (6, 0, 8), (2, 4, 600), (7, 1, 8)]:
        text = list(range(20, 20 + length))
        chunk = PrefillChunk(EMPTY, tuple(text))
        run(model, bank, [chunk])
        kv_cache = kv_cache or KVCache(4096, chunk.prefix.layers)
        slot = kv_cache.allocate(max_length)
        assert slot is not None
        slot.append(chunk.prefix.layers)
        steps.append(DecodeStep(40 + length, adapter, slot))
        texts.append((text, adapter))
    decisions, generalist = DecisionRows(7, (10,), (1, 2, 3, 4)), DecisionRows(7, (10, 12), (0,))
    chunks = [
        PrefillChunk(EMPTY, tuple(PROMPT[:-1]), decision_rows=(decisions, generalist)),
        PrefillChunk(EMPTY, (30, 31), 2),
    ]
    run(model, bank, chunks, steps)
    for step, (text, adapter) in zip(steps, texts, strict=True):
        assert close(step.hidden, alone(peft, text, [step.token_id], adapter)[-1])
        assert step.slot.length == len(text) + 1
    for index in range(4):
        assert close(decisions.hidden[index], alone(peft, PROMPT[:7], [10], index + 1))
    assert close(generalist.hidden[0], alone(peft, PROMPT[:7], [10, 12], 0))
    # The keys and values that were written are used by the next step.
    more_steps = [DecodeStep(5, step.adapter, step.slot) for step in steps]
    run(model, bank, [], more_steps)
    for step, before, (text, adapter) in zip(more_steps, steps, texts, strict=True):
        assert close(step.hidden, alone(peft, text, [before.token_id, 5], adapter)[-1])


def test_many_rows_are_attended_in_parts(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bank, peft = models
    monkeypatch.setattr("see_ray.engine.attention.MAX_SCORES", 40)
    rows = DecisionRows(7, (10,), (1, 2, 3, 4))
    run(model, bank, [PrefillChunk(EMPTY, tuple(PROMPT[:-1]), decision_rows=(rows,))])
    for index in range(4):
        assert close(rows.hidden[index], alone(peft, PROMPT[:7], [10], index + 1))


@torch.inference_mode()
@pytest.mark.parametrize("activation_tokens", [1, 3, None], ids=["last token", "last tokens", "full form"])
def test_hidden_states_and_logits_are_those_of_fitting(models: Any, activation_tokens: int | None) -> None:
    """The same prompts, adapters and answers through both forwards: the packed rows of training, and the
    engine's prefill, decision rows and decode steps."""
    model, bank, peft = models
    answer = [30, 31, 32, 33, 34]
    for prompt, adapter in [(PROMPT, 2), ([20, 21, 22, 23], 4)]:
        # As fitted: the adapter applies to everything behind the prefix.
        fitted_model = peft[adapter].get_base_model()
        split = 0 if activation_tokens is None else len(prompt) - activation_tokens
        with peft[adapter].disable_adapter():
            prefix = prefill(fitted_model, [prompt[:split]])
        fitted = forward_packed(fitted_model, prefix, [[*prompt[split:], *answer]])[-len(answer) - 1 :]
        # As served: the prompt, a decision row that ends with the answer's first token, then one token a step.
        num_adapted = activation_tokens or 1
        rows = DecisionRows(len(prompt) - num_adapted, (*prompt[-num_adapted:], answer[0]), (adapter,))
        chunk = PrefillChunk(EMPTY, tuple(prompt[:-1]), adapter if activation_tokens is None else 0, (rows,))
        run(model, bank, [chunk])
        slot = KVCache(4096, rows.layers).allocate(len(prompt) + len(answer))
        assert slot is not None
        slot.append(chunk.prefix.cut(rows.prefix_length).layers)
        slot.append(rows.layers)
        served = [rows.hidden[0, -2], rows.hidden[0, -1]]
        for token_id in answer[1:]:
            step = DecodeStep(token_id, adapter, slot)
            run(model, bank, [], [step])
            served.append(step.hidden)
        assert close(torch.stack(served), fitted)
        assert close(logits_of(model, torch.stack(served)), logits_of(fitted_model, fitted))
        without_adapter = alone(peft, prompt[:-1], [prompt[-1], *answer], 0)
        assert not close(fitted, without_adapter), "the adapter changes nothing"


def test_a_slot_that_is_used_again_shows_nothing_of_its_former_answer(models: Any) -> None:
    model, bank, peft = models
    kv_cache = None
    for text in (PROMPT, [20, 21]):
        chunk = PrefillChunk(EMPTY, tuple(text))
        run(model, bank, [chunk])
        kv_cache = kv_cache or KVCache(256, chunk.prefix.layers)
        slot = kv_cache.allocate(10)
        assert slot is not None
        assert kv_cache.allocate(10) is None
        slot.append(chunk.prefix.layers)
        step = DecodeStep(9, 1, slot)
        run(model, bank, [], [step])
        kv_cache.free(slot)
    assert close(step.hidden, alone(peft, [20, 21], [9], 1)[-1])


def test_a_removed_adapter_is_the_base_model(models: Any, tmp_path: Path) -> None:
    model, bank, peft = models
    kind = "mistral" if getattr(model.config, "sliding_window", None) else "llama"
    bank.add("passing", adapter_folder(tmp_path, kind, seed=9, rank=7))  # of a higher rank than any before
    index = bank.index("passing")
    bank.remove("passing")
    rows = DecisionRows(7, (10,), (1, index))
    run(model, bank, [PrefillChunk(EMPTY, tuple(PROMPT[:-1]), decision_rows=(rows,))])
    assert close(rows.hidden[1], alone(peft, PROMPT[:7], [10], 0))
    assert close(rows.hidden[0], alone(peft, PROMPT[:7], [10], 1))


def test_an_adapter_of_the_output_layer_is_refused(models: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    _, bank, _ = models
    LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head"]).save_pretrained(tmp_path)
    weights = {"A": torch.ones(2, 32), "B": torch.ones(50, 2)}
    save_file(
        {f"base_model.model.lm_head.lora_{k}.weight": v for k, v in weights.items()},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(ServingError, match="lm_head"):
        bank.add("output", tmp_path)


def test_few_tokens_in_bfloat16_are_as_among_many(tmp_path: Path) -> None:
    """Batches of one token, of two and of three use different kernels."""
    model = base_model("llama").to(torch.bfloat16)
    bank = AdapterBank(model)
    for seed in (1, 2):
        bank.add(f"e{seed}", adapter_folder(tmp_path / str(seed), "llama", seed=seed, rank=3))

    def last_hidden(adapters: tuple[int, ...]) -> torch.Tensor:
        rows = DecisionRows(0, (3,), adapters)
        run(model, bank, [PrefillChunk(EMPTY, (), decision_rows=(rows,))])
        return rows.hidden[:, -1].float()

    many = last_hidden((1, 2, 0))
    assert torch.allclose(last_hidden((1,)), many[:1], atol=0.05)
    assert torch.allclose(last_hidden((1, 2)), many[:2], atol=0.05)
    assert not torch.allclose(many[0], many[2], atol=0.1)
    assert torch.backends.mkldnn.enabled
