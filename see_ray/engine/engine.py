"""The embedded engine: decisions and answers on transformers and PyTorch, in this process.

    requests ──► Scheduler ──► ScheduledBatch ──► ModelRunner ──► results ──► requests
                 event loop                       worker thread

One base model serves all experts. Their requests share forwards: each step prefills prompts, runs the experts'
decision rows where a prompt ends, and decodes one token of every running answer. Decisions and answers continue from
the same keys and values, so each token of a prompt is computed once (`engine.prefix_cache`).

The engine takes and returns token ids; `engine.detokenize` turns them into text.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from see_ray.config import BaseModelConfig
from see_ray.engine.expert_registry import LoadedExpert
from see_ray.engine.interface import Expert, GenerateRequest, PrefixArrays, Token
from see_ray.engine.model_runner import ModelRunner
from see_ray.engine.prefix_cache import DecisionRow, PrefixCache
from see_ray.engine.requests import GenerationRequest, PrefillRequest, expert_name, max_length, unloaded_error
from see_ray.engine.scheduler import Scheduler
from see_ray.errors import ServingError
from see_ray.models.base_model import BaseModel
from see_ray.models.prefix_kv import Prefix

T = TypeVar("T")

MAX_INDICATOR_ROWS = 16
"""Up to this many experts that decide on a prompt also run their accept indicators, if an answer is to follow and the
engine is idle otherwise: the first token of the answer is then known with the decision, at less cost than a step of its
own. Beside other requests the winner alone runs its indicator, together with their next tokens."""

HANDOVER_ROUNDS = 3
"""Rounds of the event loop between two steps. After a decision it takes this many, through `asyncio.gather`, until its
caller has added the request for the answer; the answer then starts in the next step, not in the one after that."""


class EmbeddedEngine:
    """Base model, experts, cached prompts and running answers.

    PyTorch runs on one worker thread, loading included: each thread that calls it has OpenMP threads of its own, and
    where those are more than cores, small operations become many times slower.

    Args:
        base: the base model to load.
        config: its settings (dtype).
        device: `cpu` or a CUDA device; None: a GPU if there is one.
        prefix_tokens: most tokens of cached prompts that no request uses; the last prompt is kept in any case.
        kv_gb: gigabytes for keys and values of running answers; others wait.
        max_num_batched_tokens: most tokens of a step; a longer prompt is prefilled in several, so that running answers
            do not stall.
        nice: added to the niceness of the worker thread, so that short urgent work on the same cores (accepting and
            rejecting requests) goes first. Linux only: elsewhere threads have no niceness of their own.
        on_stats: is called with ("hit", prompt tokens found in the cache), ("miss", prompt tokens to prefill) and
            ("rows", answers that decoded in a step).

    Raises:
        ServingError: the model's attention cannot be replaced by the engine's.
    """

    def __init__(
        self,
        base: BaseModel,
        config: BaseModelConfig,
        *,
        device: str | None = None,
        prefix_tokens: int = 8192,
        kv_gb: float = 4.0,
        max_num_batched_tokens: int = 512,
        nice: int = 0,
        on_stats: Callable[[str, float], None] = lambda name, value: None,
    ):
        # On Linux, threads that this one starts inherit its niceness, OpenMP's included.
        nice = nice if sys.platform == "linux" else 0
        self._thread = ThreadPoolExecutor(1, "engine", initializer=os.nice, initargs=(nice,))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._runner = self._on_thread(lambda: ModelRunner(base, config, device, kv_gb))
        self._prefix_cache = PrefixCache(prefix_tokens)
        self._scheduler = Scheduler(self._prefix_cache, self._runner.kv_cache, max_num_batched_tokens, on_stats)
        self._on_stats = on_stats
        self._loop_task: asyncio.Task[None] | None = None

    @property
    def model(self) -> Any:
        """The transformers model, with the adapters in it."""
        return self._runner.model

    @property
    def eos(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return self._runner.eos

    @property
    def experts(self) -> list[str]:
        """Names of the experts that can be asked."""
        return self._scheduler.experts.names

    def stats(self) -> dict[str, float]:
        """Counts since the start, and current sizes; see `Scheduler.stats`."""
        return self._scheduler.stats()

    def check_health(self) -> None:
        """Nothing to check: the engine lives in this process."""

    # --- experts -------------------------------------------------------------------------------

    def load(self, expert: Expert) -> None:
        """Add an expert, or replace the one of the same name. Requests in progress continue.

        Raises:
            ServingError: its adapter does not fit the base model, or changes nothing. In both cases the answers would
                be the base model's, under the expert's name.
        """
        loaded = LoadedExpert(expert)
        self._on_thread(lambda: self._runner.load_adapter(loaded))
        self._scheduler.add_expert(loaded)

    def unload(self, name: str) -> None:
        """Remove an expert. Its running answers are finished.

        Raises:
            ServingError: there is no expert of that name.
        """
        released = self._scheduler.remove_expert(name)
        self._on_thread(lambda: self._runner.delete_adapters(released))

    # --- decisions and answers -----------------------------------------------------------------

    async def decide(self, prompt: Sequence[int], experts: Sequence[str], *, fallback: bool = False) -> list[float]:
        """P(accept) of each named expert for one prompt, in one batch.

        Args:
            prompt: token ids up to and including the generation prompt.
            experts: names.
            fallback: an answer will follow on this engine, by one of them or by the generalist, so compute what its
                first token needs, too.

        Raises:
            ServingError: no such expert, or it was unloaded before the decision ran.
        """
        loaded = [self._scheduler.experts[name] for name in experts]
        max_indicator_rows = MAX_INDICATOR_ROWS if fallback else 0
        shared: list[LoadedExpert | None] = [expert for expert in loaded if not expert.full_form]
        if fallback:
            shared.append(None)
        # In the full form each expert has keys and values of its own.
        groups = [[expert] for expert in loaded if expert.full_form] + ([shared] if shared else [])
        decisions: dict[str | None, DecisionRow] = {}
        for rows in await asyncio.gather(*(self._prefill(prompt, group, max_indicator_rows) for group in groups)):
            decisions |= rows
        return [float(decisions[name].p_accept or 0) for name in experts]

    def decide_batch(
        self, prompts: Sequence[Sequence[int]], expert: str, max_num_batched_tokens: int = 2048
    ) -> list[float]:
        """P(accept) of one expert for many prompts, without scheduling or cache.

        Args:
            prompts: token ids up to and including the generation prompt.
            expert: name.
            max_num_batched_tokens: most tokens of a forward, unless a single prompt is longer.
        """
        loaded = self._scheduler.experts[expert]
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        decisions = [0.0] * len(prompts)
        while by_length:
            batch = [by_length.pop()]
            num_tokens = len(prompts[batch[0]])
            while by_length and num_tokens + len(prompts[by_length[-1]]) <= max_num_batched_tokens:
                num_tokens += len(prompts[by_length[-1]])
                batch.append(by_length.pop())
            chosen = [prompts[index] for index in batch]
            for index, p_accept in zip(batch, self._decide_on_thread(chosen, loaded), strict=True):
                decisions[index] = p_accept
        return decisions

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Token, None]:
        """Tokens of an answer, one by one, without the end-of-turn token.

        An expert's answer starts after its accept indicator, as it was fitted.

        Raises:
            ServingError: no such expert, it was unloaded before the answer started, or the answer may need more memory
                for keys and values than `kv_gb`.
        """
        expert = None if request.expert is None else self._scheduler.experts[request.expert]
        self._check_fits(request)
        # The prompt stays in the cache from here on, so that what the decision has computed is there for the answer.
        prompt = self._prefix_cache.match(request.prompt, _owner([expert]))
        prompt.ref_count += 1
        generation: GenerationRequest | None = None
        try:
            decisions = await self._prefill(request.prompt, [expert], max_indicator_rows=1)
            generation = GenerationRequest(expert, prompt, decisions[request.expert], request.sampling)
            self._scheduler.add_generation(generation)
            self._wake()
            while (output := await generation.outputs.get()) is not None:
                if isinstance(output, BaseException):
                    raise output
                yield output
        finally:
            if generation is not None:
                generation.finished = True
            prompt.ref_count -= 1

    async def export_prefix(self, prompt: Sequence[int]) -> PrefixArrays:
        """Keys and values of a prompt under the base model, for `import_prefix` on another engine."""
        await self._prefill(prompt, [None], max_indicator_rows=0)
        prefix = self._prefix_cache.match(tuple(prompt), None).prefix
        return await asyncio.get_running_loop().run_in_executor(self._thread, prefix.arrays)

    def import_prefix(self, prompt: Sequence[int], arrays: PrefixArrays) -> None:
        """Add what another engine's `export_prefix` returned for a prompt to the prefix cache."""
        if arrays:
            like = self._runner.example_kv[0][0]
            self._prefix_cache.insert(tuple(prompt), None, Prefix.of_arrays(arrays, like))

    # --- steps ---------------------------------------------------------------------------------

    async def _prefill(
        self, prompt: Sequence[int], experts: Sequence[LoadedExpert | None], max_indicator_rows: int
    ) -> dict[str | None, DecisionRow]:
        """The decision rows of experts (None: the generalist) after a prompt; see `PrefillRequest`."""
        cached = self._prefix_cache.match(tuple(prompt), _owner(experts))
        self._on_stats("hit", cached.num_cached)
        self._on_stats("miss", cached.num_uncached)
        cached.ref_count += 1
        done = asyncio.get_running_loop().create_future()
        request = PrefillRequest(cached, list(experts), max_indicator_rows, done)
        try:
            if request.pending():
                self._scheduler.add_prefill(request)
                self._wake()
                await done
            if pending := request.pending():
                raise unloaded_error(pending[0])
            return {name: cached.decisions[name] for name in map(expert_name, experts)}
        finally:
            done.cancel()
            cached.ref_count -= 1

    def _wake(self) -> None:
        """Run steps in a task of this event loop, unless one does already."""
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = asyncio.get_running_loop().create_task(self._run_steps())

    async def _run_steps(self) -> None:
        """Run steps until there are no requests."""
        while self._scheduler.has_requests:
            batch = self._scheduler.schedule()
            error: BaseException | None = None
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._runner.execute, batch)
            except Exception as raised:
                error = raised
            self._scheduler.process_outputs(batch, error)
            for _ in range(HANDOVER_ROUNDS):
                await asyncio.sleep(0)

    def _check_fits(self, request: GenerateRequest) -> None:
        kv_cache = self._scheduler.kv_cache
        if not kv_cache.fits(max_length(len(request.prompt), request.sampling)):
            raise ServingError(
                f"an answer of {request.sampling.max_tokens} tokens to a prompt of {len(request.prompt)} needs more "
                f"memory for keys and values than there is ({kv_cache.max_tokens} tokens); ask for fewer, or raise "
                "serve.kv_gb"
            )

    def _decide_on_thread(self, prompts: Sequence[Sequence[int]], expert: LoadedExpert) -> list[float]:
        return self._on_thread(lambda: self._runner.decide(prompts, expert))

    def _on_thread(self, work: Callable[[], T]) -> T:
        """Run a function on the worker thread, and wait for it."""
        return self._thread.submit(work).result()


def _owner(experts: Sequence[LoadedExpert | None]) -> str | None:
    """The expert whose adapter applies to the whole prompt, if there is one: it shares its prefix with no other."""
    return experts[0].name if experts and experts[0] is not None and experts[0].full_form else None
