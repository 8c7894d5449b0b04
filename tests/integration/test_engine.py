"""The embedded engine against PEFT and transformers, with really fitted experts, in float32."""

from __future__ import annotations

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from see_ray.config import Config
from see_ray.data.demo_tasks import DemoTask, general_questions
from see_ray.engine.engine import EmbeddedEngine
from see_ray.engine.interface import Expert, GenerateRequest, SamplingParams
from see_ray.errors import ServingError
from see_ray.models.activation import encode_prompt
from see_ray.models.base_model import BaseModel, load_model
from see_ray.store.expert_store import ExpertStore

if TYPE_CHECKING:
    from tests.conftest import Fitted


def ids(tokenizer: Any, prompt: str) -> list[int]:
    return encode_prompt(tokenizer, [{"role": "user", "content": prompt}])


def request(prompt: list[int], expert: str | None, count: int, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(tuple(prompt), expert, SamplingParams(count, **sampling))


async def answer(
    engine: EmbeddedEngine, prompt: list[int], expert: str | None, count: int = 12, **sampling: Any
) -> list[int]:
    return [token.id async for token in engine.generate(request(prompt, expert, count, **sampling))]


def decide(engine: EmbeddedEngine, prompt: list[int], experts: list[str]) -> list[float]:
    return asyncio.run(engine.decide(prompt, experts))


def logits(engine: EmbeddedEngine, prompt: list[int], expert: str, adapted: bool = True) -> torch.Tensor:
    loaded = engine._scheduler.experts[expert]
    return engine._runner.prompt_logits(prompt, loaded, loaded.adapter if adapted else 0)


@pytest.fixture(scope="module")
def peft_upper(config: Config, base: BaseModel, experts: Fitted) -> Any:
    """The expert `upper` as PEFT alone loads it: an aLoRA on the plain base model."""
    from peft import PeftModel

    folder = ExpertStore.open(config.store.url).fetch(experts.spare["upper"].ref, Path("unused"))
    return PeftModel.from_pretrained(load_model(base, config.base_model), folder).eval()


@pytest.fixture
def contacts(tasks: dict[str, DemoTask], tokenizer: Any) -> list[list[int]]:
    return [ids(tokenizer, row["prompt"]) for row in tasks["contacts"].test[:6]]


def test_peft_reads_where_an_alora_adapter_is_activated(peft_upper: Any, experts: Fitted) -> None:
    settings = peft_upper.peft_config["default"]
    assert settings.alora_invocation_tokens == list(experts.spare["upper"].generation_prompt)


def test_an_adapter_that_peft_cannot_activate_alike_is_plain_lora_to_it(config: Config, experts: Fitted) -> None:
    from peft import PeftConfig

    for manifest in experts.live:
        folder = ExpertStore.open(config.store.url).fetch(manifest.ref, Path("unused"))
        assert PeftConfig.from_pretrained(folder).alora_invocation_tokens is None


def test_decision_logits_are_those_of_pefts_alora_on_the_whole_text(
    engine: EmbeddedEngine, peft_upper: Any, experts: Fitted, contacts: list[list[int]]
) -> None:
    indicators = list(experts.spare["upper"].indicator_tokens)
    for prompt in contacts:
        ours = logits(engine, prompt, "upper")[indicators]
        with torch.inference_mode():
            theirs = peft_upper(input_ids=torch.tensor([prompt])).logits[0, -1, indicators]
        assert torch.allclose(ours, theirs, atol=2e-3)


def test_the_base_model_alone_would_decide_otherwise(
    engine: EmbeddedEngine, experts: Fitted, contacts: list[list[int]]
) -> None:
    indicators = list(experts.spare["upper"].indicator_tokens)
    base, adapted = (logits(engine, contacts[0], "upper", adapted)[indicators] for adapted in (False, True))
    assert not torch.allclose(base, adapted, atol=1.0)


def test_answers_are_pefts_greedy_answers(
    engine: EmbeddedEngine, peft_upper: Any, experts: Fitted, contacts: list[list[int]]
) -> None:
    accept = experts.spare["upper"].indicator_tokens[0]
    for prompt in contacts[:3]:
        start = torch.tensor([[*prompt, accept]])
        theirs = peft_upper.generate(input_ids=start, max_new_tokens=12, do_sample=False)[0, start.shape[1] :].tolist()
        theirs = theirs[: theirs.index(2)] if 2 in theirs else theirs
        assert asyncio.run(answer(engine, prompt, "upper")) == theirs


def test_the_generalist_answers_as_the_base_model_does(
    engine: EmbeddedEngine, base: BaseModel, config: Config, tokenizer: Any
) -> None:
    prompt = ids(tokenizer, "What is the capital of France?")
    model = load_model(base, config.base_model)
    theirs = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :]
    expected = [token for token in theirs.tolist() if token not in engine.eos]
    assert asyncio.run(answer(engine, prompt, None)) == expected


