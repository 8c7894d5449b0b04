"""What the endpoint costs: throughput through HTTP, memory of its replicas, latency without a model.

Ten experts with random adapters, with thresholds such that each accepts an equal share of the prompts. For either
topology, in turns, medians of repeated runs:

    alone     requests one at a time
    oracle    --at-once concurrent requests, each naming its expert
    routed    the same requests, routed

Prompts are random words, and nothing is cached between requests. In the per_expert topology also the time of a whole
walk, in which all experts are asked and none accepts: by length of the prompt, `lookahead`, and whether the generalist
prefills the prompt once for all (`shared`) or each expert prefills it (`alone`). Prints tables; --out writes JSON.

    python jobs/benchmarks/endpoint.py --out bench_endpoint.json
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import httpx
from bench_options import Names, Numbers, out_option, settings_option, write_json
from random_adapter import write_adapter

from see_ray import cluster
from see_ray.cli.progress_bar import TerminalListener
from see_ray.cli.render import table
from see_ray.cli.run import run
from see_ray.config import Config, load_config
from see_ray.engine.engine import EmbeddedEngine
from see_ray.engine.interface import Expert
from see_ray.models.activation import Activation, activation_of, encode_prompt
from see_ray.models.base_model import find, load_model, load_tokenizer
from see_ray.serving import endpoint
from see_ray.store.expert_store import ExpertStore

WORDS = "the a sea king ship letter parcel red old runs finds says over under house dog night day why river"
KINDS = ("alone", "oracle", "routed")


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    experts: int
    topologies: list[str]
    requests: int
    at_once: int
    prompt_words: int
    tokens: int
    repeats: int
    walks: list[int]
    lookaheads: list[int]


@click.command()
@click.option("--experts", default=10, show_default=True, help="Number of experts.")
@click.option("--topologies", type=Names(), default="per_expert,shared", show_default=True, help="Of the endpoint.")
@click.option("--requests", default=32, show_default=True, help="Requests of a run.")
@click.option("--at-once", default=16, show_default=True, help="Concurrent requests.")
@click.option("--prompt-words", default=60, show_default=True, help="Words of a prompt.")
@click.option("--tokens", default=64, show_default=True, help="Tokens of an answer.")
@click.option("--repeats", default=3, show_default=True, help="Runs of each; the table has medians.")
@click.option("--walks", type=Numbers(), default="60,300,1000", show_default=True, help="Words of walks' prompts.")
@click.option("--lookaheads", type=Numbers(), default="1,2,4,10", show_default=True, help="`serve.lookahead` of walks.")
@out_option
@settings_option
def main(out: Path | None, settings: tuple[str, ...], **options: Any) -> None:
    """Measure the endpoint in both topologies."""
    chosen = Options(**options)
    if chosen.requests < 2 * chosen.experts:
        needed = 2 * chosen.experts
        raise click.UsageError(f"{chosen.requests} requests are too few for {chosen.experts} experts; ask for {needed}")
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(WORDS.split(), k=chosen.prompt_words)) for _ in range(chosen.requests)]
    report: dict[str, Any] = {"experts": chosen.experts, "throughput": [], "memory": {}, "hops": {}}
    with tempfile.TemporaryDirectory() as folder, TerminalListener() as listener:
        fixed = [f"store.url={folder}/experts", "serve.prefix_tokens=1", "serve.spare=false"]
        listener.step("Writing and publishing experts")
        publish(load_config(None, [*fixed, *settings]), chosen.experts, prompts)
        cluster.connect()
        for topology in chosen.topologies:
            config = load_config(None, [*fixed, f"serve.topology={topology}", *settings])
            listener.step(f"Starting the endpoint, {topology}")
            url = endpoint.start(config)
            report["hops"][topology] = hops(url)
            report["throughput"].append({"topology": topology, **throughput(url, prompts, chosen, listener)})
            report["memory"][topology] = memory()
            listener.note(str(report["throughput"][-1]))
            if topology == "per_expert" and chosen.walks:
                report["walks"] = asyncio.run(whole_walks(config, chosen, listener))
            endpoint.stop()
            write_json(report, out)
    click.echo(as_tables(report))


def publish(config: Config, count: int, prompts: list[str]) -> None:
    """Publish random experts, each with a threshold that it exceeds on an equal share of the prompts."""
    base = find(config.base_model)
    tokenizer, store = load_tokenizer(base), ExpertStore.open(config.store.url)
    activation = activation_of(tokenizer, config.base_model, config.fit)
    model = load_model(base, config.base_model)
    token_ids = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in prompts]
    with tempfile.TemporaryDirectory() as temporary:
        folders = {f"e{number}": Path(temporary) / str(number) for number in range(count)}
        for number, folder in enumerate(folders.values()):
            write_adapter(model, folder, config.fit.r, seed=number)
        thresholds = equal_share_thresholds(config, folders, activation, token_ids)
        for name, folder in folders.items():
            manifest = store.save(
                folder,
                name=name,
                task="bench",
                base_model=base.name,
                fingerprint=base.fingerprint,
                form="activated",
                activation_tokens=activation.tokens,
                generation_prompt=activation.generation_prompt,
                indicator_tokens=(activation.accept, activation.refuse),
                threshold=thresholds[name],
                metrics={},
                r=config.fit.r,
            )
            store.publish(manifest.ref)


def equal_share_thresholds(
    config: Config, folders: dict[str, Path], activation: Activation, prompts: list[list[int]]
) -> dict[str, float]:
    """Thresholds with which the experts, newest first, each accept as many prompts; the generalist gets as many."""
    engine = EmbeddedEngine(find(config.base_model), config.base_model)
    for name, folder in folders.items():
        engine.load(Expert(name, folder, activation))
    remaining, thresholds = prompts, {}
    for place, name in enumerate(reversed(folders)):  # in the order in which they are asked
        decisions = engine.decide_batch(remaining, name)
        ranked = sorted(decisions, reverse=True)
        share = max(1, round(len(remaining) / (len(folders) + 1 - place)))
        thresholds[name] = (ranked[share - 1] + ranked[min(share, len(ranked) - 1)]) / 2
        remaining = [prompt for prompt, p in zip(remaining, decisions, strict=True) if p < thresholds[name]]
    return thresholds


def throughput(url: str, prompts: list[str], options: Options, listener: TerminalListener) -> dict[str, Any]:
    """Requests a second of each kind, medians, and how many requests each expert answered."""
    _, answered_by = asyncio.run(send_all(url, ["see"] * len(prompts), prompts, options.at_once, 1))
    named = [f"see:{name}" for name in answered_by]
    few = max(4, len(prompts) // 8)  # one at a time takes long
    runs = {
        "alone": (named[:few], prompts[:few], 1),
        "oracle": (named, prompts, options.at_once),
        "routed": (["see"] * len(prompts), prompts, options.at_once),
    }
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for repeat in range(options.repeats):
        listener.progress("asking", repeat, options.repeats)
        for kind, (models, sent, at_once) in runs.items():
            seconds, _ = asyncio.run(send_all(url, models, sent, at_once, options.tokens))
            rates[kind].append(len(sent) / seconds)
    medians = {f"{kind}_per_s": round(statistics.median(rate), 3) for kind, rate in rates.items()}
    return {
        **medians,
        "routed_over_oracle": round(medians["routed_per_s"] / medians["oracle_per_s"], 3),
        "routed_over_alone": round(medians["routed_per_s"] / medians["alone_per_s"], 3),
        "answered_by": {name: answered_by.count(name) for name in sorted(set(answered_by))},
    }


async def send_all(
    url: str, models: list[str], prompts: list[str], at_once: int, tokens: int
) -> tuple[float, list[str]]:
    """Send each prompt to its model, `at_once` at a time; returns seconds, and who answered each."""
    limit = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(timeout=600) as client:

        async def send(model: str, prompt: str) -> str:
            messages = [{"role": "user", "content": prompt}]
            body = {"model": model, "messages": messages, "max_tokens": tokens, "ignore_eos": True}
            async with limit:
                response = await client.post(f"{url}/v1/chat/completions", json=body)
            return response.raise_for_status().headers["x-see-expert"]

        started = time.perf_counter()
        answered_by = await asyncio.gather(*map(send, models, prompts))
        return time.perf_counter() - started, answered_by


async def whole_walks(config: Config, options: Options, listener: TerminalListener) -> list[dict[str, Any]]:
    """Median milliseconds until all experts have passed, in turns."""
    from ray import serve

    from see_ray.serving.topology import PerExpert

    deployer, rng = serve.get_deployment_handle("Deployer", "see"), random.Random(1)
    topologies = {
        (lookahead, prefix): PerExpert(
            config.serve.model_copy(update={"lookahead": lookahead, "share_prefix": prefix == "shared"}), deployer
        )
        for lookahead in options.lookaheads
        for prefix in ("shared", "alone")
    }
    live = await next(iter(topologies.values())).live()
    live = live.with_(experts=tuple(replace(expert, threshold=2.0) for expert in live.experts))  # none accepts
    tokenizer, rows = load_tokenizer(find(config.base_model)), []
    for words in options.walks:
        times: dict[tuple[int, str], list[float]] = {variant: [] for variant in topologies}
        for repeat in range(options.repeats):
            listener.progress(f"walks of {words} words", repeat, options.repeats)
            for variant, topology in topologies.items():
                text = " ".join(rng.choices(WORDS.split(), k=words))
                prompt = encode_prompt(tokenizer, [{"role": "user", "content": text}])
                times[variant].append((await topology.route(live, prompt, None)).ms)
        for (lookahead, prefix), each in times.items():
            row = {"prompt_tokens": len(prompt), "lookahead": lookahead, "prefix": prefix}
            rows.append({**row, "ms": round(statistics.median(each), 1)})
    return rows


def hops(url: str, count: int = 200) -> dict[str, float]:
    """Milliseconds of HTTP requests that need no model, and of calls of a deployment handle: p50 and p99."""
    from ray import serve

    app = next(name for name in serve.status().applications if name in ("see-generalist", "see-ensemble"))
    handle = serve.get_app_handle(app)
    times: dict[str, list[float]] = {"http": [], "handle": []}
    with httpx.Client() as client:
        for _ in range(count):
            started = time.perf_counter()
            client.get(f"{url}/v1/models").raise_for_status()
            times["http"].append((time.perf_counter() - started) * 1000)
            started = time.perf_counter()
            handle.about.remote().result()
            times["handle"].append((time.perf_counter() - started) * 1000)
    return {
        f"{kind}_p{q}_ms": round(statistics.quantiles(each, n=100)[q - 1], 2)
        for kind, each in times.items()
        for q in (50, 99)
    }


def memory() -> dict[str, float]:
    """Proportional set size of the replicas, in megabytes: all, the first one, and their ratio."""
    sizes = []
    for about in endpoint.about_replicas().values():
        text = Path(f"/proc/{about['pid']}/smaps_rollup").read_text(encoding="ascii")
        fields = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
        sizes.append((int(fields["Pss"]) / 1000, int(fields["Rss"]) / 1000))
    return {
        "replicas": len(sizes),
        "pss_mb": round(sum(pss for pss, _ in sizes)),
        "rss_of_one_mb": round(sizes[0][1]),  # the PSS of a replica that shares memory with no other is its RSS
        "pss_over_one": round(sum(pss for pss, _ in sizes) / sizes[0][1], 2),
    }


def as_tables(report: dict[str, Any]) -> str:
    """Throughput, walks, memory and hops."""
    keys = ["alone_per_s", "oracle_per_s", "routed_per_s", "routed_over_oracle", "routed_over_alone"]
    rates = [[row["topology"], *(f"{row[key]:.2f}" for key in keys)] for row in report["throughput"]]
    parts = [table(["topology", "alone/s", "oracle/s", "routed/s", "routed/oracle", "routed/alone"], rates)]
    if report.get("walks"):
        parts += ["whole walks, ms, by lookahead and prefix:", walks_table(report["walks"])]
    for name in ("memory", "hops"):
        for topology, row in report[name].items():
            parts.append(f"{name}, {topology}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    return "\n".join(parts)


def walks_table(walks: list[dict[str, Any]]) -> str:
    """A row for each length of the prompt, a column for each lookahead and prefix."""
    lengths = list(dict.fromkeys(row["prompt_tokens"] for row in walks))
    variants = list(dict.fromkeys((row["lookahead"], row["prefix"]) for row in walks))
    ms = {(row["prompt_tokens"], row["lookahead"], row["prefix"]): row["ms"] for row in walks}
    rows = [[str(length), *(f"{ms[length, *variant]:.0f}" for variant in variants)] for length in lengths]
    return table(["prompt", *(f"{lookahead} {prefix}" for lookahead, prefix in variants)], rows)


if __name__ == "__main__":
    run(main)
