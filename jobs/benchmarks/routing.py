"""What routing costs: time until it is decided who answers and the first token is there, with N experts.

Adapters are random (cost does not depend on what they learned), prompts are random tokens, a new one each time, so that
nothing is cached. The kinds run in turns; the tables have medians of repeated runs:

    oracle      the caller names the expert: no routing
    activated   all N decide over one prefix, and the winner continues from it
    full        the paper's form on the same engine: ordinary LoRA, all N asked one after another
    peft_loop   the same in plain transformers and PEFT: set_adapter and a forward for each expert

Then the time between an answer's tokens, of one answer and of 16 together, beside plain `generate` of the same model
and beside the time that reading the weights takes at this machine's copy bandwidth. Where several answers are written
together, also all of them from prompt to end, beside transformers' continuous batching.

Prints tables; --out writes JSON. A cell that would take too long (N x prompt over --most) is left out.

    python jobs/benchmarks/routing.py --out bench_routing.json

A thousand experts of rank 16 on all layers take 10 GB; small adapters show what the number of experts costs:

    python jobs/benchmarks/routing.py --experts 1000 --prompts 400 --kinds oracle,activated --rank 4 \\
        --targets q_proj,v_proj
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
from bench_options import Names, Numbers, out_option, settings_option, write_json
from random_adapter import write_adapter

from see_ray.cli.progress_bar import TerminalListener
from see_ray.cli.render import table
from see_ray.cli.run import run
from see_ray.config import Config, load_config
from see_ray.engine.engine import EmbeddedEngine
from see_ray.engine.interface import Expert, GenerateRequest, SamplingParams
from see_ray.models.activation import activation_of
from see_ray.models.base_model import BaseModel, find, load_model, load_tokenizer

T = TypeVar("T")
Prompt = list[int]
Route = Callable[[Prompt], Coroutine[Any, Any, None]]
"""Routes a prompt and waits for the first token."""


def request(prompt: Prompt, expert: str | None, tokens: int) -> GenerateRequest:
    """A request for exactly so many tokens: a random adapter may end an answer at any token."""
    return GenerateRequest(tuple(prompt), expert, SamplingParams(tokens, ignore_eos=True))


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    experts: list[int]
    prompts: list[int]
    kinds: list[str]
    rank: int
    targets: list[str] | None
    decode: list[int]
    repeats: int
    most: int


@click.command()
@click.option("--experts", type=Numbers(), default="1,5,10,20,50", show_default=True, help="Numbers of experts.")
@click.option("--prompts", type=Numbers(), default="100,400,1500", show_default=True, help="Tokens of a prompt.")
@click.option(
    "--kinds", type=Names(), default="oracle,activated,full,peft_loop", show_default=True, help="What to run."
)
@click.option("--rank", default=16, show_default=True, help="LoRA rank.")
@click.option("--targets", type=Names(), help="Adapted layers, such as q_proj,v_proj. [default: all but the output]")
@click.option("--decode", type=Numbers(), default="1,16", show_default=True, help="Numbers of answers together.")
@click.option("--repeats", default=5, show_default=True, help="Runs of each; the table has medians.")
@click.option("--most", default=4000, show_default=True, help="Prompt tokens of all experts together, full form.")
@click.option("--threads", type=int, help="Torch threads. [default: all cores]")
@out_option
@settings_option
def main(threads: int | None, out: Path | None, settings: tuple[str, ...], **options: Any) -> None:
    """Measure the embedded engine: routing, time between tokens, batches of answers."""
    import torch

    if threads:
        torch.set_num_threads(threads)
    config, chosen = load_config(None, list(settings)), Options(**options)
    report: dict[str, Any] = {
        "rank": chosen.rank,
        "targets": chosen.targets,
        "threads": torch.get_num_threads(),
        "routing": [],
        "decode": [],
        "batching": [],
    }
    with tempfile.TemporaryDirectory() as temporary, TerminalListener() as listener:
        bench = Bench(find(config.base_model), config, Path(temporary), chosen.rank, chosen.targets)
        for count in chosen.experts:
            listener.step(f"{count} experts")
            bench.add_experts(count)
            for length in chosen.prompts:
                kinds = [kind for kind in chosen.kinds if fits(kind, count, length, chosen.most)]
                cell = median_ms(bench, bench.kinds(count, kinds), length, chosen.repeats)
                report["routing"].append({"experts": count, "prompt_tokens": length, **cell})
                listener.note(str(report["routing"][-1]))
                write_json(report, out)
        for answers in chosen.decode:
            listener.step(f"{answers} answers together")
            report["decode"].append({"answers": answers, **decoding(bench, answers, chosen.repeats)})
            if answers > 1:
                report["batching"].append({"answers": answers, **batching(bench, answers, chosen.repeats)})
            write_json(report, out)
    click.echo(as_table(report["routing"]))
    for row in [*report["decode"], *report["batching"]]:
        click.echo(", ".join(f"{key} {value}" for key, value in row.items()))


def fits(kind: str, count: int, length: int, most: int) -> bool:
    return kind in ("oracle", "activated") or count * length <= most


def median_ms(bench: Bench, timed: dict[str, Route], length: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each kind, run in turns."""
    times: dict[str, list[float]] = {kind: [] for kind in timed}
    for _ in range(repeats):
        for kind, route in timed.items():
            prompt = bench.prompt(length)
            started = time.perf_counter()
            asyncio.run(route(prompt))
            times[kind].append((time.perf_counter() - started) * 1000)
    return {f"{kind}_ms": round(statistics.median(each), 1) for kind, each in times.items()}