def test_deciding_together_is_deciding_alone(engine: EmbeddedEngine, contacts: list[list[int]]) -> None:
    names = ["tickets", "dates", "upper"]
    for prompt in contacts:
        together = decide(engine, prompt, names)
        alone = [decide(engine, prompt, [name])[0] for name in names]
        assert together == pytest.approx(alone, abs=1e-4)


def test_deciding_in_batches_is_deciding_one_by_one(
    engine: EmbeddedEngine, tokenizer: Any, mixed_queries: Sequence[str]
) -> None:
    prompts = [ids(tokenizer, text) for text in mixed_queries[::17]]
    one_by_one = [decide(engine, prompt, ["dates"])[0] for prompt in prompts]
    assert engine.decide_batch(prompts, "dates", max_num_batched_tokens=400) == pytest.approx(one_by_one, abs=1e-4)


def test_experts_know_their_own_from_what_they_were_shown(
    engine: EmbeddedEngine, tokenizer: Any, tasks: dict[str, DemoTask]
) -> None:
    """Held-out rows; dates was shown tickets as rehearsal, tickets only general questions."""
    foreign = {"dates": [row["prompt"] for row in tasks["tickets"].test[:10]], "tickets": general_questions()[-10:]}
    for name, others in foreign.items():
        own = engine.decide_batch([ids(tokenizer, row["prompt"]) for row in tasks[name].test[:10]], name)
        passed_on = engine.decide_batch([ids(tokenizer, text) for text in others], name)
        above = sum(mine > other for mine in own for other in passed_on)
        assert above >= 0.95 * len(own) * len(passed_on)


def test_a_seed_repeats_a_sampled_answer(engine: EmbeddedEngine, tokenizer: Any) -> None:
    prompt = ids(tokenizer, "Tell me a story.")
    first, again, other = (
        asyncio.run(answer(engine, prompt, None, 10, temperature=1.0, seed=seed)) for seed in (3, 3, 4)
    )
    assert first == again != other


def test_ignore_eos_continues_behind_the_end(engine: EmbeddedEngine, tokenizer: Any) -> None:
    prompt = ids(tokenizer, "Answer with the single word yes.")
    ended = asyncio.run(answer(engine, prompt, None, 200))
    assert len(ended) < 200, "this answer was to end by itself"
    longer = asyncio.run(answer(engine, prompt, None, len(ended) + 4, ignore_eos=True))
    assert longer[: len(ended)] == ended
    assert len(longer) == len(ended) + 4
    assert longer[len(ended)] in engine.eos


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no niceness of their own")
def test_only_the_worker_thread_is_nice(base: BaseModel, config: Config) -> None:
    engine = EmbeddedEngine(base, config.base_model, nice=3)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert engine._on_thread(lambda: os.getpriority(os.PRIO_PROCESS, 0)) == own + 3
    assert os.getpriority(os.PRIO_PROCESS, 0) == own


