"""Measuring the service times that the model in `simulate` works with.

With an engine in this process, on as many threads as a replica has, and nothing else to do: work, not queues. What
Serve and Ray add to it is what a live endpoint takes of the processors beyond that.
"""

from __future__ import annotations

import asyncio
import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from see_ray.activation import encode_prompt
from see_ray.base_model import cache_dir, find, load_tokenizer
from see_ray.config import Config
from see_ray.errors import ServingError
from see_ray.simulate import Design, Times, work_s
from see_ray.store import ExpertStore

MANY = 8
"""Experts that decide, and answers that are written, together, to see what each more costs."""

AT_ONCE = 4
"""Prompts that are read together, to see what each more costs."""

REPEATS = 5

IDLE_S = 5.0
"""Seconds for which an endpoint is watched that is asked nothing."""

SETTLE_S = 0.3
"""Seconds after an answer until all who took part have ended their work for it."""


def measure(config: Config, texts: Sequence[str], *, tokens: int, start: float, node: float) -> Times:
    """Service times of one replica; without hops, see :func:`of_endpoint`.

    Args:
        config: base model, store (which must hold an expert) and threads of a replica.
        texts: queries of the load, all different; six at least.
        tokens: length of the answers.
        start, node: passed on; see :class:`Times`.

    Raises:
        ServingError: no expert is live.
    """
    import torch

    from see_ray.engine.embedded import EmbeddedEngine
    from see_ray.engine.interface import Expert
    from see_ray.replica import activation_of_manifest

    torch.set_num_threads(config.serve.replica_threads or 1)
    store = ExpertStore.open(config.store.url)
    if not (live := store.head().experts):
        raise ServingError(f"{store.url} has no live expert to measure; teach one with `see learn`")
    manifest = store.manifest(live[-1])
    base = find(config.base_model)
    folder = store.fetch(live[-1], cache_dir(config.base_model) / "experts")
    engine = EmbeddedEngine(base, config.base_model)
    names = [f"copy{number}" for number in range(MANY)]
    for name in names:
        engine.load(Expert(name, folder, activation_of_manifest(manifest)))
    tokenizer: Any = load_tokenizer(base)
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]

    def decided(prompt: list[int], experts: list[str]) -> Callable[[], Any]:
        return lambda: asyncio.run(engine.decide(prompt, experts))

    def decided_at_once(row: list[list[int]]) -> Callable[[], Any]:
        async def decisions() -> None:
            await asyncio.gather(*(engine.decide(prompt, names[:1]) for prompt in row))

        return lambda: asyncio.run(decisions())

    def answered(count: int, most: int) -> Callable[[], Any]:
        async def answers() -> None:
            await asyncio.gather(*(one() for _ in range(count)))

        async def one() -> None:
            async for _ in engine.generate(prompts[0], None, most):
                pass

        return lambda: asyncio.run(answers())

    decided(prompts[0], names)()
    # What was decided is remembered: each of these asks for something new.
    third = len(prompts) // 3
    new = statistics.median(_seconds(decided(prompt, names[:1])) for prompt in prompts[1:third])
    decide = statistics.median(_seconds(decided(prompts[1], [name])) for name in names[1:])
    for prompt in prompts[third : 2 * third]:
        asyncio.run(engine.read(prompt))
    by_all = statistics.median(_seconds(decided(prompt, names)) for prompt in prompts[third : 2 * third])
    at_once = min(AT_ONCE, len(prompts) - 2 * third)
    rows = [prompts[start : start + at_once] for start in range(2 * third, len(prompts) - at_once + 1, at_once)]
    several = statistics.median(_seconds(decided_at_once(row)) for row in rows)
    arrays = asyncio.run(engine.read(prompts[1]))
    hand = _median(lambda: engine.adopt(prompts[1], pickle.loads(pickle.dumps(arrays, protocol=5))), 20)
    token = (_median(answered(1, 1 + tokens)) - _median(answered(1, 1))) / tokens
    many = (_median(answered(MANY, 1 + tokens)) - _median(answered(MANY, 1))) / tokens
    times = Times(
        read=max(0.0, new - decide),
        decide=decide,
        decide_more=max(0.0, by_all - decide) / (MANY - 1),
        token=max(0.0, token),
        token_more=max(0.0, many - token) / (MANY - 1),
        hop=0.0,
        hand=hand,
        start=start,
        node=node,
    )
    further = max(0.0, several - new) / (at_once - 1)
    return replace(times, together=min(1.0, further / (new - times.apass)))


def of_endpoint(url: str, texts: Sequence[str], times: Times, design: Design, *, tokens: int) -> Times:
    """The times with what a live endpoint takes of this machine's processors beside computing: asked nothing (`idle`),
    and for each call of a deployment (`hop`).

    Everything that runs here is counted, so the machine must have nothing else to do.

    Args:
        url: of the endpoint.
        texts: queries, asked one after another.
        times: what its replicas compute.
        design: how it is built.
        tokens: longest answer.

    Raises:
        ServingError: it does not answer.
    """
    import httpx

    before = _busy_s()
    time.sleep(IDLE_S)
    idle = (_busy_s() - before) / IDLE_S
    alone, hops = replace(times, hop=0.0), []
    with httpx.Client(base_url=url, timeout=60) as client:
        for text in texts:
            began, before = time.monotonic(), _busy_s()
            body = {"model": "see", "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
            response = client.post("/v1/chat/completions", json=body)
            if response.status_code != 200:
                raise ServingError(f"{url} answers {response.status_code} while it is measured: {response.text[:300]}")
            time.sleep(SETTLE_S)
            taken = _busy_s() - before - idle * (time.monotonic() - began)
            answer = response.json()
            its = replace(design, tokens=answer["usage"]["completion_tokens"] + 1)
            who = answer["see"]["answered_by"]
            computed = work_s(who, alone, its)
            hops.append((taken - computed) / (work_s(who, replace(alone, hop=1.0), its) - computed))
    return replace(times, hop=max(0.0, statistics.median(hops)), idle=idle)


def _busy_s() -> float:
    """Seconds that this machine's processors have worked, for whomever."""
    import psutil

    spent = psutil.cpu_times()
    return float(spent.user + spent.system + getattr(spent, "nice", 0.0))


def _median(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    return statistics.median(_seconds(work) for _ in range(repeats))


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