class Bench:
    """An engine with a growing number of random experts: `e0`, … in the activated form, `full0`, … in the full form."""

    def __init__(self, base: BaseModel, config: Config, folder: Path, rank: int, targets: list[str] | None = None):
        self._folder, self._rank, self._targets, self.base, self.config = folder, rank, targets, base, config
        self.activation = activation_of(load_tokenizer(base), config.base_model, config.fit)
        self.engine = EmbeddedEngine(base, config.base_model)
        self._count = 0
        self._peft: Any = None

    def engine_thread(self, work: Callable[[], T]) -> T:
        """Run other code on the engine's thread: two computing threads would slow each other down."""
        return self.engine._on_thread(work)

    def add_experts(self, count: int) -> None:
        """Write and load experts until there are so many."""
        for number in range(self._count, count):
            folder = self._folder / str(number)
            write = partial(write_adapter, self.engine.model, folder, self._rank, number, self._targets)
            self.engine_thread(write)
            self.engine.load(Expert(f"e{number}", folder, self.activation))
        self._count = max(self._count, count)

    def prompt(self, length: int) -> Prompt:
        """Random tokens and the generation prompt."""
        import torch

        end = list(self.activation.generation_prompt)
        return [*torch.randint(100, 40000, (length - len(end),)).tolist(), *end]

    def kinds(self, count: int, wanted: list[str]) -> dict[str, Route]:
        """The wanted ways to route a prompt among so many experts."""
        names = [f"e{number}" for number in range(count)]
        if "full" in wanted:
            full = replace(self.activation, tokens=None)
            for number in range(count):
                if f"full{number}" not in self.engine.experts:
                    self.engine.load(Expert(f"full{number}", self._folder / str(number), full))

        async def oracle(prompt: Prompt) -> None:
            await anext(self.engine.generate(request(prompt, names[count // 2], 1)))

        async def activated(prompt: Prompt) -> None:
            decisions = await self.engine.decide(prompt, names, fallback=True)
            await anext(self.engine.generate(request(prompt, names[decisions.index(max(decisions))], 1)))

        async def full_form(prompt: Prompt) -> None:
            for number in range(count):
                await self.engine.decide(prompt, [f"full{number}"])
            await anext(self.engine.generate(request(prompt, f"full{count - 1}", 1)))

        async def peft_loop(prompt: Prompt) -> None:
            self.engine_thread(lambda: self._with_peft(count)(prompt))

        if "peft_loop" in wanted:
            self.engine_thread(lambda: self._with_peft(count))
        routes: dict[str, Route] = {"oracle": oracle, "activated": activated, "full": full_form, "peft_loop": peft_loop}
        return {kind: routes[kind] for kind in wanted}

    def _with_peft(self, count: int) -> Callable[[Prompt], None]:
        """The loop over PEFT adapters; loads those that are missing."""
        import torch
        from peft import PeftModel

        if self._peft is None:
            plain = load_model(self.base, self.config.base_model)
            self._peft = PeftModel.from_pretrained(plain, self._folder / "0", adapter_name="e0").eval()
        for number in range(count):
            if f"e{number}" not in self._peft.peft_config:
                self._peft.load_adapter(self._folder / str(number), adapter_name=f"e{number}")

        def loop(prompt: Prompt) -> None:
            ids, accept = torch.tensor([prompt]), torch.tensor([[self.activation.accept]])
            indicators = [self.activation.accept, self.activation.refuse]
            with torch.inference_mode():
                for number in range(count):
                    self._peft.set_adapter(f"e{number}")
                    output = self._peft(input_ids=ids, use_cache=True, logits_to_keep=1)
                    output.logits[0, -1, indicators].softmax(-1)[0].item()
                self._peft(input_ids=accept, past_key_values=output.past_key_values, use_cache=True).logits.argmax(-1)

        return loop


def decoding(bench: Bench, answers: int, repeats: int, prompt: int = 100, tokens: int = 24) -> dict[str, float]:
    """Median milliseconds between the tokens of so many answers together.

    `engine`: each answer by another expert, in turn; `engine_base`: all by the generalist; `generate`: transformers';
    `bandwidth_limit`: reading the weights once.
    """
    import torch

    model = bench.engine_thread(lambda: load_model(bench.base, bench.config.base_model))
    weights = bench.engine_thread(lambda: torch.cat([value.flatten() for value in model.parameters()]))
    target = torch.empty_like(weights)
    experts = [name for name in bench.engine.experts if name.startswith("e")]

    def generate(prompts: list[Prompt]) -> float:
        ids = torch.tensor(prompts)
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
        seconds = []
        for count in (1, tokens):
            started = time.perf_counter()
            model.generate(input_ids=ids, min_new_tokens=count, max_new_tokens=count, **settings)
            seconds.append(time.perf_counter() - started)
        return (seconds[1] - seconds[0]) / (tokens - 1)

    def copy() -> float:
        started = time.perf_counter()
        target.copy_(weights)
        return (time.perf_counter() - started) / 2  # a copy reads and writes

    times: dict[str, list[float]] = {"engine": [], "engine_base": [], "generate": [], "bandwidth_limit": []}
    for _ in range(repeats):
        prompts = [bench.prompt(prompt) for _ in range(answers)]
        times["engine"].append(asyncio.run(step_s(bench, prompts, experts, tokens)))
        times["engine_base"].append(asyncio.run(step_s(bench, prompts, [None], tokens)))
        times["generate"].append(bench.engine_thread(partial(generate, prompts)))
        times["bandwidth_limit"].append(bench.engine_thread(copy))
    return {f"{kind}_ms": round(statistics.median(each) * 1000, 1) for kind, each in times.items()}


async def step_s(bench: Bench, prompts: list[Prompt], experts: Sequence[str | None], tokens: int) -> float:
    """Seconds of a decode step, while all prompts are being answered: by the experts in turn."""

    async def answer(number: int) -> list[float]:
        asked = request(prompts[number], experts[number % len(experts)], tokens)
        return [time.perf_counter() async for _ in bench.engine.generate(asked)]

    stamps = await asyncio.gather(*map(answer, range(len(prompts))))
    first, last = max(each[0] for each in stamps), min(each[-1] for each in stamps)
    steps = min(sum(first <= stamp <= last for stamp in each) for each in stamps)
    return (last - first) / max(1, steps - 1)


def batching(bench: Bench, answers: int, repeats: int, prompt: int = 100, tokens: int = 64) -> dict[str, float]:
    """Median seconds from prompts to whole answers: the generalist's, and transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = bench.engine_thread(lambda: load_model(bench.base, bench.config.base_model))
    greedy = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # As many tokens in a batch as the engine takes; blocks for all answers.
    limits = ContinuousBatchingConfig(max_batch_tokens=512, page_size=32, num_blocks=answers * (prompt + tokens) // 16)

    async def engine(prompts: list[Prompt]) -> None:
        async def answer(ids: Prompt) -> None:
            async for _ in bench.engine.generate(request(ids, None, tokens)):
                pass

        await asyncio.gather(*map(answer, prompts))

    def continuous_batching(prompts: list[Prompt]) -> None:
        outputs = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=limits)
        assert all(len(output.generated_tokens) == tokens for output in outputs.values())

    kinds: dict[str, Callable[[list[Prompt]], Any]] = {
        "engine": lambda prompts: asyncio.run(engine(prompts)),
        "transformers": lambda prompts: bench.engine_thread(partial(continuous_batching, prompts)),
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for repeat in range(repeats + 1):
        for kind, answer_all in kinds.items():
            prompts = [bench.prompt(prompt) for _ in range(answers)]
            started = time.perf_counter()
            answer_all(prompts)
            if repeat:  # the first one warms up
                times[kind].append(time.perf_counter() - started)
    return {f"{kind}_s": round(statistics.median(each), 2) for kind, each in times.items()}


def as_table(routing: list[dict[str, Any]]) -> str:
    """Milliseconds of each kind, with their ratio to the oracle's."""
    kinds = [key for key in ("oracle_ms", "activated_ms", "full_ms", "peft_loop_ms") if any(key in r for r in routing)]
    rows = []
    for row in routing:
        oracle = row.get("oracle_ms")
        cells = [
            f"{row[key]:.0f}" + (f" ({row[key] / oracle:.2f}x)" if oracle else "") if key in row else ""
            for key in kinds
        ]
        rows.append([str(row["experts"]), str(row["prompt_tokens"]), *cells])
    return table(["experts", "prompt", *[key.removesuffix("_ms") + " ms" for key in kinds]], rows)


if __name__ == "__main__":
    run(main)