def test_a_process_with_the_model_does_not_hold_scikit_learn(base: BaseModel) -> None:
    """It would hold pandas and scipy, too: 80 MB for each replica."""
    code = (
        "import sys\nfrom see_ray.models.base_model import find, load_model, load_tokenizer\n"
        "from see_ray.config import BaseModelConfig as C\nbase = find(C())\n"
        "load_tokenizer(base)\nload_model(base, C())\nassert not {'sklearn', 'pandas'} & set(sys.modules)\n"
        "import sklearn\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_requests_take_turns(engine: EmbeddedEngine, tokenizer: Any) -> None:
    async def both() -> list[str]:
        order: list[str] = []

        async def one(name: str) -> None:
            async for _ in engine.generate(request(ids(tokenizer, f"Write a poem about {name}."), None, 6)):
                order.append(name)

        await asyncio.gather(one("a"), one("b"))
        return order

    order = asyncio.run(both())
    assert order != sorted(order)
    assert sorted(order) == ["a"] * 6 + ["b"] * 6


MIXED = [
    ("My parcel has not arrived.", "tickets"),
    ("Write 3 May 2021 in the standard form.", "dates"),
    ("What is the capital of France?", None),
    ("Tell me about the sea, and how deep it is.", None),
    ("I want my money back!", "tickets"),
]


def test_answers_of_all_experts_run_together_and_are_as_each_alone(
    engine: EmbeddedEngine, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []  # answers of each step
    forward = engine._runner.forward

    def counted(chunks: Any, steps: Any) -> None:
        decoded.append(len(steps))
        forward(chunks, steps)

    monkeypatch.setattr(engine._runner, "forward", counted)
    alone = [asyncio.run(answer(engine, ids(tokenizer, text), who, 12)) for text, who in MIXED]
    steps_alone = len(decoded)
    decoded.clear()

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(answer(engine, ids(tokenizer, text), who, 12) for text, who in MIXED))

    assert asyncio.run(together()) == alone
    assert max(decoded) == len([each for each in alone if each])
    assert len(decoded) < steps_alone


def test_a_long_prompt_is_prefilled_beside_a_running_answer(
    engine: EmbeddedEngine, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks, with the same decision as at once."""
    prompt = ids(tokenizer, "My parcel has not arrived. " * 40)
    at_once = decide(engine, prompt, ["tickets"])
    engine._prefix_cache.evict()
    monkeypatch.setattr(engine._scheduler, "max_num_batched_tokens", 48)
    order: list[str] = []

    async def write() -> None:
        async for _ in engine.generate(request(ids(tokenizer, "Write a poem about rain."), None, 12)):
            order.append("token")

    async def read() -> list[float]:
        await asyncio.sleep(0.2)
        decision = await engine.decide([*prompt[:3], 7, *prompt[4:]], ["tickets"])
        order.append("decision")
        return decision

    async def both() -> list[float]:
        return (await asyncio.gather(read(), write()))[0]

    in_chunks = asyncio.run(both())
    engine._prefix_cache.clear()
    monkeypatch.undo()
    assert in_chunks == pytest.approx(decide(engine, [*prompt[:3], 7, *prompt[4:]], ["tickets"]), abs=1e-4)
    assert at_once != in_chunks
    assert order.index("decision") > 1


def test_prompts_that_begin_alike_are_prefilled_once(engine: EmbeddedEngine, tokenizer: Any) -> None:
    story = "Once upon a time there was a king who had three daughters. " * 4
    first, second = (ids(tokenizer, story + end) for end in ("Who was the king?", "How many daughters were there?"))
    decide(engine, first, ["dates"])
    before = engine.stats()
    decide(engine, second, ["dates"])
    after = engine.stats()
    found = after["prefix_cache_hits"] - before["prefix_cache_hits"]
    assert found >= len(ids(tokenizer, story)) - 8
    assert after["num_tokens"] - before["num_tokens"] == len(second) - 1 - found + 1  # and a row: the last token


def test_a_decision_with_fallback_saves_the_answers_first_step(engine: EmbeddedEngine, tokenizer: Any) -> None:
    """All experts also run their indicators then, which takes tokens but no step."""
    counts: dict[bool, list[float]] = {False: [], True: []}

    async def decide_and_answer(prompt: Any, follows: Any) -> None:
        await engine.decide(prompt, ["dates", "tickets"], fallback=follows)
        await answer(engine, prompt, "dates", 1, ignore_eos=True)
        while engine.stats()["num_running"]:  # else the engine would not be idle for the next one
            await asyncio.sleep(0.01)

    for number, follows in itertools.product(range(5), (False, True)):
        before = engine.stats()
        asyncio.run(decide_and_answer(ids(tokenizer, f"Who was the king of spades, {follows}, {number}?"), follows))
        counts[follows].append(engine.stats()["num_steps"] - before["num_steps"])
    # An answer that has ended takes part in one more step if that is scheduled before its reader has noticed.
    assert min(counts[False]) == min(counts[True]) + 1


def test_an_answer_for_which_there_is_no_room_waits(
    engine: EmbeddedEngine, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from see_ray.engine.kv_cache import KVCache

    prompt = ids(tokenizer, "Write a poem about rain.")
    alone = asyncio.run(answer(engine, prompt, None, 20))
    kv_cache = KVCache(512, engine._runner.example_kv)
    for owner in (engine._runner, engine._scheduler):  # two slots of 256 tokens
        monkeypatch.setattr(owner, "kv_cache", kv_cache)
    decoded: list[int] = []  # answers of each step
    forward = engine._runner.forward

    def counted(chunks: Any, steps: Any) -> None:
        decoded.append(len(steps))
        forward(chunks, steps)

    monkeypatch.setattr(engine._runner, "forward", counted)

    async def five() -> list[list[int]]:
        return await asyncio.gather(*(answer(engine, prompt, None, 20) for _ in range(5)))

    assert asyncio.run(five()) == [alone] * 5
    assert max(decoded) == 2


def test_an_answer_that_can_never_have_room_is_refused_with_the_setting(
    engine: EmbeddedEngine, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from see_ray.engine.kv_cache import KVCache

    monkeypatch.setattr(engine._scheduler, "kv_cache", KVCache(512, engine._runner.example_kv))
    with pytest.raises(ServingError, match="kv_gb"):
        asyncio.run(answer(engine, ids(tokenizer, "Write a poem."), None, 600))


def test_logprobs_are_those_of_the_model(
    engine: EmbeddedEngine, base: BaseModel, config: Config, tokenizer: Any
) -> None:
    prompt = ids(tokenizer, "What is the capital of France?")

    async def first() -> Any:
        async for token in engine.generate(request(prompt, None, 1, logprobs=3)):
            return token

    token = asyncio.run(first())
    with torch.inference_mode():
        plain = load_model(base, config.base_model)(input_ids=torch.tensor([prompt])).logits[0, -1]
    expected = plain.log_softmax(-1)
    assert token.logprob == pytest.approx(float(expected[token.id]), abs=1e-3)
    assert [number for number, _ in token.top] == expected.topk(3).indices.tolist()


def test_experts_that_come_and_go_do_not_stop_an_answer(
    engine: EmbeddedEngine, experts: Fitted, config: Config, tokenizer: Any
) -> None:
    from see_ray.store.expert_files import activation_of_manifest

    manifest = experts.live[0]
    folder = ExpertStore.open(config.store.url).fetch(manifest.ref, Path("unused"))
    engine.load(Expert("passing", folder, activation_of_manifest(manifest)))
    prompt = ids(tokenizer, "My parcel has not arrived.")
    whole = asyncio.run(answer(engine, prompt, "passing", 12))

    async def leave() -> list[int]:
        token_ids = []
        async for token in engine.generate(request(prompt, "passing", 12)):
            token_ids.append(token.id)
            if len(token_ids) == 1:
                await asyncio.to_thread(engine.unload, "passing")
                again = Expert("passing", folder, activation_of_manifest(manifest))
                await asyncio.to_thread(engine.load, again)
        return token_ids

    try:
        assert asyncio.run(leave()) == whole
        registry = engine._scheduler.experts
        assert not registry.removed or (asyncio.run(answer(engine, prompt, None, 2)) and not registry.removed)
    finally:
        engine.unload("passing")


def test_a_decision_continues_from_the_prefix_of_another_engine(
    engine: EmbeddedEngine, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = ids(tokenizer, "My parcel has not arrived, and nobody answers my letters.")
    arrays = asyncio.run(engine.export_prefix(prompt))
    alone = decide(engine, prompt, ["tickets"])
    engine._prefix_cache.clear()
    engine.import_prefix(prompt, arrays)
    before = engine.stats()["num_tokens"]
    assert decide(engine, prompt, ["tickets"]) == pytest.approx(alone, abs=1e-5)
    assert engine.stats()["num_tokens"] - before == 1  # the last token


def test_an_answer_that_is_abandoned_ends(engine: EmbeddedEngine, tokenizer: Any) -> None:
    async def give_up() -> None:
        stream = engine.generate(request(ids(tokenizer, "Write a poem about rain."), None, 1000))
        await anext(stream)
        await stream.aclose()
        for _ in range(100):
            if not engine._scheduler.running:
                return
            await asyncio.sleep(0.1)
        raise AssertionError("it is still running")

    asyncio.run(give_up())


def test_a_long_answer_is_as_transformers_writes_it(
    engine: EmbeddedEngine, config: Config, base: BaseModel, tokenizer: Any
) -> None:
    prompt = ids(tokenizer, "Count from one to one hundred.")
    model = load_model(base, config.base_model)
    theirs = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=150, do_sample=False)[0, len(prompt) :]
    ours = asyncio.run(answer(engine, prompt, None, 150))
    assert ours == [token for token in theirs.tolist() if token not in engine.eos]


def test_cached_prompts_are_bounded(engine: EmbeddedEngine, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine._prefix_cache, "capacity", 100)
    for number in range(8):
        decide(engine, ids(tokenizer, f"Question number {number}"), ["dates"])
        cached = list(engine._prefix_cache)
        assert sum(prompt.num_tokens for prompt in cached[:-1]) <= 100


def test_a_full_form_expert_applies_to_the_whole_prompt(
    engine: EmbeddedEngine, experts: Fitted, config: Config, base: BaseModel, tokenizer: Any
) -> None:
    """The same weights applied from the first token on decide as PEFT's plain LoRA does."""
    from peft import PeftModel

    manifest = experts.live[0]
    folder = ExpertStore.open(config.store.url).fetch(manifest.ref, Path("unused"))
    from dataclasses import replace

    from see_ray.store.expert_files import activation_of_manifest

    engine.load(Expert("everywhere", folder, replace(activation_of_manifest(manifest), tokens=None)))
    try:
        prompt = ids(tokenizer, "My parcel has not arrived.")
        plain = PeftModel.from_pretrained(load_model(base, config.base_model), folder).eval()
        with torch.inference_mode():
            theirs = plain(input_ids=torch.tensor([prompt])).logits[0, -1]
        assert torch.allclose(logits(engine, prompt, "everywhere"), theirs, atol=5e-3)
    finally:
        engine.unload("everywhere")


def test_an_adapter_that_changes_nothing_is_refused(
    engine: EmbeddedEngine, config: Config, experts: Fitted, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from see_ray.store.expert_files import activation_of_manifest

    manifest = experts.live[0]
    folder = ExpertStore.open(config.store.url).fetch(manifest.ref, Path("unused"))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({key: torch.zeros_like(value) for key, value in weights.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    with pytest.raises(ServingError, match="changes nothing"):
        engine.load(Expert("null", tmp_path, activation_of_manifest(manifest)))


def test_an_adapter_for_another_model_is_refused(
    engine: EmbeddedEngine, config: Config, experts: Fitted, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    from see_ray.store.expert_files import activation_of_manifest

    manifest = experts.live[0]
    folder = ExpertStore.open(config.store.url).fetch(manifest.ref, Path("unused"))
    (tmp_path / "adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    key = "base_model.model.model.layers.99.mlp.up_proj.lora_{}.weight"
    weights = {key.format("A"): torch.ones(8, 4), key.format("B"): torch.ones(4, 8)}
    save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ServingError, match=r"layers\.99"):
        engine.load(Expert("foreign", tmp_path, activation_of_manifest(manifest)))


def test_an_unknown_expert_is_an_error_not_the_base_model(engine: EmbeddedEngine, contacts: list[list[int]]) -> None:
    with pytest.raises(ServingError, match="no expert nobody"):
        decide(engine, contacts[0], ["nobody"])
