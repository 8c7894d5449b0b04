"""The vLLM engine against PEFT and the embedded engine, in float32: random adapters, which no rounding can hide.

Requests of activated experts, of a full-form expert and of the base model run at the same time, in steps of at most
64 tokens, so that prompts are read in chunks and every step is mixed. There are more experts than places in a step.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest

from see_ray.config import Config
from see_ray.data.demo_tasks import DemoTask
from see_ray.models.base_model import BaseModel

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` runs these tests")

import torch

from see_ray.config import FitConfig
from see_ray.data.demo_tasks import general_questions
from see_ray.engine.engine import EmbeddedEngine
from see_ray.engine.interface import Expert, GenerateRequest, SamplingParams
from see_ray.engine.vllm.engine import VllmEngine
from see_ray.engine.vllm.launch import CPU_BLOCK
from see_ray.errors import ServingError
from see_ray.models.activation import Activation, activation_of, encode_prompt, p_accept
from see_ray.models.base_model import load_model

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 2e-3
"""In logits, and in P(accept): float32 rounding, summed in another order by each of the three."""

ANSWER = 6
"""Tokens of an answer."""

FORMS: dict[str, int | Literal["all"] | None] = {
    "one": 1,
    "two": 2,
    "other": 1,
    "third": 1,
    "whole": "all",
    "full": None,
}
"""Experts by name, and how many tokens of the generation prompt they adapt; None is the full form."""


@pytest.fixture(scope="module")
def activation(config: Config, tokenizer: Any) -> Activation:
    return activation_of(tokenizer, config.base_model, FitConfig())


def adapter(folder: Path, base: BaseModel, config: Config, seed: int, **settings: Any) -> Path:
    """A LoRA that PEFT makes, with random weights."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **{"r": 16, "lora_alpha": 32, **settings})
    model = get_peft_model(load_model(base, config.base_model), lora)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.02, generator=generator)
        elif "lora_A" in name:
            weight.data.normal_(std=0.05, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts(
    tmp_path_factory: pytest.TempPathFactory, base: BaseModel, config: Config, activation: Activation
) -> dict[str, Expert]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {}
    for seed, (name, tokens) in enumerate(FORMS.items()):
        settings: dict[str, Any] = {"r": 8} if name == "two" else {}
        if tokens == "all":
            tokens = len(activation.generation_prompt)
            settings["alora_invocation_tokens"] = list(activation.generation_prompt)
        path = adapter(folder / name, base, config, seed, **settings)
        made[name] = Expert(name, path, replace(activation, tokens=tokens))
    return made


@pytest.fixture(scope="module")
def vllm(base: BaseModel, config: Config, experts: dict[str, Expert]) -> Iterator[VllmEngine]:
    engine = VllmEngine(
        base,
        config.base_model.model_copy(update={"max_length": 1024}),
        experts=len(FORMS) - 1,
        max_rank=16,
        kv_cache_memory_bytes=400 << 20,
        max_num_seqs=16,
        max_num_batched_tokens=64,
    )
    for expert in experts.values():
        engine.load(expert)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def embedded(base: BaseModel, config: Config, experts: dict[str, Expert]) -> EmbeddedEngine:
    engine = EmbeddedEngine(base, config.base_model, prefix_tokens=100_000)
    for expert in experts.values():
        engine.load(expert)
    return engine


@pytest.fixture(scope="module")
def prompts(tokenizer: Any, tasks: dict[str, DemoTask]) -> list[list[int]]:
    """50 prompts; every fifth is a second turn, with the generation prompt in the middle too."""
    texts = [row["prompt"] for task in tasks.values() for row in task.test[:13]] + general_questions()[:11]
    chats = []
    for number, text in enumerate(texts):
        chat = [{"role": "user", "content": text}]
        if number % 5 == 0:
            before = [{"role": "user", "content": texts[number - 1]}, {"role": "assistant", "content": "As you like."}]
            chat = [*before, *chat]
        chats.append(encode_prompt(tokenizer, chat))
    assert len(chats) == 50
    return chats


@dataclass(frozen=True)
class Verdict:
    """What PEFT says of an answer: its own decision; by how much each token, and the answer's end, is less likely
    than the most likely one, in logits."""

    decision: float
    gaps: list[float]
    end: float


class Peft:
    """The base model reads up to the activation point, then PEFT's model with the adapter goes on."""

    def __init__(self, base: BaseModel, config: Config, experts: dict[str, Expert], eos: frozenset[int]) -> None:
        from peft import PeftConfig, PeftModel

        self.base, self.experts, self.eos = load_model(base, config.base_model), experts, sorted(eos)
        self.models = {
            name: PeftModel.from_pretrained(load_model(base, config.base_model), expert.folder).eval()
            for name, expert in experts.items()
        }
        self.alora = {n for n, e in experts.items() if PeftConfig.from_pretrained(e.folder).alora_invocation_tokens}
        self._known: dict[Any, Verdict] = {}
        self._read: list[int] = []
        self._cache: Any = None

    def judge(self, prompt: list[int], name: str | None, answer: list[int]) -> Verdict:
        key = (tuple(prompt), name, tuple(answer))
        if key not in self._known:
            forced = [] if name is None else [self.experts[name].activation.accept]
            logits = self._logits(prompt, name, [*forced, *answer])
            activation = next(iter(self.experts.values())).activation
            decision = p_accept(float(logits[0, activation.accept]), float(logits[0, activation.refuse]))
            rows = logits[len(forced) :]
            gaps = [float(row.max() - row[token]) for row, token in zip(rows, answer, strict=False)]
            self._known[key] = Verdict(decision, gaps, float(rows[-1].max() - rows[-1][self.eos].max()))
        return self._known[key]

    @torch.inference_mode()
    def _logits(self, prompt: list[int], name: str | None, answer: list[int]) -> torch.Tensor:
        """Logits behind the prompt's last token and behind each token that follows it, [1 + answer, vocabulary]."""
        ids, point, keep = torch.tensor([[*prompt, *answer]]), len(prompt) - 1, len(answer) + 1
        if name in self.alora or (name and self.experts[name].activation.tokens is None):
            return self.models[name](input_ids=ids, logits_to_keep=keep).logits[0]  # PEFT finds the point itself
        if self._read != prompt:
            self._read, self._cache = (
                prompt,
                self.base(ids[:, :point], use_cache=True, logits_to_keep=1).past_key_values,
            )
        cache = copy.deepcopy(self._cache)
        if name is None:
            return self.base(ids[:, point:], past_key_values=cache).logits[0]
        tokens = self.experts[name].activation.tokens
        assert tokens is not None
        if tokens > 1:
            cache.crop(len(prompt) - tokens)
        rest = ids[:, len(prompt) - tokens :]
        return self.models[name](input_ids=rest, past_key_values=cache, logits_to_keep=keep).logits[0]


@pytest.fixture(scope="module")
def peft(base: BaseModel, config: Config, experts: dict[str, Expert], vllm: VllmEngine) -> Peft:
    return Peft(base, config, experts, vllm.eos)


def request(prompt: list[int], expert: str | None, count: int, **sampling: Any) -> GenerateRequest:
    return GenerateRequest(tuple(prompt), expert, SamplingParams(count, **sampling))


async def answer(engine: Any, prompt: list[int], name: str | None, count: int = ANSWER, **sampling: Any) -> Any:
    return [token.id async for token in engine.generate(request(prompt, name, count, **sampling))]


@dataclass
class Outcome:
    """Decisions of all experts on all prompts, [prompt][expert], and answers by (prompt, who)."""

    decisions: list[list[float]]
    answers: dict[tuple[int, str | None], list[int]]


def everything_at_once(engine: VllmEngine, prompts: list[list[int]]) -> Outcome:
    whose = [(number, who) for number in range(len(prompts)) for who in (*FORMS, None)]

    async def run() -> Outcome:
        decisions = asyncio.gather(*(engine.decide(prompt, list(FORMS)) for prompt in prompts))
        answers = asyncio.gather(*(answer(engine, prompts[number], who) for number, who in whose))
        return Outcome(await decisions, dict(zip(whose, await answers, strict=True)))

    return asyncio.run(run())


@pytest.fixture(scope="module")
def cold(vllm: VllmEngine, prompts: list[list[int]]) -> Outcome:
    return everything_at_once(vllm, prompts)


@pytest.fixture(scope="module")
def warm(vllm: VllmEngine, prompts: list[list[int]], cold: Outcome) -> Outcome:
    return everything_at_once(vllm, prompts)


def assert_greedy(verdict: Verdict, most: int) -> None:
    """Each token is the most likely one, or as likely within the tolerance; and so is the end, if it ended early."""
    assert max(verdict.gaps, default=0) <= TOLERANCE
    assert len(verdict.gaps) == most or verdict.end <= TOLERANCE


# --- decisions and answers ----------------------------------------------------------------


@pytest.mark.parametrize("outcome", ["cold", "warm"])
def test_decisions_and_answers_are_pefts(
    outcome: str, request: pytest.FixtureRequest, peft: Peft, prompts: list[list[int]]
) -> None:
    made = request.getfixturevalue(outcome)
    for number, prompt in enumerate(prompts):
        for name, decision in zip(FORMS, made.decisions[number], strict=True):
            verdict = peft.judge(prompt, name, made.answers[number, name])
            assert decision == pytest.approx(verdict.decision, abs=TOLERANCE)
            assert_greedy(verdict, ANSWER)
        assert_greedy(peft.judge(prompt, None, made.answers[number, None]), ANSWER)


def test_decisions_are_the_embedded_engines(
    cold: Outcome, warm: Outcome, embedded: EmbeddedEngine, prompts: list[list[int]]
) -> None:
    for number, prompt in enumerate(prompts):
        theirs = asyncio.run(embedded.decide(prompt, list(FORMS)))
        assert cold.decisions[number] == pytest.approx(theirs, abs=TOLERANCE)
        assert warm.decisions[number] == pytest.approx(theirs, abs=TOLERANCE)


def test_answers_are_the_embedded_engines(cold: Outcome, embedded: EmbeddedEngine, prompts: list[list[int]]) -> None:
    """Token for token; two tokens may be equally likely within rounding, so one answer in fifty may differ."""
    whose = [(number, who) for number in range(0, 50, 4) for who in (*FORMS, None)]

    async def run() -> list[list[int]]:
        return await asyncio.gather(*(answer(embedded, prompts[number], who) for number, who in whose))

    theirs = asyncio.run(run())
    same = [cold.answers[key] == made for key, made in zip(whose, theirs, strict=True)]
    assert sum(same) >= 0.98 * len(same)


def test_experts_and_generalist_differ(cold: Outcome, prompts: list[list[int]]) -> None:
    """Else the tests above would hold for an engine that ignores adapters."""
    for who, whom in itertools.combinations((*FORMS, None), 2):
        assert any(cold.answers[number, who] != cold.answers[number, whom] for number in range(len(prompts)))
    for one, other in itertools.combinations(range(len(FORMS)), 2):
        assert max(abs(made[one] - made[other]) for made in cold.decisions) > 10 * TOLERANCE


@pytest.mark.parametrize("over", [0, 1, 2, 3, 31])
def test_a_block_may_end_anywhere_in_the_generation_prompt(
    over: int, vllm: VllmEngine, peft: Peft, experts: dict[str, Expert]
) -> None:
    """The decision leaves blocks behind, and the answer starts from them."""
    generation_prompt = next(iter(experts.values())).activation.generation_prompt
    length = 3 * CPU_BLOCK + over
    prompt = [*range(1000, 1000 + length - len(generation_prompt)), *generation_prompt]
    decisions = vllm.decide_now(prompt, list(FORMS))
    for name, decision in zip(FORMS, decisions, strict=True):
        verdict = peft.judge(prompt, name, asyncio.run(answer(vllm, prompt, name)))
        assert decision == pytest.approx(verdict.decision, abs=TOLERANCE)
        assert_greedy(verdict, ANSWER)


def test_an_answer_that_comes_back_as_an_earlier_turn_is_read_by_the_base_model(
    vllm: VllmEngine, peft: Peft, experts: dict[str, Expert], tokenizer: Any
) -> None:
    """Its keys and values are still there, with the adapter in them, and must not be used."""
    first = encode_prompt(tokenizer, [{"role": "user", "content": "Name three rivers in Europe, and say how long."}])
    said = asyncio.run(answer(vllm, first, "one", 2 * CPU_BLOCK))
    accept = experts["one"].activation.accept
    second = [*first, accept, *said, *encode_prompt(tokenizer, [{"role": "user", "content": "And in Asia?"}])]
    assert_greedy(peft.judge(second, "one", asyncio.run(answer(vllm, second, "one"))), ANSWER)


def test_deciding_in_batches_is_deciding_one_by_one(vllm: VllmEngine, cold: Outcome, prompts: list[list[int]]) -> None:
    decisions = vllm.decide_batch(prompts[:10], "two")
    place = list(FORMS).index("two")
    assert decisions == pytest.approx([made[place] for made in cold.decisions[:10]], abs=TOLERANCE)


def test_a_seed_repeats_a_sampled_answer(vllm: VllmEngine, prompts: list[list[int]]) -> None:
    first, again, other = (
        asyncio.run(answer(vllm, prompts[-1], None, 10, temperature=1.0, seed=seed)) for seed in (3, 3, 4)
    )
    assert first == again != other


def test_log_probabilities_of_an_answer_are_its_own_while_others_decide(
    vllm: VllmEngine, embedded: EmbeddedEngine, prompts: list[list[int]]
) -> None:
    """vLLM's sampler would give all requests of a step what the decisions ask for."""

    async def answered(engine: Any) -> list[Any]:
        return [token async for token in engine.generate(request(prompts[0], "one", ANSWER, logprobs=3))]

    async def among_decisions() -> list[Any]:
        made, *_ = await asyncio.gather(answered(vllm), *(vllm.decide(prompt, ["two"]) for prompt in prompts[:30]))
        return made

    ours, theirs = asyncio.run(among_decisions()), asyncio.run(answered(embedded))
    assert [token.id for token in ours] == [token.id for token in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our.logprob == pytest.approx(their.logprob, abs=TOLERANCE)
        assert [number for number, _ in our.top] == [number for number, _ in their.top]
        assert [chance for _, chance in our.top] == pytest.approx([c for _, c in their.top], abs=TOLERANCE)


# --- the prefix ----------------------------------------------------------------------------


@pytest.fixture
def cached(vllm: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Tokens of each expert's last decision that vLLM had already, in a cache that was empty before the test."""
    found: dict[str, int] = {}
    result = vllm._result

    async def watched(prompt: Any, loaded: Any, params: Any) -> Any:
        output = await result(prompt, loaded, params)
        found[loaded.expert.name] = output.num_cached_tokens
        return output

    vllm._wait(vllm._llm.reset_prefix_cache())
    monkeypatch.setattr(vllm, "_result", watched)
    return found


ACTIVATED = [name for name, tokens in FORMS.items() if tokens is not None]


def whole_blocks(prompt: list[int], expert: Expert) -> int:
    assert expert.activation.tokens is not None
    return (len(prompt) - expert.activation.tokens) // CPU_BLOCK * CPU_BLOCK


def test_after_the_base_model_all_whole_blocks_before_the_activation_point_are_shared(
    vllm: VllmEngine, experts: dict[str, Expert], prompts: list[list[int]], cached: dict[str, int]
) -> None:
    for prompt in prompts[:10]:
        asyncio.run(answer(vllm, prompt, None, 1))
        vllm.decide_now(prompt, ACTIVATED)
        assert cached == {name: whole_blocks(prompt, experts[name]) for name in ACTIVATED}
        assert min(cached.values()) > 0


def test_of_experts_that_decide_together_one_reads_the_prompt(
    vllm: VllmEngine, experts: dict[str, Expert], prompts: list[list[int]], cached: dict[str, int]
) -> None:
    longest = max(prompts, key=len)
    vllm.decide_now(longest, ACTIVATED)
    for name in ACTIVATED[1:]:
        assert cached[name] == whole_blocks(longest, experts[name])
    assert cached[ACTIVATED[0]] == 0


def test_the_winners_answer_starts_from_what_the_decision_left(
    vllm: VllmEngine, experts: dict[str, Expert], prompts: list[list[int]]
) -> None:
    prompt = [*range(500, 500 + 4 * CPU_BLOCK - 4), *experts["one"].activation.generation_prompt]
    prompt = prompt[len(prompt) % CPU_BLOCK :]  # its last block is whole, with the adapted token in it
    vllm.decide_now(prompt, ["one"])
    forced = [experts["one"].activation.accept]

    async def first() -> int:
        outputs = vllm._outputs(prompt, vllm._expert("one"), vllm._params(max_tokens=1), forced)
        return [output.num_cached_tokens async for output in outputs][-1]

    assert vllm._wait(first()) == len(prompt)


def test_a_full_form_expert_shares_nothing(
    vllm: VllmEngine, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm._wait(vllm._llm.reset_prefix_cache())
    asyncio.run(answer(vllm, prompts[0], None))
    asyncio.run(answer(vllm, prompts[0], "one"))
    params = vllm._params(max_tokens=1)
    assert vllm._wait(vllm._result(prompts[0], vllm._expert("full"), params)).num_cached_tokens == 0


# --- loading and unloading ------------------------------------------------------------------


@pytest.fixture
def guest(vllm: VllmEngine) -> Iterator[str]:
    """Name of an expert that comes and goes."""
    yield "guest"
    if "guest" in vllm._experts:
        vllm.unload("guest")


def test_an_expert_loaded_again_under_its_name_is_the_new_one(
    vllm: VllmEngine, experts: dict[str, Expert], guest: str, cold: Outcome
) -> None:
    generation_prompt = experts["one"].activation.generation_prompt
    prompt = [*range(500, 500 + 4 * CPU_BLOCK - len(generation_prompt)), *generation_prompt]  # ends with a whole block
    for name in ("one", "other"):
        vllm.load(replace(experts[name], name=guest))
        assert vllm.decide_now(prompt, [guest]) == pytest.approx(vllm.decide_now(prompt, [name]), abs=TOLERANCE)


def test_an_unloaded_expert_is_unknown(vllm: VllmEngine, experts: dict[str, Expert], guest: str) -> None:
    vllm.load(replace(experts["one"], name=guest))
    vllm.unload(guest)
    with pytest.raises(ServingError, match="no expert guest"):
        vllm.decide_now([1, 2, 3], [guest])


def test_an_unknown_expert_is_an_error_not_the_base_model(vllm: VllmEngine) -> None:
    with pytest.raises(ServingError, match="no expert nobody"):
        asyncio.run(answer(vllm, [1, 2, 3], "nobody"))


def changed(source: Path, target: Path, change: Any) -> Path:
    """A copy of an adapter with `change(key, weight)` as its weights; None drops one."""
    from safetensors.torch import load_file, save_file

    weights = {key: change(key, weight) for key, weight in load_file(source / "adapter_model.safetensors").items()}
    save_file({k: w.contiguous() for k, w in weights.items() if w is not None}, target / "adapter_model.safetensors")
    (target / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    return target


def test_an_adapter_that_changes_nothing_is_refused(
    vllm: VllmEngine, experts: dict[str, Expert], guest: str, tmp_path: Path
) -> None:
    folder = changed(experts["one"].folder, tmp_path, lambda _, weight: torch.zeros_like(weight))
    with pytest.raises(ServingError, match="changes nothing"):
        vllm.load(replace(experts["one"], name=guest, folder=folder))


def test_an_adapter_for_layers_that_are_not_there_is_refused(
    vllm: VllmEngine, experts: dict[str, Expert], guest: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(experts["one"].folder / "adapter_model.safetensors")
    moved = {key.replace("layers.7.", "layers.99."): weight for key, weight in weights.items()}
    save_file(moved, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((experts["one"].folder / "adapter_config.json").read_text())
    with pytest.raises(ServingError, match=r"layers\.99"):
        vllm.load(replace(experts["one"], name=guest, folder=tmp_path))


def test_an_adapter_for_narrower_layers_is_refused(
    vllm: VllmEngine, experts: dict[str, Expert], guest: str, tmp_path: Path
) -> None:
    folder = changed(
        experts["one"].folder, tmp_path, lambda key, w: w[:, :-64] if key.endswith("o_proj.lora_A.weight") else w
    )
    with pytest.raises(ServingError, match="o_proj"):
        vllm.load(replace(experts["one"], name=guest, folder=folder))


def test_an_adapter_of_too_high_a_rank_is_refused(
    vllm: VllmEngine, experts: dict[str, Expert], guest: str, base: BaseModel, config: Config, tmp_path: Path
) -> None:
    folder = adapter(tmp_path, base, config, 1, r=32)
    with pytest.raises(ServingError, match=r"rank 32.*max_rank=32"):
        vllm.load(replace(experts["one"], name=guest, folder=folder))


def test_what_vllm_cannot_apply_is_refused_and_the_engine_goes_on(
    vllm: VllmEngine, experts: dict[str, Expert], guest: str, tmp_path: Path, cold: Outcome, prompts: list[list[int]]
) -> None:
    config = json.loads((experts["one"].folder / "adapter_config.json").read_text())
    changed(experts["one"].folder, tmp_path, lambda _, weight: weight)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    with pytest.raises(ServingError, match="PiSSA"):
        vllm.load(replace(experts["one"], name=guest, folder=tmp_path))
    assert vllm.decide_now(prompts[0], ["one"]) == pytest.approx(cold.decisions[0][:1], abs=TOLERANCE)


def test_a_prompt_that_is_too_long_is_refused_and_the_engine_goes_on(
    vllm: VllmEngine, cold: Outcome, prompts: list[list[int]]
) -> None:
    with pytest.raises(ServingError, match="1024"):
        vllm.decide_now([5] * 1025, ["one"])
    assert vllm.decide_now(prompts[0], ["one"]) == pytest.approx(cold.decisions[0][:1], abs=TOLERANCE)


# --- giving up ------------------------------------------------------------------------------


def test_an_answer_that_is_given_up_leaves(vllm: VllmEngine, prompts: list[list[int]]) -> None:
    async def give_up() -> None:
        stream = vllm.generate(request(prompts[0], "one", 900))
        await anext(stream)
        await stream.aclose()
        for _ in range(100):
            if vllm._llm.output_processor.get_num_unfinished_requests() == 0:
                return
            await asyncio.sleep(0.1)
        raise AssertionError("it is still being written")

    asyncio.run(give_up())


# --- too little room ---------------------------------------------------------------------------


def test_answers_that_were_put_off_for_lack_of_room_are_pefts(
    vllm: VllmEngine, base: BaseModel, config: Config, experts: dict[str, Expert], peft: Peft, prompts: list[list[int]]
) -> None:
    """Room for 12 blocks, eight answers of up to six blocks: vLLM drops some and reads them again, answers and all."""
    from prometheus_client import REGISTRY

    vllm.close()  # memory; this is the last test
    small = VllmEngine(
        base,
        config.base_model.model_copy(update={"max_length": 320}),
        experts=4,
        max_rank=16,
        num_gpu_blocks_override=12,
        kv_cache_memory_bytes=100 << 20,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        disable_log_stats=False,
    )
    try:
        loaded = ["one", "whole", "full"]
        for name in loaded:
            small.load(experts[name])
        names = [*loaded, None]
        asked = [(prompts[number], names[number % 4]) for number in range(8)]

        async def run() -> list[list[int]]:
            return await asyncio.gather(*(answer(small, prompt, who, 80) for prompt, who in asked))

        made = asyncio.run(run())
        samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
        assert sum(sample.value for sample in samples if sample.name == "vllm:num_preemptions_total") > 0
        for (prompt, who), tokens in zip(asked, made, strict=True):
            assert_greedy(peft.judge(prompt, who, tokens), 80)
    finally:
        small.close()
