"""One pass for reads, branches and steps: each token as if its text were read alone, with its adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from see_ray.engine.forward_batch import DecisionRows, DecodeStep, PrefillChunk, run
from see_ray.engine.kv_cache import SlotPool, of_tokens
from see_ray.engine.lora import AdapterBank
from see_ray.errors import ServingError
from see_ray.models.prefix_kv import Prefix, forward_packed, logits_of, prefill

SHAPE = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
EMPTY = Prefix((), (0,))


def plain(kind: str):
    torch.manual_seed(0)
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        # A window shorter than the texts.
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=4)),
    }[kind]()
    return made.eval()


def adapter(folder: Path, kind: str, seed: int, rank: int) -> Path:
    """A PEFT folder with random weights."""
    torch.manual_seed(seed)
    made = get_peft_model(plain(kind), LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear"))
    torch.manual_seed(seed)
    for name, value in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.2)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "mistral"])
def made(request, tmp_path_factory):
    """A model with a bank of four adapters, ranks 2 to 5; and by slot the same as PEFT models."""
    from peft import PeftModel

    model, peft = plain(request.param), {0: plain(request.param)}
    bank = AdapterBank(model)
    for slot in range(1, 5):
        folder = adapter(tmp_path_factory.mktemp("adapter"), request.param, seed=slot, rank=slot + 1)
        bank.add(f"e{slot}", folder)
        assert bank.slot(f"e{slot}") == slot
        peft[slot] = PeftModel.from_pretrained(plain(request.param), folder).eval()
    return model, bank, peft


@torch.inference_mode()
def alone(peft, before: list[int], rest: list[int], slot: int) -> torch.Tensor:
    """Hidden states of `rest` behind `before`, which the base model reads; the adapter only applies to `rest`."""
    from transformers import DynamicCache

    cache = DynamicCache()
    base = peft[slot].get_base_model() if slot else peft[0]
    if before and slot:
        with peft[slot].disable_adapter():
            base.get_decoder()(input_ids=torch.tensor([before]), past_key_values=cache, use_cache=True)
    elif before:
        base.get_decoder()(input_ids=torch.tensor([before]), past_key_values=cache, use_cache=True)
    return base.get_decoder()(input_ids=torch.tensor([rest]), past_key_values=cache, use_cache=True).last_hidden_state[
        0
    ]


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-5)


PROMPT = [3, 4, 5, 6, 7, 8, 9, 10]


@torch.inference_mode()
def go(model, bank, reads, steps=()) -> None:
    run(model, bank, reads, steps)


def test_rows_of_a_branch_are_as_each_adapter_alone(made):
    model, bank, peft = made
    for seen, ids, slots in [(7, (10,), (1, 2, 3, 4)), (5, (8, 9, 10), (4, 2)), (7, (10, 11), (0, 3)), (0, (3,), (1,))]:
        read = PrefillChunk(EMPTY, tuple(PROMPT[:-1]), branches=(DecisionRows(seen, ids, slots),))
        go(model, bank, [read])
        for number, slot in enumerate(slots):
            assert close(read.branches[0].hidden[number], alone(peft, PROMPT[:seen], list(ids), slot))


def test_a_prompt_read_in_parts_is_as_read_at_once(made):
    model, bank, peft = made
    at_once = PrefillChunk(EMPTY, tuple(PROMPT))
    first = PrefillChunk(EMPTY, tuple(PROMPT[:3]))
    go(model, bank, [at_once, first])
    second = PrefillChunk(first.prefix, tuple(PROMPT[3:]), branches=(DecisionRows(8, (11,), (2,)),))
    go(model, bank, [second])
    assert second.prefix.lengths == at_once.prefix.lengths == (8,)
    for a, b in zip(second.prefix.layers, at_once.prefix.layers, strict=True):
        assert close(a[0], b[0])
        assert close(a[1], b[1])
    assert close(second.branches[0].hidden[0], alone(peft, PROMPT, [11], 2))


def test_a_prompt_read_with_an_adapter_is_ordinary_lora(made):
    model, bank, peft = made
    read = PrefillChunk(EMPTY, tuple(PROMPT[:-1]), 3, (DecisionRows(7, (10,), (3,)),))
    go(model, bank, [read])
    assert close(read.branches[0].hidden[0, -1], alone(peft, [], PROMPT, 3)[-1])


def test_everything_in_one_pass_is_as_each_alone(made):
    """Two prompts, branches, and steps of answers of different length, on two shelves, with other adapters."""
    model, bank, peft = made
    pool, steps, texts = SlotPool(4096), [], []
    for length, slot, size in [(3, 1, 8), (6, 0, 8), (2, 4, 600), (7, 1, 8)]:
        text = list(range(20, 20 + length))
        start = PrefillChunk(EMPTY, tuple(text))
        go(model, bank, [start])
        place = pool.take(size, start.prefix.layers)
        assert place is not None
        place.append(of_tokens(start.prefix.layers, 0, length))
        steps.append(DecodeStep(40 + length, slot, place))
        texts.append((text, slot))
    reads = [
        PrefillChunk(
            EMPTY, tuple(PROMPT[:-1]), branches=(DecisionRows(7, (10,), (1, 2, 3, 4)), DecisionRows(7, (10, 12), (0,)))
        ),
        PrefillChunk(EMPTY, (30, 31), 2),
    ]
    go(model, bank, reads, steps)
    for step, (text, slot) in zip(steps, texts, strict=True):
        assert close(step.hidden, alone(peft, text, [step.token], slot)[-1])
        assert step.slot.length == len(text) + 1
    for number in range(4):
        assert close(reads[0].branches[0].hidden[number], alone(peft, PROMPT[:7], [10], number + 1))
    assert close(reads[0].branches[1].hidden[0], alone(peft, PROMPT[:7], [10, 12], 0))
    # What was written is gone on from.
    again = [DecodeStep(5, step.adapter, step.slot) for step in steps]
    go(model, bank, [], again)
    for step, before, (text, slot) in zip(again, steps, texts, strict=True):
        assert close(step.hidden, alone(peft, text, [before.token, 5], slot)[-1])


def test_many_rows_are_attended_in_parts(made, monkeypatch):
    model, bank, peft = made
    monkeypatch.setattr("see_ray.engine.forward_batch.MOST_SCORES", 40)
    read = PrefillChunk(EMPTY, tuple(PROMPT[:-1]), branches=(DecisionRows(7, (10,), (1, 2, 3, 4)),))
    go(model, bank, [read])
    for number in range(4):
        assert close(read.branches[0].hidden[number], alone(peft, PROMPT[:7], [10], number + 1))


@torch.inference_mode()
@pytest.mark.parametrize("activation_tokens", [1, 3, None], ids=["last token", "last tokens", "full form"])
def test_hidden_states_and_logits_are_those_of_fitting(made, activation_tokens):
    """The same prompts, adapters and answers through the two forward passes: training's packed rows, and the engine's
    prefill, decision rows and decode steps."""
    model, bank, peft = made
    prompts, answer, slots = [PROMPT, [20, 21, 22, 23]], [30, 31, 32, 33, 34], [2, 4]
    for prompt, slot in zip(prompts, slots, strict=True):
        # As fitted: the adapter applies to everything behind the prefix.
        split = 0 if activation_tokens is None else len(prompt) - activation_tokens
        with peft[slot].disable_adapter():
            prefix = prefill(peft[slot].get_base_model(), [prompt[:split]])
        row = [*prompt[split:], *answer]
        fitted = forward_packed(peft[slot].get_base_model(), prefix, [row])[-len(answer) - 1 :]
        # As served: the prompt, a decision row with the first token of the answer, then one token a step.
        adapted = activation_tokens or 1
        rows = DecisionRows(len(prompt) - adapted, (*prompt[-adapted:], answer[0]), (slot,))
        read = PrefillChunk(EMPTY, tuple(prompt[:-1]), slot if activation_tokens is None else 0, (rows,))
        go(model, bank, [read])
        place = SlotPool(4096).take(len(prompt) + len(answer), read.prefix.layers)
        assert place is not None
        place.append(read.prefix.cut(rows.seen).layers)
        place.append(rows.layers)
        states = [rows.hidden[0, -2], rows.hidden[0, -1]]
        for token in answer[1:]:
            step = DecodeStep(token, slot, place)
            go(model, bank, [], [step])
            states.append(step.hidden)
        served = torch.stack(states)
        assert close(served, fitted)
        assert close(logits_of(model, served), logits_of(peft[slot].get_base_model(), fitted))
        assert not close(served, alone(peft, prompt[:-1], [prompt[-1], *answer], 0)), "the adapter changes nothing"


def test_the_memory_of_a_slot_is_given_only_as_it_is_written_to():
    def taken() -> int:
        """Kilobytes that are this process's own."""
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    like = [(torch.zeros(1, 4, 1, 64),) * 2] * 8
    written = [(torch.ones(1, 4, 1000, 64),) * 2] * 8  # 16 MB of a shelf of 128
    before = taken()
    place = SlotPool(1 << 20).take(1024, like)
    assert place is not None
    assert taken() - before < 4_000
    place.append(written)
    assert 12_000 < taken() - before < 24_000


