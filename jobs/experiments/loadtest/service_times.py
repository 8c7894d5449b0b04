"""Measures the service times that `loadtest.simulation` works with.

`measure_service_times` runs an engine in this process, with as many threads as a replica has and nothing else to do: it
measures work, not queues. `add_overhead` adds what Serve, Ray and HTTP take of the processors at a live endpoint.
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

from loadtest.simulation import EndpointDesign, ServiceTimes, processor_seconds
from see_ray.config import Config
from see_ray.cpus import available_cpus
from see_ray.engine.interface import GenerateRequest, SamplingParams
from see_ray.errors import ServingError
from see_ray.models.activation import encode_prompt
from see_ray.models.base_model import find, load_tokenizer
from see_ray.models.cache import cache_dir
from see_ray.store.expert_store import ExpertStore

MANY = 8
"""Experts that decide together, and answers that are decoded together, to measure what each further one costs."""

PROMPTS_AT_ONCE = 4
"""Prompts in one batch, to measure what each further one costs."""

REPEATS = 5

IDLE_S = 5.0
"""Seconds between two looks at an idle endpoint. They are repeated until the number of busy processors changes by less
than IDLE_TOLERANCE, IDLE_LOOKS times at most."""

IDLE_LOOKS, IDLE_TOLERANCE = 12, 0.1

SETTLE_S = 0.3
"""Seconds after an answer until all processes have finished their work for it."""

Prompt = list[int]


def measure_service_times(
    config: Config, texts: Sequence[str], *, tokens: int, start: float, node: float
) -> ServiceTimes:
    """Service times of one replica; `hop` and `idle` are 0, see `add_overhead`.

    Args:
        config: base model, store (which must hold an expert) and threads of a replica.
        texts: queries of the load, all different; at least 5 x PROMPTS_AT_ONCE.
        tokens: length of the answers.
        start, node: taken over into the result.

    Raises:
        ServingError: no expert is live.
    """
    import torch

    torch.set_num_threads(config.serve.replica_threads or 1)
    engine = _TimedEngine(config)
    tokenizer: Any = load_tokenizer(find(config.base_model))
    prompts = [encode_prompt(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    # Prefixes and decisions are cached, so each measurement gets prompts that the engine has not seen. What all
    # queries of the load begin with is cached, as it is at a replica after a while.
    share = len(prompts) // 5
    warm_up, alone, uncrowded, crowded, batched = (prompts[i * share : (i + 1) * share] for i in range(5))
    for prompt in warm_up:
        engine.decide([prompt], MANY)
    batches = [batched[i : i + PROMPTS_AT_ONCE] for i in range(0, len(batched) - PROMPTS_AT_ONCE + 1, PROMPTS_AT_ONCE)]
    read = _median_s(lambda prompt: engine.read([prompt]), alone)
    read_batch = _median_s(engine.read, batches)
    decide = _median_s(lambda prompt: engine.decide([prompt]), alone)
    decide_batch = _median_s(engine.decide, batches)
    decide_all = _median_s(lambda prompt: engine.decide([prompt], MANY), alone)  # the first expert's is cached
    hand = engine.handover_s(prompts[1])
    token, token_batch = (engine.token_s(prompts[0], answers, tokens) for answers in (1, MANY))
    undisturbed = _median_s(lambda prompt: engine.decide([prompt]), uncrowded)
    with _other_processes_deciding(config, prompts[0], available_cpus() - 1):
        disturbed = _median_s(lambda prompt: engine.decide([prompt]), crowded)
    return ServiceTimes(
        read=read,
        read_more=max(0.0, read_batch - read) / (PROMPTS_AT_ONCE - 1),
        decide=decide,
        decide_more=max(0.0, decide_batch - decide) / (PROMPTS_AT_ONCE - 1),
        decide_also=max(0.0, decide_all - decide) / (MANY - 2),
        token=max(0.0, token),
        token_more=max(0.0, token_batch - token) / (MANY - 1),
        hop=0.0,
        hand=hand,
        start=start,
        node=node,
        crowd=max(1.0, disturbed / undisturbed),
    )


class _TimedEngine:
    """An engine with copies of a live expert, called from synchronous code.

    Raises:
        ServingError: no expert is live.
    """

    def __init__(self, config: Config):
        from see_ray.engine.engine import EmbeddedEngine
        from see_ray.engine.interface import Expert
        from see_ray.store.expert_files import activation_of_manifest

        store = ExpertStore.open(config.store.url)
        if not (live := store.head().experts):
            raise ServingError(f"{store.url} has no live expert to measure; teach one with `see learn`")
        activation = activation_of_manifest(store.manifest(live[-1]))
        folder = store.fetch(live[-1], cache_dir(config.base_model) / "experts")
        self._engine = EmbeddedEngine(find(config.base_model), config.base_model)
        self._experts = [f"copy{number}" for number in range(MANY)]
        for name in self._experts:
            self._engine.load(Expert(name, folder, activation))

    def read(self, prompts: Sequence[Prompt]) -> None:
        """Prefill prompts together."""

        async def read_all() -> None:
            await asyncio.gather(*(self._engine.export_prefix(prompt) for prompt in prompts))

        asyncio.run(read_all())

    def decide(self, prompts: Sequence[Prompt], experts: int = 1) -> None:
        """Let so many experts decide on prompts together."""

        async def decide_all() -> None:
            await asyncio.gather(*(self._engine.decide(prompt, self._experts[:experts]) for prompt in prompts))

        asyncio.run(decide_all())

    def generate(self, prompt: Prompt, answers: int, tokens: int) -> None:
        """Decode so many answers together."""

        async def one() -> None:
            async for _ in self._engine.generate(GenerateRequest(tuple(prompt), sampling=SamplingParams(tokens))):
                pass

        async def generate_all() -> None:
            await asyncio.gather(*(one() for _ in range(answers)))

        asyncio.run(generate_all())

    def token_s(self, prompt: Prompt, answers: int, tokens: int) -> float:
        """Seconds of one decode step of so many answers."""
        long, short = (
            _median_s(lambda count: self.generate(prompt, answers, count), [count] * REPEATS)
            for count in (1 + tokens, 1)
        )
        return (long - short) / tokens

    def handover_s(self, prompt: Prompt) -> float:
        """Seconds to take over another replica's keys and values of a prompt."""
        arrays = asyncio.run(self._engine.export_prefix(prompt))
        return _median_s(
            lambda prompt: self._engine.import_prefix(prompt, pickle.loads(pickle.dumps(arrays, protocol=5))),
            [prompt] * 20,
        )


