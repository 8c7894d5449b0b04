"""What routing costs: time until it is decided and the answer's first token is there, with N experts.

Adapters are random (cost does not depend on what they learned), prompts random tokens, a new one each time, so
that nothing is found in a cache. Side by side, in turns, medians of repeated runs:

    oracle      the expert is named by the caller: no routing at all
    activated   all N decide over one prefix, and the winner goes on from it
    full        the paper's form on the same engine: ordinary LoRA, one expert after another, all N asked
    peft_loop   the same in plain transformers and PEFT: set_adapter and a forward pass for each expert

Then the time between an answer's tokens, of one answer and of 16 together, beside plain `generate` of the same
model and beside the time that reading the weights takes at this machine's copy bandwidth; and, if there are that many
answers together, all of them from prompt to end beside transformers' own continuous batching.

Prints tables; --out writes JSON. A figure that would take too long (N x prompt over --most) is left out.

    python jobs/benchmarks/routing.py --out bench_routing.json

A thousand experts of rank 16 on all layers take 10 GB; small ones show what their number costs:

    python jobs/benchmarks/routing.py --experts 1000 --prompts 400 --kinds oracle,activated --rank 4 \\
        --targets q_proj,v_proj
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from see_ray.cli.progress_bar import TerminalListener
from see_ray.cli.render import table
from see_ray.config import Config, load_config
from see_ray.engine.engine import EmbeddedEngine
from see_ray.engine.interface import Expert, GenerateRequest, SamplingParams
from see_ray.models.activation import activation_of
from see_ray.models.base_model import BaseModel, find, load_model, load_tokenizer

T = TypeVar("T")
Timed = Callable[[list[int]], Awaitable[None]]


def request(prompt: list[int], expert: str | None, tokens: int) -> GenerateRequest:
    """An answer of exactly so many tokens."""
    return GenerateRequest(tuple(prompt), expert, SamplingParams(tokens, ignore_eos=True))


"""Random adapters end when they like."""


@click.command()
@click.option("--experts", default="1,5,10,20,50", show_default=True, help="Numbers of experts.")
@click.option("--prompts", default="100,400,1500", show_default=True, help="Tokens of a prompt.")
@click.option("--kinds", default="oracle,activated,full,peft_loop", show_default=True, help="What to run.")
@click.option("--rank", default=16, show_default=True, help="LoRA rank.")
@click.option("--targets", help="Layers that are adapted, such as q_proj,v_proj; unset: all but the output.")
@click.option("--decode", default="1,16", show_default=True, help="Numbers of answers written together.")
@click.option("--repeats", default=5, show_default=True, help="Runs of each; the table has medians.")
@click.option("--most", default=4000, show_default=True, help="Prompt tokens of all experts together, full form.")
@click.option("--threads", type=int, help="Torch threads; unset: all cores.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.FIELD=VALUE", help="A setting.")
def main(
    experts: str, prompts: str, kinds: str, rank: int, targets: str | None, decode: str, repeats: int, most: int,
    threads: int | None, out: Path | None, settings: list[str],
) -> None:  # fmt: skip
    import torch

    if threads:
        torch.set_num_threads(threads)
    config = load_config(None, list(settings))
    base = find(config.base_model)
    numbers, lengths = ([int(item) for item in text.split(",")] for text in (experts, prompts))
    report: dict[str, Any] = {
        "rank": rank,
        "targets": targets,
        "threads": torch.get_num_threads(),
        "routing": [],
        "decode": [],
        "batching": [],
    }
    routing = report["routing"]
    with tempfile.TemporaryDirectory() as temporary, TerminalListener() as listener:
        bench = Bench(base, config, Path(temporary), rank, targets.split(",") if targets else None)
        for count in numbers:
            listener.step(f"{count} experts")
            bench.grow(count)
            for length in lengths:
                timed = bench.kinds(count, [k for k in kinds.split(",") if fits(k, count, length, most)])
                routing.append({"experts": count, "prompt_tokens": length, **medians(bench, timed, length, repeats)})
                listener.note(str(routing[-1]))
                save(report, out)
        for rows in [int(item) for item in filter(None, decode.split(","))]:
            listener.step(f"{rows} answers together")
            report["decode"].append({"answers": rows, **decoding(bench, rows, repeats)})
            if rows > 1:
                report["batching"].append({"answers": rows, **batching(bench, rows, repeats)})
            save(report, out)
    print(as_table(routing))
    for row in [*report["decode"], *report["batching"]]:
        print(", ".join(f"{key} {value}" for key, value in row.items()))


def save(report: dict[str, Any], out: Path | None) -> None:
    if out:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def fits(kind: str, count: int, length: int, most: int) -> bool:
    return kind in ("oracle", "activated") or count * length <= most


def medians(bench: Bench, timed: dict[str, Timed], length: int, repeats: int) -> dict[str, float]:
    """Milliseconds of each kind, run in turns."""
    times: dict[str, list[float]] = {kind: [] for kind in timed}
    for _ in range(repeats):
        for kind, act in timed.items():
            prompt = bench.prompt(length)
            began = time.perf_counter()
            asyncio.run(act(prompt))  # type: ignore[arg-type]
            times[kind].append((time.perf_counter() - began) * 1000)
    return {f"{kind}_ms": round(statistics.median(each), 1) for kind, each in times.items()}


class Bench:
    """An engine with a growing number of random experts, in both forms."""

    def __init__(self, base: BaseModel, config: Config, folder: Path, rank: int, targets: list[str] | None = None):
        self._folder, self._rank, self._targets, self.base, self.config = folder, rank, targets, base, config
        self.activation = activation_of(load_tokenizer(base), config.base_model, config.fit)
        self.engine = EmbeddedEngine(base, config.base_model)
        self._count = 0
        self._peft: Any = None

    def engine_thread(self, work: Callable[[], T]) -> T:
        """Run what is compared on the engine's own thread: computing on two threads would slow both down."""
        return self.engine._on_thread(work)

    def grow(self, count: int) -> None:
        """Make and load experts until there are that many: `e0`, and in the full form `full0`, and so on."""
        for number in range(self._count, count):
            folder = self._folder / str(number)
            make = partial(write_adapter, self.engine.model, folder, self._rank, number, self._targets)
            self.engine_thread(make)
            self.engine.load(Expert(f"e{number}", folder, self.activation))
        self._count = max(self._count, count)

    def prompt(self, length: int) -> list[int]:
        """Random tokens, and the generation prompt."""
        import torch

        end = list(self.activation.generation_prompt)
        return [*torch.randint(100, 40000, (length - len(end),)).tolist(), *end]

    def kinds(self, count: int, wanted: list[str]) -> dict[str, Timed]:
        names = [f"e{number}" for number in range(count)]
        if "full" in wanted:
            full = replace(self.activation, tokens=None)
            for number in range(count):
                if f"full{number}" not in self.engine.experts:
                    self.engine.load(Expert(f"full{number}", self._folder / str(number), full))

        async def oracle(prompt: list[int]) -> None:
            await anext(self.engine.generate(request(prompt, names[count // 2], 1)))

        async def activated(prompt: list[int]) -> None:
            decisions = await self.engine.decide(prompt, names, fallback=True)
            await anext(self.engine.generate(request(prompt, names[decisions.index(max(decisions))], 1)))

        async def full_form(prompt: list[int]) -> None:
            for number in range(count):
                await self.engine.decide(prompt, [f"full{number}"])
            await anext(self.engine.generate(request(prompt, f"full{count - 1}", 1)))

        async def peft_loop(prompt: list[int]) -> None:
            self.engine_thread(lambda: self._with_peft(count)(prompt))

        if "peft_loop" in wanted:
            self.engine_thread(lambda: self._with_peft(count))
        every = {"oracle": oracle, "activated": activated, "full": full_form, "peft_loop": peft_loop}
        return {kind: every[kind] for kind in wanted}

    def _with_peft(self, count: int) -> Callable[[list[int]], None]:
        import torch
        from peft import PeftModel

        if self._peft is None:
            plain = load_model(self.base, self.config.base_model)
            self._peft = PeftModel.from_pretrained(plain, self._folder / "0", adapter_name="e0").eval()
        for number in range(count):
            if f"e{number}" not in self._peft.peft_config:
                self._peft.load_adapter(self._folder / str(number), adapter_name=f"e{number}")

        def loop(prompt: list[int]) -> None:
            ids, accept = torch.tensor([prompt]), torch.tensor([[self.activation.accept]])
            indicators = [self.activation.accept, self.activation.refuse]
            with torch.inference_mode():
                for number in range(count):
                    self._peft.set_adapter(f"e{number}")
                    made = self._peft(input_ids=ids, use_cache=True, logits_to_keep=1)
                    made.logits[0, -1, indicators].softmax(-1)[0].item()
                self._peft(input_ids=accept, past_key_values=made.past_key_values, use_cache=True).logits.argmax(-1)

        return loop


def decoding(bench: Bench, rows: int, repeats: int, prompt: int = 100, tokens: int = 24) -> dict[str, float]:
    """Milliseconds between an answer's tokens: ours (each answer by another expert, in turn; and all by the
    generalist), plain generate's, and what reading the weights once would take."""
    import torch

    model = bench.engine_thread(lambda: load_model(bench.base, bench.config.base_model))
    weights = bench.engine_thread(lambda: torch.cat([value.flatten() for value in model.parameters()]))
    target = torch.empty_like(weights)
    names = [name for name in bench.engine.experts if name.startswith("e")]

    async def answers(prompts: list[list[int]], who: list[Any]) -> float:
        """Seconds between the first tokens of all and the last of all, over the steps between."""

        async def one(number: int) -> list[float]:
            writer = who[number % len(who)]
            return [time.perf_counter() async for _ in bench.engine.generate(request(prompts[number], writer, tokens))]

        stamps = await asyncio.gather(*(one(number) for number in range(rows)))
        began, ended = max(each[0] for each in stamps), min(each[-1] for each in stamps)
        steps = min(sum(began <= stamp <= ended for stamp in each) for each in stamps)
        return (ended - began) / max(1, steps - 1)

    def plain(prompts: list[list[int]]) -> float:
        seconds = []
        for count in (1, tokens):
            began = time.perf_counter()
            ids = torch.tensor(prompts)
            model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=count,
                max_new_tokens=count, pad_token_id=0,
            )  # fmt: skip
            seconds.append(time.perf_counter() - began)
        return (seconds[1] - seconds[0]) / (tokens - 1)

    def copy() -> float:
        began = time.perf_counter()
        target.copy_(weights)
        return (time.perf_counter() - began) / 2  # a copy reads and writes

    times: dict[str, list[float]] = {"engine": [], "engine_base": [], "generate": [], "bandwidth_limit": []}
    for _ in range(repeats):
        prompts = [bench.prompt(prompt) for _ in range(rows)]
        times["engine"].append(asyncio.run(answers(prompts, names)))
        times["engine_base"].append(asyncio.run(answers(prompts, [None])))
        times["generate"].append(bench.engine_thread(partial(plain, prompts)))
        times["bandwidth_limit"].append(bench.engine_thread(copy))
    return {f"{kind}_ms": round(statistics.median(each) * 1000, 1) for kind, each in times.items()}


def batching(bench: Bench, rows: int, repeats: int, prompt: int = 100, tokens: int = 64) -> dict[str, float]:
    """Seconds for answers by the generalist, prompts read and all: ours, and transformers' continuous batching."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model = bench.engine_thread(lambda: load_model(bench.base, bench.config.base_model))
    greedy = GenerationConfig(max_new_tokens=tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # The same bound of a pass as the engine's; room for all answers.
    room = ContinuousBatchingConfig(max_batch_tokens=512, page_size=32, num_blocks=rows * (prompt + tokens) // 16)

    async def ours(prompts: list[list[int]]) -> None:
        async def one(ids: list[int]) -> None:
            async for _ in bench.engine.generate(request(ids, None, tokens)):
                pass

        await asyncio.gather(*map(one, prompts))

    def theirs(prompts: list[list[int]]) -> None:
        made = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=room)
        assert all(len(answer.generated_tokens) == tokens for answer in made.values())

    ways: dict[str, Callable[[list[list[int]]], Any]] = {
        "engine": lambda prompts: asyncio.run(ours(prompts)),
        "transformers": lambda prompts: bench.engine_thread(partial(theirs, prompts)),
    }
    times: dict[str, list[float]] = {kind: [] for kind in ways}
    for repeat in range(repeats + 1):
        for kind, run in ways.items():
            prompts = [bench.prompt(prompt) for _ in range(rows)]
            began = time.perf_counter()
            run(prompts)
            if repeat:  # the first one warms up
                times[kind].append(time.perf_counter() - began)
    return {f"{kind}_s": round(statistics.median(each), 2) for kind, each in times.items()}


def write_adapter(model: Any, folder: Path, rank: int, seed: int, targets: list[str] | None = None) -> None:
    """A PEFT folder with a random adapter on layers of these names, or on all linear layers but the output."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from see_ray.engine.lora import linear_layers

    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for path, linear in linear_layers(model).items():
        if targets and path.rpartition(".")[2] not in targets:
            continue
        key = f"base_model.model.{path}.lora_{{}}.weight"
        weights[key.format("A")] = torch.randn(rank, linear.in_features, generator=draw) / linear.in_features**0.5
        weights[key.format("B")] = torch.randn(linear.out_features, rank, generator=draw) * 0.01
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors")
    LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=targets or "all-linear").save_pretrained(
        folder
    )


def as_table(routing: list[dict[str, Any]]) -> str:
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
    main()