def test_a_slot_that_is_taken_again_shows_nothing_of_its_former_answer(made):
    model, bank, peft = made
    pool = SlotPool(256)
    start = PrefillChunk(EMPTY, (20, 21))
    go(model, bank, [start])
    for text in (PROMPT, [20, 21]):
        start = PrefillChunk(EMPTY, tuple(text))
        go(model, bank, [start])
        place = pool.take(10, start.prefix.layers)
        assert place is not None
        assert pool.take(10, start.prefix.layers) is None
        place.append(start.prefix.layers)
        step = DecodeStep(9, 1, place)
        go(model, bank, [], [step])
        pool.give_back(place)
    assert close(step.hidden, alone(peft, [20, 21], [9], 1)[-1])


def test_a_removed_adapter_is_the_base_model(made, tmp_path):
    model, bank, peft = made
    kind = "mistral" if getattr(model.config, "sliding_window", None) else "llama"
    bank.add("passing", adapter(tmp_path, kind, seed=9, rank=7))  # a larger rank than any before
    slot = bank.slot("passing")
    bank.remove("passing")
    read = PrefillChunk(EMPTY, tuple(PROMPT[:-1]), branches=(DecisionRows(7, (10,), (1, slot)),))
    go(model, bank, [read])
    assert close(read.branches[0].hidden[1], alone(peft, PROMPT[:7], [10], 0))
    assert close(read.branches[0].hidden[0], alone(peft, PROMPT[:7], [10], 1))


