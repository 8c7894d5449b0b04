"""What the endpoint costs: throughput through HTTP, memory of its replicas, and the way without a model.

Ten experts with random adapters, with thresholds such that each takes an equal share of the prompts. For either
topology, in turns, medians of repeated runs:

    alone     requests one at a time
    oracle    --at-once requests at the same time, each naming its expert
    routed    the same requests, routed

Prompts are random words and nothing is kept between requests. In the per_expert topology, also the time of a whole
walk, in which all experts are asked and none accepts: by length of the prompt, `lookahead`, and whether the generalist
reads the prompt once for all (`shared`) or each expert reads it alone. Prints tables; --out writes JSON.

    python jobs/benchmarks/endpoint.py --out bench_endpoint.json
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import httpx

from see_ray import cluster
from see_ray.cli.progress_bar import TerminalListener
from see_ray.cli.render import table
from see_ray.config import Config, load_config
from see_ray.models.activation import activation_of, encode_prompt
from see_ray.models.base_model import find, load_model, load_tokenizer
from see_ray.serving import endpoint
from see_ray.store.expert_store import ExpertStore

TEXT = "the a sea king ship letter parcel red old runs finds says over under house dog night day why river"


@click.command()
@click.option("--experts", default=10, show_default=True, help="Number of experts.")
@click.option("--topologies", default="per_expert,shared", show_default=True, help="What to serve.")
@click.option("--requests", default=32, show_default=True, help="Requests of a run.")
@click.option("--at-once", default=16, show_default=True, help="Requests at the same time.")
@click.option("--prompt-words", default=60, show_default=True, help="Words of a prompt.")
@click.option("--tokens", default=64, show_default=True, help="Tokens of an answer.")
@click.option("--repeats", default=3, show_default=True, help="Runs of each; the table has medians.")
@click.option("--walks", default="60,300,1000", show_default=True, help="Prompts of whole walks, in words.")
@click.option("--lookaheads", default="1,2,4,10", show_default=True, help="Experts that these ask at once.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--set", "settings", multiple=True, metavar="SECTION.FIELD=VALUE", help="A setting.")
def main(
    experts: int, topologies: str, requests: int, at_once: int, prompt_words: int, tokens: int, repeats: int,
    walks: str, lookaheads: str, out: Path | None, settings: list[str],
) -> None:  # fmt: skip
    if requests < 2 * experts:
        raise click.UsageError(f"{requests} requests are too few for {experts} experts; ask for at least {2 * experts}")
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(TEXT.split(), k=prompt_words)) for _ in range(requests)]
    with tempfile.TemporaryDirectory() as folder, TerminalListener() as listener:
        listener.step("Making experts")
        fixed = [f"store.url={folder}/experts", "serve.prefix_tokens=1", "serve.spare=false"]
        base_config = load_config(None, [*fixed, *settings])
        publish(base_config, experts, prompts)
        cluster.connect()
        report: dict[str, Any] = {"experts": experts, "throughput": [], "memory": {}, "hops": {}}
        for topology in topologies.split(","):
            config = load_config(None, [*fixed, f"serve.topology={topology}", *settings])
            listener.step(f"Starting the endpoint, {topology}")
            url = endpoint.start(config)
            report["hops"][topology] = hops(url)
            report["throughput"].append(
                {"topology": topology, **throughput(url, prompts, at_once, tokens, repeats, listener)}
            )
            report["memory"][topology] = memory()
            listener.note(json.dumps(report["throughput"][-1]))
            if topology == "per_expert" and walks:
                lengths, ahead = ([int(item) for item in text.split(",")] for text in (walks, lookaheads))
                report["walks"] = asyncio.run(whole_walks(config, lengths, ahead, repeats, listener))
            endpoint.stop()
            if out:
                out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(as_tables(report))


def publish(config: Config, count: int, prompts: list[str]) -> None:
    """Random experts, the newest with the threshold that leaves each of those behind it an equal share."""
    from bench_routing import write_adapter

    from see_ray.engine.engine import EmbeddedEngine
    from see_ray.engine.interface import Expert

    base = find(config.base_model)
    tokenizer, store = load_tokenizer(base), ExpertStore.open(config.store.url)
    activation = activation_of(tokenizer, config.base_model, config.fit)
    engine = EmbeddedEngine(base, config.base_model)
    left = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in prompts]
    plain, thresholds = load_model(base, config.base_model), {}
    with tempfile.TemporaryDirectory() as temporary:
        folders = {f"e{number}": Path(temporary) / str(number) for number in range(count)}
        for number, (name, folder) in enumerate(folders.items()):
            write_adapter(plain, folder, config.fit.r, seed=number)
            engine.load(Expert(name, folder, activation))
        for place, name in enumerate(reversed(folders)):  # in the order in which they are asked
            decisions = dict(zip(range(len(left)), engine.decide_batch(left, name), strict=True))
            ranked = sorted(decisions.values(), reverse=True)
            share = max(1, round(len(left) / (count + 1 - place)))  # one share is the generalist's
            thresholds[name] = (ranked[share - 1] + ranked[min(share, len(ranked) - 1)]) / 2
            left = [prompt for number, prompt in enumerate(left) if decisions[number] < thresholds[name]]
        for name, folder in folders.items():
            manifest = store.save(
                folder, name=name, task="bench", base_model=base.name, fingerprint=base.fingerprint, form="activated",
                activation_tokens=activation.tokens, generation_prompt=activation.generation_prompt,
                indicator_tokens=(activation.accept, activation.refuse), threshold=thresholds[name], metrics={},
                r=config.fit.r,
            )  # fmt: skip
            store.publish(manifest.ref)


def throughput(
    url: str, prompts: list[str], at_once: int, tokens: int, repeats: int, listener: TerminalListener
) -> dict[str, Any]:
    """Requests a second, and how the requests were routed."""
    routes = asyncio.run(load(url, "see", prompts, at_once, 1))[1]
    named = [f"see:{who}" for who in routes]
    few = max(4, len(prompts) // 8)
    rates: dict[str, list[float]] = {"alone": [], "oracle": [], "routed": []}
    for repeat in range(repeats):
        listener.progress("asking", repeat, repeats)
        seconds, _ = asyncio.run(load(url, named[:few], prompts[:few], 1, tokens))
        rates["alone"].append(few / seconds)
        for kind, models in (("oracle", named), ("routed", "see")):
            seconds, _ = asyncio.run(load(url, models, prompts, at_once, tokens))
            rates[kind].append(len(prompts) / seconds)
    found = {f"{kind}_per_s": round(statistics.median(rate), 3) for kind, rate in rates.items()}
    ratios = {
        "routed_over_oracle": round(found["routed_per_s"] / found["oracle_per_s"], 3),
        "routed_over_alone": round(found["routed_per_s"] / found["alone_per_s"], 3),
    }
    return {**found, **ratios, "answered_by": {who: routes.count(who) for who in sorted(set(routes))}}


async def load(
    url: str, models: str | list[str], prompts: list[str], at_once: int, tokens: int
) -> tuple[float, list[str]]:
    """Ask all prompts, `at_once` at a time; seconds, and who answered each."""
    limit, who = asyncio.Semaphore(at_once), [""] * len(prompts)
    async with httpx.AsyncClient(timeout=600) as client:

        async def one(number: int) -> None:
            model = models if isinstance(models, str) else models[number]
            question = [{"role": "user", "content": prompts[number]}]
            async with limit:
                answer = await client.post(
                    f"{url}/v1/chat/completions",
                    json={"model": model, "messages": question, "max_tokens": tokens, "ignore_eos": True},
                )
            who[number] = answer.raise_for_status().headers["x-see-expert"]

        began = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(len(prompts))))
        return time.perf_counter() - began, who


async def whole_walks(
    config: Config, lengths: list[int], lookaheads: list[int], repeats: int, listener: TerminalListener
) -> list[dict[str, Any]]:
    """Milliseconds until all experts have passed, medians, in turns."""
    from ray import serve

    from see_ray.serving.topology import PerExpert

    deployer, draw = serve.get_deployment_handle("Deployer", "see"), random.Random(1)
    ways = {
        (ahead, share): PerExpert(
            config.serve.model_copy(update={"lookahead": ahead, "share_prefix": share == "shared"}), deployer
        )
        for ahead in lookaheads
        for share in ("shared", "alone")
    }
    live = await next(iter(ways.values())).live()
    nobody = live.with_(experts=tuple(replace(expert, threshold=2.0) for expert in live.experts))
    tokenizer, rows = load_tokenizer(find(config.base_model)), []
    for words in lengths:
        times: dict[tuple[int, str], list[float]] = {way: [] for way in ways}
        for repeat in range(repeats):
            listener.progress(f"walks of {words} words", repeat, repeats)
            for way, topology in ways.items():
                text = " ".join(draw.choices(TEXT.split(), k=words))
                prompt = encode_prompt(tokenizer, [{"role": "user", "content": text}])
                times[way].append((await topology.route(nobody, prompt, None)).ms)
        for (ahead, share), each in times.items():
            row = {"prompt_tokens": len(prompt), "lookahead": ahead, "prefix": share}
            rows.append({**row, "ms": round(statistics.median(each), 1)})
    return rows


def hops(url: str, count: int = 200) -> dict[str, float]:
    """Milliseconds of HTTP requests that no model answers, and of calls over a deployment handle."""
    from ray import serve

    app = next(name for name in serve.status().applications if name in ("see-generalist", "see-ensemble"))
    handle = serve.get_app_handle(app)
    times: dict[str, list[float]] = {"http": [], "handle": []}
    with httpx.Client() as client:
        for _ in range(count):
            began = time.perf_counter()
            client.get(f"{url}/v1/models").raise_for_status()
            times["http"].append((time.perf_counter() - began) * 1000)
            began = time.perf_counter()
            handle.about.remote().result()
            times["handle"].append((time.perf_counter() - began) * 1000)
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
        "rss_of_one_mb": round(sizes[0][1]),  # alone on its host, a replica's PSS would be its RSS
        "pss_over_one": round(sum(pss for pss, _ in sizes) / sizes[0][1], 2),
    }


def as_tables(report: dict[str, Any]) -> str:
    keys = ["alone_per_s", "oracle_per_s", "routed_per_s", "routed_over_oracle", "routed_over_alone"]
    rates = [[row["topology"], *(f"{row[key]:.2f}" for key in keys)] for row in report["throughput"]]
    parts = [table(["topology", "alone/s", "oracle/s", "routed/s", "routed/oracle", "routed/alone"], rates)]
    walks = report.get("walks", [])
    if walks:
        ways = [f"{ahead} {share}" for ahead in {row["lookahead"]: 0 for row in walks} for share in ("shared", "alone")]
        times = {(row["prompt_tokens"], f"{row['lookahead']} {row['prefix']}"): row["ms"] for row in walks}
        lines = [
            [str(n), *(f"{times[n, way]:.0f}" for way in ways)] for n in {row["prompt_tokens"]: 0 for row in walks}
        ]
        parts += ["whole walks, ms, by lookahead and prefix:", table(["prompt", *ways], lines)]
    for name in ("memory", "hops"):
        for topology, row in report[name].items():
            parts.append(f"{name}, {topology}: " + ", ".join(f"{key} {value}" for key, value in row.items()))
    return "\n".join(parts)


if __name__ == "__main__":
    main()
