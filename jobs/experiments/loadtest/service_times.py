"""Measuring the service times that the model in `simulate` works with.

With an engine in this process, on as many threads as a replica has, and nothing else to do: work, not queues. What
Serve and Ray add to it is what a live endpoint takes of the processors beyond that.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import pickle
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from loadtest.simulation import Design, Times, work_s
from see_ray.config import Config
from see_ray.cpus import available_cpus
from see_ray.engine.interface import GenerateRequest, SamplingParams
from see_ray.errors import ServingError
from see_ray.models.activation import encode_prompt
from see_ray.models.base_model import find, load_tokenizer
from see_ray.models.cache import cache_dir
from see_ray.store.expert_store import ExpertStore

MANY = 8
"""Experts that decide, and answers that are written, together, to see what each more costs."""

AT_ONCE = 4
"""Prompts that are read together, to see what each more costs."""

REPEATS = 5

IDLE_S = 5.0
"""Seconds for which an endpoint is watched that is asked nothing; again, at most LOOKS times, until what it takes of
the processors changes by less than STEADY of one."""

LOOKS, STEADY = 12, 0.1

SETTLE_S = 0.3
"""Seconds after an answer until all who took part have ended their work for it."""


def measure(config: Config, texts: Sequence[str], *, tokens: int, start: float, node: float) -> Times:
    """Service times of one replica; without hops, see :func:`of_endpoint`.

    Args:
        config: base model, store (which must hold an expert) and threads of a replica.
        texts: queries of the load, all different; five times `AT_ONCE` at least.
        tokens: length of the answers.
        start, node: passed on; see :class:`Times`.

    Raises:
        ServingError: no expert is live.
    """
    import torch

    torch.set_num_threads(config.serve.replica_threads or 1)
    engine, names = _engine(config)
    tokenizer: Any = load_tokenizer(find(config.base_model))
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]

    def decided(row: list[list[int]], experts: int = 1) -> Callable[[], Any]:
        async def decisions() -> None:
            await asyncio.gather(*(engine.decide(prompt, names[:experts]) for prompt in row))

        return lambda: asyncio.run(decisions())

    def read(row: list[list[int]]) -> Callable[[], Any]:
        async def readings() -> None:
            await asyncio.gather(*(engine.read(prompt) for prompt in row))

        return lambda: asyncio.run(readings())

    def answered(count: int, most: int) -> Callable[[], Any]:
        async def answers() -> None:
            await asyncio.gather(*(one() for _ in range(count)))

        async def one() -> None:
            async for _ in engine.generate(GenerateRequest(tuple(prompts[0]), sampling=SamplingParams(most))):
                pass

        return lambda: asyncio.run(answers())

    # What was read or decided is remembered, so each of these asks for something new; beginnings that the queries of
    # a load have in common are known, as they are to a replica after a while.
    share = len(prompts) // 5
    known, alone, apart, crowd, few = (prompts[start * share : (start + 1) * share] for start in range(5))
    for prompt in known:
        decided([prompt], MANY)()
    single = [[prompt] for prompt in alone]
    several = [few[start : start + AT_ONCE] for start in range(0, len(few) - AT_ONCE + 1, AT_ONCE)]
    reads, reads_together = _median([read(row) for row in single]), _median([read(row) for row in several])
    one, together = _median([decided(row) for row in single]), _median([decided(row) for row in several])
    by_all = _median([decided(row, MANY) for row in single])  # the first has decided; the others are new
    arrays = asyncio.run(engine.read(prompts[1]))
    hand = _median([lambda: engine.adopt(prompts[1], pickle.loads(pickle.dumps(arrays, protocol=5)))] * 20)
    token = (_median([answered(1, 1 + tokens)] * REPEATS) - _median([answered(1, 1)] * REPEATS)) / tokens
    many = (_median([answered(MANY, 1 + tokens)] * REPEATS) - _median([answered(MANY, 1)] * REPEATS)) / tokens
    uncrowded = _median([decided([prompt]) for prompt in apart])
    with _others_at_work(config, prompts[0], available_cpus() - 1):
        crowded = _median([decided([prompt]) for prompt in crowd])
    return Times(
        read=reads,
        read_more=max(0.0, reads_together - reads) / (AT_ONCE - 1),
        decide=one,
        decide_more=max(0.0, together - one) / (AT_ONCE - 1),
        decide_also=max(0.0, by_all - one) / (MANY - 2),
        token=max(0.0, token),
        token_more=max(0.0, many - token) / (MANY - 1),
        hop=0.0,
        hand=hand,
        start=start,
        node=node,
        crowd=max(1.0, crowded / uncrowded),
    )


def _engine(config: Config) -> tuple[Any, list[str]]:
    """An engine with copies of a live expert, and their names."""
    from see_ray.engine.engine import EmbeddedEngine
    from see_ray.engine.interface import Expert
    from see_ray.serving.replica import activation_of_manifest

    store = ExpertStore.open(config.store.url)
    if not (live := store.head().experts):
        raise ServingError(f"{store.url} has no live expert to measure; teach one with `see learn`")
    manifest = store.manifest(live[-1])
    folder = store.fetch(live[-1], cache_dir(config.base_model) / "experts")
    engine = EmbeddedEngine(find(config.base_model), config.base_model)
    names = [f"copy{number}" for number in range(MANY)]
    for name in names:
        engine.load(Expert(name, folder, activation_of_manifest(manifest)))
    return engine, names


@contextmanager
def _others_at_work(config: Config, prompt: list[int], count: int) -> Iterator[None]:
    """So many other processes that do nothing but decide."""
    spawn = multiprocessing.get_context("spawn")
    begun = spawn.Semaphore(0)
    others = [
        spawn.Process(target=_decide_on_and_on, args=(config.model_dump(mode="json"), prompt, begun), daemon=True)
        for _ in range(count)
    ]
    try:
        for other in others:
            other.start()
        for _ in others:
            if not begun.acquire(timeout=120):
                raise ServingError("a process that was to compute beside this one did not begin; its output says why")
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def _decide_on_and_on(config: dict[str, Any], prompt: list[int], begun: Any) -> None:
    import torch

    own = Config.model_validate(config)
    torch.set_num_threads(own.serve.replica_threads or 1)
    engine, names = _engine(own)
    for number in itertools.count():
        asyncio.run(engine.decide([number % 1000, number // 1000, *prompt], names[:1]))
        if number == 0:
            begun.release()


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

    idle = _idle()
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


def _idle() -> float:
    """Processors that are busy, once that no longer changes: a replica that waits for an expert may still start."""
    before, last = _busy_s(), float("inf")
    for _ in range(LOOKS):
        time.sleep(IDLE_S)
        now = _busy_s()
        idle, before = (now - before) / IDLE_S, now
        if abs(idle - last) < STEADY:
            break
        last = idle
    return idle


def _busy_s() -> float:
    """Seconds that this machine's processors have worked, for whomever."""
    import psutil

    spent = psutil.cpu_times()
    return float(spent.user + spent.system + getattr(spent, "nice", 0.0))


def _median(works: Sequence[Callable[[], Any]]) -> float:
    return statistics.median(_seconds(work) for work in works)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
