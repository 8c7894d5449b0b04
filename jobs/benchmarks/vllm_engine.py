"""Routing on vLLM: how many queries a second get from prompt to the first token of the right expert's answer.

    activated   see_ray's engine: the prompt is read once, each of N experts decides on one token behind it, the
                winner writes
    full        vLLM's own multi-LoRA doing the same with full-form experts: each of N reads the whole prompt
    oracle      the right expert is known: prompt and first token, no decision

Each query has a prompt of its own, of random tokens, so that nothing is cached from one to the next. A cell runs
for `--seconds`, and until each of its `--concurrency` callers has had one answer; one that would take longer than
`--limit`, going by how fast the same kind read tokens before, is left out. Prints a table; --out writes JSON.

    python jobs/benchmarks/vllm_engine.py --experts 1,10,50 --prompts 100,400,1500 --concurrency 1,16,64 --out vllm.json
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from see_ray.cli.render import table
from see_ray.config import Config, load_config
from see_ray.engine.interface import Expert, GenerateRequest, SamplingParams
from see_ray.engine.vllm.engine import VllmEngine
from see_ray.models.activation import Activation, activation_of
from see_ray.models.base_model import BaseModel, find, load_model, load_tokenizer

KINDS = ("activated", "full", "oracle")

SEEDS = itertools.count()
"""One for each prompt of a run, whatever the kind."""


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        queries: answered within `seconds`.
        first_token_s: median time from query to first token.
    """

    kind: str
    experts: int
    prompt: int
    concurrency: int
    queries: int
    seconds: float
    first_token_s: float

    @property
    def rate(self) -> float:
        return self.queries / self.seconds


@click.command()
@click.option("--experts", default="1,10,50", show_default=True, help="Numbers of experts.")
@click.option("--prompts", default="100,400,1500", show_default=True, help="Prompt lengths in tokens.")
@click.option("--concurrency", default="1,16,64", show_default=True, help="Callers at the same time.")
@click.option("--kinds", default=",".join(KINDS), show_default=True, help="What to run.")
@click.option("--rank", default=16, show_default=True, help="LoRA rank; all linear layers.")
@click.option("--seconds", default=10.0, show_default=True, help="How long a cell runs.")
@click.option("--limit", default=60.0, show_default=True, help="A cell expected to take longer is left out.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.FIELD=VALUE", help="A setting.")
def main(
    experts: str, prompts: str, concurrency: str, kinds: str, rank: int, seconds: float, limit: float,
    out: Path | None, settings: list[str],
) -> None:  # fmt: skip
    numbers, lengths, callers = (sorted(map(int, text.split(","))) for text in (experts, prompts, concurrency))
    config = load_config(None, ["base_model.max_length=2048", *settings])
    base = find(config.base_model)
    activation = activation_of(load_tokenizer(base), config.base_model, config.fit)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        adapter = random_adapter(Path(folder), base, config, rank)
        engine = VllmEngine(base, config.base_model, experts=numbers[-1], max_rank=rank, max_num_seqs=128)
        try:
            for kind in kinds.split(","):
                cells += measure(engine, kind, adapter, activation, numbers, lengths, callers, seconds, limit)
                if out:
                    out.write_text(json.dumps(report(cells), indent=2) + "\n", encoding="utf-8")
        finally:
            engine.close()
    print(as_table(cells))


def random_adapter(folder: Path, base: BaseModel, config: Config, rank: int) -> Path:
    """A LoRA with random weights: it costs what a fitted one does."""
    import torch
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = get_peft_model(load_model(base, config.base_model), lora, autocast_adapter_dtype=False)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.02)
    model.save_pretrained(folder)
    return folder


def measure(
    engine: VllmEngine, kind: str, adapter: Path, activation: Activation, numbers: list[int], lengths: list[int],
    callers: list[int], seconds: float, limit: float,
) -> list[Cell]:  # fmt: skip
    """All cells of one kind that fit into the limit."""
    if kind == "full":
        activation = replace(activation, tokens=None)
    names = [f"expert-{number}" for number in range(1 if kind == "oracle" else numbers[-1])]
    click.echo(f"{kind}: loading {len(names)} adapters")
    for name in names:
        engine.load(Expert(name, adapter, activation))
    query = answer if kind == "oracle" else route
    cells: list[Cell] = []
    asyncio.run(query(engine, prompt_of(lengths[0], activation), names[:1]))  # first use
    for number, length, at_once in itertools.product([1] if kind == "oracle" else numbers, lengths, callers):
        expected = min((seconds_for(known, number, length, at_once) for known in cells), default=0.0)
        if expected > limit:
            click.echo(f"  {number} experts, {length} tokens, {at_once} at once: left out, about {expected:.0f} s")
            continue
        asked = names[:number]
        made = asyncio.run(run(engine, query, asked, length, at_once, seconds, activation))
        cells.append(Cell(kind, number, length, at_once, *made))
        click.echo(f"  {number} experts, {length} tokens, {at_once} at once: {cells[-1].rate:.3f} queries/s")
    for name in names:
        engine.unload(name)
    return cells


