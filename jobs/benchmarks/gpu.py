"""What the embedded engine and a fit in one process cost on one GPU: routing, decoding, fitting, memory.

Random weights in bfloat16 of a Llama shape, random LoRA adapters and random prompts: cost does not depend on what they
learned. Neither Ray nor a model hub nor a tokenizer is needed. Times are medians of repeated runs, taken in turns, with
the device synchronized before and after each; the first run of each warms up and is dropped.

    fit       optimizer steps of see_ray's activated and full form (`fit.local`), and of a plain loop over PEFT and
              AdamW on the same rows; the activated form reads its prefixes once, before the steps
    memory    weights, keys and values, adapters
    routing   milliseconds until it is decided who answers and the first token is there, with N experts:
                  oracle      the caller names the expert: no routing
                  activated   all N decide over one prefix, and the winner goes on from it
                  full        ordinary LoRA on the same engine: N prefills
                  peft_loop   the same with transformers and PEFT: set_adapter and one forward for each expert
    decode    tokens/s of answers written together: by experts in turn, by the base model, by transformers' `generate`;
              and the limit if the weights were read once a step at the copy bandwidth, and nothing else

--out is written after every cell. After --budget-s no further cell begins; each shape may take an even share of what
is left of it. In the end the tables are printed as Markdown.

    python jobs/benchmarks/gpu.py --shapes 1b,8b --repeats 3 --budget-s 300
    python jobs/benchmarks/gpu.py --shapes tiny --repeats 1                     # a trial, also without a GPU
"""

from __future__ import annotations

import asyncio
import copy
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
import transformers
from gpu_fit import fitting
from peft import PeftModel
from random_llama import (
    ACTIVATION,
    RANK,
    SHAPES,
    allocated,
    device,
    free,
    now,
    random_model,
    random_tokens,
    write_adapter,
)

from see_ray.config import BaseModelConfig
from see_ray.engine.engine import EmbeddedEngine
from see_ray.engine.interface import Expert, GenerateRequest, SamplingParams
from see_ray.models.activation import p_accept
from see_ray.models.base_model import BaseModel
from see_ray.models.prefix_kv import kv_bytes_per_token

Cell = dict[str, Any]
Act = Callable[[], Awaitable[Any]]

PEFT_AT_MOST = 10  # experts up to which the PEFT loop is run; above, its cell stays empty
DECODE_PROMPT, DECODE_TOKENS = 128, 32
KV_GB = 12.0
COLUMNS = {
    "routing": "shape experts prompt oracle_ms activated_ms full_ms peft_loop_ms most_apart",
    "decode": "shape batch experts_per_s base_per_s generate_per_s limit_per_s kv_slots_gb",
    "fit": "shape fit step_ms steps_per_s prefix_s steps total_s peak_gb",
    "memory": "shape experts weights_gb kv_kb_per_token adapter_mb adapters_gb load_ms_each",
}


def request(prompt: Sequence[int], expert: str | None, tokens: int) -> GenerateRequest:
    """An answer of exactly `tokens` tokens."""
    return GenerateRequest(tuple(prompt), expert, SamplingParams(tokens, ignore_eos=True))