def test_an_adapter_of_the_output_layer_is_refused(made, tmp_path):
    from safetensors.torch import save_file

    _, bank, _ = made
    LoraConfig(r=2, lora_alpha=2, target_modules=["lm_head"]).save_pretrained(tmp_path)
    weights = {"A": torch.ones(2, 32), "B": torch.ones(50, 2)}
    save_file(
        {f"base_model.model.lm_head.lora_{k}.weight": v for k, v in weights.items()},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(ServingError, match="lm_head"):
        bank.add("output", tmp_path)


def test_few_tokens_in_bfloat16_are_as_among_many(tmp_path):
    """Passes of one token, of two and of three take different kernels."""
    model = plain("llama").to(torch.bfloat16)
    bank = AdapterBank(model)
    for seed in (1, 2):
        bank.add(f"e{seed}", adapter(tmp_path / str(seed), "llama", seed=seed, rank=3))

    def last(slots: tuple[int, ...]) -> torch.Tensor:
        read = PrefillChunk(EMPTY, (), branches=(DecisionRows(0, (3,), slots),))
        go(model, bank, [read])
        return read.branches[0].hidden[:, -1].float()

    many = last((1, 2, 0))
    assert torch.allclose(last((1,)), many[:1], atol=0.05)
    assert torch.allclose(last((1, 2)), many[:2], atol=0.05)
    assert not torch.allclose(many[0], many[2], atol=0.1)
    assert torch.backends.mkldnn.enabled