def seconds_for(known: Cell, number: int, length: int, at_once: int) -> float:
    """A rough guess, and rather too low, from a smaller cell: in the full form every expert reads all tokens, else one
    does."""
    work = (number * length) / (known.experts * known.prompt) if known.kind == "full" else length / known.prompt
    return at_once / known.rate * work


async def run(
    engine: VllmEngine, query: Any, names: list[str], length: int, at_once: int, seconds: float, activation: Activation
) -> tuple[int, float, float]:
    """Queries answered, in how many seconds, and the median time of one."""
    times: list[float] = []
    began = time.perf_counter()

    async def caller() -> None:
        while True:
            started = time.perf_counter()
            await query(engine, prompt_of(length, activation), names)
            times.append(time.perf_counter() - started)
            if time.perf_counter() - began > seconds:
                return

    await asyncio.gather(*(caller() for _ in range(at_once)))
    return len(times), time.perf_counter() - began, statistics.median(times)


async def route(engine: VllmEngine, prompt: list[int], names: list[str]) -> None:
    """All decisions, then the first token of the surest expert's answer."""
    decisions = await engine.decide(prompt, names)
    await answer(engine, prompt, [names[decisions.index(max(decisions))]])


async def answer(engine: VllmEngine, prompt: list[int], names: list[str]) -> None:
    async for _ in engine.generate(GenerateRequest(tuple(prompt), names[0], SamplingParams(1))):
        pass


def prompt_of(length: int, activation: Activation) -> list[int]:
    """Random tokens and the generation prompt."""
    draw = random.Random(next(SEEDS))
    start = [draw.randrange(1000, 40000) for _ in range(length - len(activation.generation_prompt))]
    return [*start, *activation.generation_prompt]


def rate_of(cells: list[Cell], kind: str, experts: int, prompt: int, concurrency: int) -> float | None:
    for cell in cells:
        if (cell.kind, cell.experts, cell.prompt, cell.concurrency) == (kind, experts, prompt, concurrency):
            return cell.rate
    return None


def report(cells: list[Cell]) -> dict[str, Any]:
    return {
        "cells": [{**asdict(cell), "queries_per_s": round(cell.rate, 4)} for cell in cells],
        "ratios": ratios(cells),
    }


def ratios(cells: list[Cell]) -> list[dict[str, Any]]:
    """Of the activated form's rate to the others', where both were measured."""
    rows = []
    for cell in cells:
        if cell.kind == "activated":
            full = rate_of(cells, "full", cell.experts, cell.prompt, cell.concurrency)
            oracle = rate_of(cells, "oracle", 1, cell.prompt, cell.concurrency)
            rows.append(
                {
                    "experts": cell.experts,
                    "prompt": cell.prompt,
                    "concurrency": cell.concurrency,
                    "over_full": full and round(cell.rate / full, 2),
                    "over_oracle": oracle and round(cell.rate / oracle, 3),
                }
            )
    return rows


def as_table(cells: list[Cell]) -> str:
    head = ["experts", "prompt", "at once", *(f"{kind}/s" for kind in KINDS), "first token", "x full", "x oracle"]
    rows = []
    for ratio in ratios(cells):
        where = ratio["experts"], ratio["prompt"], ratio["concurrency"]
        rates = [rate_of(cells, kind, 1 if kind == "oracle" else where[0], *where[1:]) for kind in KINDS]
        first = next(
            c.first_token_s for c in cells if (c.kind, c.experts, c.prompt, c.concurrency) == (KINDS[0], *where)
        )
        rows.append(
            [
                *map(str, where),
                *("" if rate is None else f"{rate:.3f}" for rate in rates),
                f"{first * 1000:.0f} ms",
                "" if ratio["over_full"] is None else f"{ratio['over_full']:.1f}",
                "" if ratio["over_oracle"] is None else f"{ratio['over_oracle']:.2f}",
            ]
        )
    return table(head, rows)


if __name__ == "__main__":
    main()