@contextmanager
def _other_processes_deciding(config: Config, prompt: Prompt, count: int) -> Iterator[None]:
    """Run so many other processes that decide without pause."""
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Semaphore(0)
    arguments = (config.model_dump(mode="json"), prompt, ready)
    processes = [spawn.Process(target=_decide_forever, args=arguments, daemon=True) for _ in range(count)]
    try:
        for process in processes:
            process.start()
        for _ in processes:
            if not ready.acquire(timeout=120):
                raise ServingError("a process that was to compute beside this one did not begin; its output says why")
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _decide_forever(settings: dict[str, Any], prompt: Prompt, ready: Any) -> None:
    import torch

    config = Config.model_validate(settings)
    torch.set_num_threads(config.serve.replica_threads or 1)
    engine = _TimedEngine(config)
    for number in itertools.count():
        engine.decide([[number % 1000, number // 1000, *prompt]])
        if number == 0:
            ready.release()


def add_overhead(
    url: str, texts: Sequence[str], times: ServiceTimes, design: EndpointDesign, *, tokens: int
) -> ServiceTimes:
    """The times with a live endpoint's overhead on this machine's processors: `idle` and `hop`.

    Everything that runs on the machine is counted, so it must have nothing else to do.

    Args:
        url: of the endpoint.
        texts: queries, sent one after another.
        times: what its replicas compute.
        design: of the endpoint.
        tokens: limit of an answer.

    Raises:
        ServingError: it does not answer.
    """
    import httpx

    idle = _idle_processors()
    computing, hops = replace(times, hop=0.0), []
    with httpx.Client(base_url=url, timeout=60) as client:
        for text in texts:
            started, busy_before = time.monotonic(), _busy_s()
            body = {"model": "see", "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
            response = client.post("/v1/chat/completions", json=body)
            if response.status_code != 200:
                raise ServingError(f"{url} answers {response.status_code} while it is measured: {response.text[:300]}")
            time.sleep(SETTLE_S)
            busy_s = _busy_s() - busy_before - idle * (time.monotonic() - started)
            answer = response.json()
            answered_by = answer["see"]["answered_by"]
            answer_design = replace(design, tokens=answer["usage"]["completion_tokens"] + 1)
            computed_s = processor_seconds(answered_by, computing, answer_design)
            calls = processor_seconds(answered_by, replace(computing, hop=1.0), answer_design) - computed_s
            hops.append((busy_s - computed_s) / calls)
    return replace(times, hop=max(0.0, statistics.median(hops)), idle=idle)


def _idle_processors() -> float:
    """Busy processors of the idle endpoint, once steady: a replica that waits for an expert may still be starting."""
    before, last = _busy_s(), float("inf")
    for _ in range(IDLE_LOOKS):
        time.sleep(IDLE_S)
        now = _busy_s()
        idle, before = (now - before) / IDLE_S, now
        if abs(idle - last) < IDLE_TOLERANCE:
            break
        last = idle
    return idle


def _busy_s() -> float:
    """Seconds for which this machine's processors have worked, for any process."""
    import psutil

    spent = psutil.cpu_times()
    return float(spent.user + spent.system + getattr(spent, "nice", 0.0))


def _median_s(work: Callable[[Any], Any], inputs: Sequence[Any]) -> float:
    """Median seconds of `work` over some inputs."""
    seconds = []
    for item in inputs:
        started = time.perf_counter()
        work(item)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
