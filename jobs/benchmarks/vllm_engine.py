"""Routing on vLLM: queries a second, from prompt to the first token of the right expert's answer.

    activated   see_ray's engine: the prompt is prefilled once, each of N experts decides on one token after it, the
                winner writes
    full        vLLM's own multi-LoRA with full-form experts: each of N prefills the whole prompt
    oracle      the right expert is known: prompt and first token, no decision

Each query has a prompt of its own, of random tokens, so that nothing is cached from one to the next. A cell runs for
`--seconds`, and until each of its `--concurrency` callers has had one answer. A cell that would take longer than
`--limit`, estimated from smaller ones of its kind, is left out. Prints a table; --out writes JSON.

    python jobs/benchmarks/vllm_engine.py --experts 1,10,50 --prompts 100,400,1500 --concurrency 1,16,64 --out vllm.json
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from bench_options import Names, Numbers, out_option, settings_option, write_json
from random_adapter import write_adapter

from see_ray.cli.render import table
from see_ray.cli.run import run
from see_ray.config import load_config
from see_ray.engine.interface import Expert, GenerateRequest, SamplingParams
from see_ray.engine.vllm.engine import VllmEngine
from see_ray.models.activation import Activation, activation_of
from see_ray.models.base_model import find, load_model, load_tokenizer

KINDS = ("activated", "full", "oracle")

SEEDS = itertools.count()
"""A seed for each prompt of a run."""


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        kind: of KINDS.
        experts, prompt, concurrency: numbers of experts, of tokens of a prompt, and of callers.
        queries: answered within `seconds`.
        first_token_s: median seconds from query to first token.
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


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    experts: list[int]
    prompts: list[int]
    concurrency: list[int]
    kinds: list[str]
    rank: int
    seconds: float
    limit: float


@click.command()
@click.option("--experts", type=Numbers(), default="1,10,50", show_default=True, help="Numbers of experts.")
@click.option("--prompts", type=Numbers(), default="100,400,1500", show_default=True, help="Tokens of a prompt.")
@click.option("--concurrency", type=Numbers(), default="1,16,64", show_default=True, help="Concurrent callers.")
@click.option("--kinds", type=Names(), default=",".join(KINDS), show_default=True, help="What to run.")
@click.option("--rank", default=16, show_default=True, help="LoRA rank; all linear layers.")
@click.option("--seconds", default=10.0, show_default=True, help="How long a cell runs.")
@click.option("--limit", default=60.0, show_default=True, help="A cell that is expected to take longer is left out.")
@out_option
@settings_option
def main(out: Path | None, settings: tuple[str, ...], **options: Any) -> None:
    """Measure the vLLM engine."""
    chosen = Options(**options)
    config = load_config(None, ["base_model.max_length=2048", *settings])
    base = find(config.base_model)
    activation = activation_of(load_tokenizer(base), config.base_model, config.fit)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        write_adapter(load_model(base, config.base_model), adapter, chosen.rank, seed=0)
        engine = VllmEngine(
            base, config.base_model, experts=max(chosen.experts), max_rank=chosen.rank, max_num_seqs=128
        )
        try:
            for kind in chosen.kinds:
                cells += measure(engine, kind, adapter, activation, chosen)
                write_json(report(cells), out)
        finally:
            engine.close()
    click.echo(as_table(cells))


def measure(engine: VllmEngine, kind: str, adapter: Path, activation: Activation, options: Options) -> list[Cell]:
    """All cells of one kind that fit into the time limit."""
    if kind == "full":
        activation = replace(activation, tokens=None)
    numbers = [1] if kind == "oracle" else sorted(options.experts)
    names = [f"expert-{number}" for number in range(numbers[-1])]
    click.echo(f"{kind}: loading {len(names)} adapters")
    for name in names:
        engine.load(Expert(name, adapter, activation))
    query = answer if kind == "oracle" else route
    lengths = sorted(options.prompts)
    asyncio.run(query(engine, random_prompt(lengths[0], activation), names[:1]))  # warm up
    cells: list[Cell] = []
    for experts, length, callers in itertools.product(numbers, lengths, sorted(options.concurrency)):
        description = f"  {experts} experts, {length} tokens, {callers} at once"
        expected = min((expected_s(cell, experts, length, callers) for cell in cells), default=0.0)
        if expected > options.limit:
            click.echo(f"{description}: left out, about {expected:.0f} s")
            continue
        prompts = (random_prompt(length, activation) for _ in itertools.count())
        figures = asyncio.run(run_callers(engine, query, names[:experts], prompts, callers, options.seconds))
        cells.append(Cell(kind, experts, length, callers, *figures))
        click.echo(f"{description}: {cells[-1].rate:.3f} queries/s")
    for name in names:
        engine.unload(name)
    return cells


def expected_s(smaller: Cell, experts: int, length: int, callers: int) -> float:
    """A rough lower estimate from a smaller cell. In the full form every expert prefills all tokens, else one does."""
    factor = length / smaller.prompt
    if smaller.kind == "full":
        factor *= experts / smaller.experts
    return callers / smaller.rate * factor


Query = Callable[[VllmEngine, list[int], list[str]], Awaitable[None]]


async def run_callers(
    engine: VllmEngine, query: Query, names: list[str], prompts: Iterator[list[int]], callers: int, seconds: float
) -> tuple[int, float, float]:
    """Queries answered, in how many seconds, and the median seconds of one."""
    times: list[float] = []
    started = time.perf_counter()

    async def caller() -> None:
        while True:
            sent = time.perf_counter()
            await query(engine, next(prompts), names)
            times.append(time.perf_counter() - sent)
            if time.perf_counter() - started > seconds:
                return

    await asyncio.gather(*(caller() for _ in range(callers)))
    return len(times), time.perf_counter() - started, statistics.median(times)


async def route(engine: VllmEngine, prompt: list[int], names: list[str]) -> None:
    """All decisions, then the first token of the answer of the expert with the highest P(accept)."""
    decisions = await engine.decide(prompt, names)
    await answer(engine, prompt, [names[decisions.index(max(decisions))]])


async def answer(engine: VllmEngine, prompt: list[int], names: list[str]) -> None:
    """The first token of the first expert's answer."""
    async for _ in engine.generate(GenerateRequest(tuple(prompt), names[0], SamplingParams(1))):
        pass


def random_prompt(length: int, activation: Activation) -> list[int]:
    """Random tokens and the generation prompt, `length` tokens together."""
    rng = random.Random(next(SEEDS))
    start = [rng.randrange(1000, 40000) for _ in range(length - len(activation.generation_prompt))]
    return [*start, *activation.generation_prompt]


def rate_of(cells: list[Cell], kind: str, experts: int, prompt: int, concurrency: int) -> float | None:
    """Queries a second of a cell; None if it was not measured."""
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
    """The activated form's rate over the others', where both were measured."""
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
        size = ratio["experts"], ratio["prompt"], ratio["concurrency"]
        rates = [rate_of(cells, kind, 1 if kind == "oracle" else size[0], *size[1:]) for kind in KINDS]
        first_token_s = next(
            cell.first_token_s
            for cell in cells
            if (cell.kind, cell.experts, cell.prompt, cell.concurrency) == ("activated", *size)
        )
        rows.append(
            [
                *map(str, size),
                *("" if rate is None else f"{rate:.3f}" for rate in rates),
                f"{first_token_s * 1000:.0f} ms",
                "" if ratio["over_full"] is None else f"{ratio['over_full']:.1f}",
                "" if ratio["over_oracle"] is None else f"{ratio['over_oracle']:.2f}",
            ]
        )
    return table(head, rows)


if __name__ == "__main__":
    run(main)