@click.command()
@click.option("--shapes", default="1b,8b", show_default=True, help=f"Of {', '.join(SHAPES)}.")
@click.option("--repeats", default=3, show_default=True, help="Runs of each; the tables have medians.")
@click.option("--budget-s", default=600.0, show_default=True, help="Seconds after which no further cell begins.")
@click.option("--routing", default="10x400,50x400,1x400,10x2000,50x2000,1x2000", show_default=True, help="NxTOKENS.")
@click.option("--batches", default="16,1,64", show_default=True, help="Answers decoded together.")
@click.option("--fits", default="activated,full,peft", show_default=True, help="Kinds of fit.")
@click.option("--max-num-batched-tokens", default=4096, show_default=True, help="Of the engine.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("gpu.json"), show_default=True)
def main(
    shapes: str,
    repeats: int,
    budget_s: float,
    routing: str,
    batches: str,
    fits: str,
    max_num_batched_tokens: int,
    out: Path,
) -> None:
    run = Run(out, repeats, budget_s)
    run.report["setup"] |= {"repeats": repeats, "max_num_batched_tokens": max_num_batched_tokens, "rank": RANK}
    names = shapes.split(",")
    pairs = [(int(count), int(length)) for count, _, length in (text.partition("x") for text in listed(routing))]
    for number, name in enumerate(names):
        run.share_among(len(names) - number)
        model = random_model(name)
        # Modules of their own on the same weights: the engine changes its model's.
        plain = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for kind in listed(fits):
                run.cell("fit", {"shape": name, "fit": kind}, partial(fitting, plain, kind, folder / kind))
            bench = Bench(model, plain, folder, max_num_batched_tokens, run)
            most = max((count for count, _ in pairs), default=1)
            run.cell("memory", {"shape": name, "experts": most}, partial(bench.load, most))
            for count, length in pairs:
                key = {"shape": name, "experts": count, "prompt": length}
                run.cell("routing", key, partial(bench.routing, count, length))
            for rows in map(int, listed(batches)):
                run.cell("decode", {"shape": name, "batch": rows}, partial(bench.decode, rows))
        del bench, model, plain
        free()
    print(markdown(run.report), flush=True)


class Run:
    """The report, written after every cell, and the time that is left."""

    def __init__(self, out: Path, repeats: int, budget: float):
        self._out, self._repeats = out, repeats
        self._end = self._deadline = time.perf_counter() + budget
        self.report: dict[str, Any] = {"setup": setup()} | {key: [] for key in (*COLUMNS, "left_out", "failed")}

    def share_among(self, shapes: int) -> None:
        """Give the next shape an even share of the time left for so many."""
        self._deadline = time.perf_counter() + (self._end - time.perf_counter()) / shapes

    def cell(self, table: str, key: Cell, work: Callable[[], Cell]) -> None:
        """Measure one cell, unless there is no time; a failure is noted, and the run goes on."""
        name, began = " ".join(map(str, (table, *key.values()))), time.perf_counter()
        if began > self._deadline:
            self.report["left_out"].append(name)
        else:
            try:
                self.report[table].append(key | work())
                print(f"{time.perf_counter() - began:6.1f} s  {name}: {self.report[table][-1]}", flush=True)
            except Exception as error:
                self.report["failed"].append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
                traceback.print_exc()
            free()
        self._out.write_text(json.dumps(self.report, indent=2) + "\n", encoding="utf-8")

    async def seconds(self, ways: dict[str, Act]) -> dict[str, float]:
        """Median seconds of each way, in turns; a way that gives a number is timed by that number."""
        times: dict[str, list[float]] = {kind: [] for kind in ways}
        for repeat in range(self._repeats + 1):
            if repeat > 1 and time.perf_counter() > self._deadline:
                break
            for kind, act in ways.items():
                began = now()
                measured = await act()
                times[kind].append(measured if isinstance(measured, float) else now() - began)
        return {kind: statistics.median(each[1:]) for kind, each in times.items()}


class Bench:
    """An engine with random experts: `e0` and so on; in the full form `full0` and so on, from the same folders.

    Args:
        model: of the engine.
        plain: what the engine is compared with.
        folder: gets the adapters.
        max_num_batched_tokens: of the engine.
        run: for the times.
    """

    def __init__(self, model: Any, plain: Any, folder: Path, max_num_batched_tokens: int, run: Run):
        self._plain, self._folder, self._run = plain, folder, run
        self._peft: Any = None
        self._weights = sum(p.nbytes for p in model.parameters())
        # Of the input embedding a step reads one row a token, unless it is the output layer, too.
        self._read = self._weights - (
            0 if model.config.tie_word_embeddings else model.get_input_embeddings().weight.nbytes
        )
        self._kv = kv_bytes_per_token(model, model.dtype)
        with mock.patch("see_ray.engine.model_runner.load_model", return_value=model):
            base = BaseModel("random", folder, "")
            self._engine = EmbeddedEngine(
                base, BaseModelConfig(), kv_gb=KV_GB, max_num_batched_tokens=max_num_batched_tokens
            )

    def load(self, count: int) -> Cell:
        """Make and load that many experts; what they take beside the weights."""
        before, seconds = allocated(), 0.0
        for number in range(count):
            folder = self._folder / f"e{number}"
            size = write_adapter(self._plain, folder, number)
            began = now()
            self._engine.load(Expert(folder.name, folder, ACTIVATION))
            seconds += now() - began
        return {
            "weights_gb": round(self._weights / 1e9, 3),
            "kv_kb_per_token": round(self._kv / 1e3, 2),
            "adapter_mb": round(size / 1e6, 2),
            "adapters_gb": round((allocated() - before) / 1e9, 3),
            "load_ms_each": round(seconds / count * 1000, 1),
        }

    def routing(self, count: int, length: int) -> Cell:
        """Milliseconds of each way, a new prompt each time; and how far the decisions of the engine in the full form
        and of PEFT lie apart for the same prompt, which should be bfloat16's rounding."""
        engine, names, full = self._engine, [f"e{n}" for n in range(count)], [f"full{n}" for n in range(count)]
        for name, folder in zip(full, names, strict=True):
            if name not in engine.experts:
                engine.load(Expert(name, self._folder / folder, replace(ACTIVATION, tokens=None)))

        async def oracle() -> None:
            await anext(engine.generate(request(self._prompt(length), names[count // 2], 1)))

        async def activated() -> None:
            prompt = self._prompt(length)
            decisions = await engine.decide(prompt, names, fallback=True)
            await anext(engine.generate(request(prompt, names[decisions.index(max(decisions))], 1)))

        async def full_form(prompt: list[int] | None = None) -> list[float]:
            prompt = prompt or self._prompt(length)
            decisions = [(await engine.decide(prompt, [name]))[0] for name in full]
            await anext(engine.generate(request(prompt, full[-1], 1)))
            return decisions

        async def peft_loop(prompt: list[int] | None = None) -> list[float]:
            return self._loop_over_peft(prompt or self._prompt(length), names)

        async def every() -> Cell:
            ways: dict[str, Act] = {"oracle": oracle, "activated": activated, "full": full_form}
            if count <= PEFT_AT_MOST:
                self._with_peft(names)
                ways["peft_loop"] = peft_loop
            figures = {
                f"{kind}_ms": round(seconds * 1000, 2) for kind, seconds in (await self._run.seconds(ways)).items()
            }
            if "peft_loop" in ways:
                both = zip(await full_form(prompt := self._prompt(length)), await peft_loop(prompt), strict=True)
                figures["most_apart"] = round(max(abs(a - b) for a, b in both), 4)
            return figures

        return asyncio.run(every())

    def decode(self, rows: int) -> Cell:
        """Tokens/s of that many answers together, from the last one's first token to the first one's last."""
        experts = [name for name in self._engine.experts if name.startswith("e")]
        plain, self._peft = self._peft.unload() if self._peft else self._plain, None

        async def ours(writers: Sequence[str | None]) -> float:
            async def one(number: int) -> list[float]:
                prompt, writer = self._prompt(DECODE_PROMPT), writers[number % len(writers)]
                return [
                    time.perf_counter() async for _ in self._engine.generate(request(prompt, writer, DECODE_TOKENS))
                ]

            stamps = await asyncio.gather(*map(one, range(rows)))
            began, ended = max(each[0] for each in stamps), min(each[-1] for each in stamps)
            steps = min(sum(began <= stamp <= ended for stamp in each) for each in stamps)
            return (ended - began) / max(1, steps - 1)

        async def generate() -> float:
            ids = torch.tensor([self._prompt(DECODE_PROMPT) for _ in range(rows)], device=plain.device)
            settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}
            stamps = [now()]
            for count in (1, DECODE_TOKENS):
                plain.generate(input_ids=ids, max_new_tokens=count, **settings)
                stamps.append(now())
            return (stamps[2] - stamps[1] - (stamps[1] - stamps[0])) / (DECODE_TOKENS - 1)

        ways: dict[str, Act] = {"experts": partial(ours, experts), "base": partial(ours, [None]), "generate": generate}
        seconds = asyncio.run(self._run.seconds(ways))
        seconds["limit"] = self._read / (self._run.report["setup"]["copy_gb_per_s"] * 1e9)
        slots = round(self._engine.stats()["kv_cache_allocated_tokens"] * self._kv / 1e9, 3)
        return {f"{kind}_per_s": round(rows / each, 1) for kind, each in seconds.items()} | {"kv_slots_gb": slots}

    def _prompt(self, length: int) -> list[int]:
        end = ACTIVATION.generation_prompt
        return [*random_tokens(self._plain, length - len(end)), *end]

    def _with_peft(self, names: Sequence[str]) -> None:
        settings = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
        for name in names:
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self._plain, self._folder / name, adapter_name=name, **settings)
            elif name not in self._peft.peft_config:
                self._peft.load_adapter(self._folder / name, adapter_name=name, **settings)

    @torch.inference_mode()
    def _loop_over_peft(self, prompt: Sequence[int], names: Sequence[str]) -> list[float]:
        """P(accept) of each expert; then the last one's first token after its accept indicator."""
        ids, decisions = torch.tensor([[*prompt]], device=self._plain.device), []
        for name in names:
            self._peft.set_adapter(name)
            output = self._peft(input_ids=ids, use_cache=True, logits_to_keep=1)
            decisions.append(p_accept(*output.logits[0, -1, [ACTIVATION.accept, ACTIVATION.refuse]].float().tolist()))
        accept = torch.full_like(ids[:, :1], ACTIVATION.accept)
        self._peft(input_ids=accept, past_key_values=output.past_key_values, use_cache=True).logits.argmax(-1).item()
        return decisions


def setup() -> Cell:
    """The card, versions, and the copy bandwidth in GB/s, bytes read and written counted."""
    source = torch.randint(256, (1 << (31 if device() == "cuda" else 24),), dtype=torch.uint8, device=device())
    target, stamps = torch.empty_like(source), [now()]
    for _ in range(11):
        target.copy_(source)
        stamps.append(now())
    seconds = statistics.median(later - earlier for earlier, later in pairwise(stamps[1:]))
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy_gb_per_s": round(2 * source.nbytes / seconds / 1e9, 1),
    }


def listed(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


def markdown(report: dict[str, Any]) -> str:
    """The tables; milliseconds of routing with their ratio to the oracle's."""
    lines = [", ".join(f"{key} {value}" for key, value in report["setup"].items())]
    for table, text in COLUMNS.items():
        columns = text.split()
        lines += ["", f"| {' | '.join(columns)} |".replace("_", " "), "| --- " * len(columns) + "|"]
        for row in report[table]:
            cells = [str(row.get(column, "")) for column in columns]
            if "oracle_ms" in row:
                ratios = [
                    f" ({row[c] / row['oracle_ms']:.2f}x)" if c[-3:] == "_ms" and c in row else "" for c in columns
                ]
                cells = [cell + ratio for cell, ratio in zip(cells, ratios, strict=True)]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"Left out for lack of time: {', '.join(report['left_out']) or 'nothing'}."]
    return "\n".join([*lines, *(f"Failed: {what}" for what in report["failed"])])


if __name__ == "__main__":
    main()
