"""Decisions and answers for whole lists of prompts, from an engine in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from see_ray.cpus import available_cpus
from see_ray.evaluate.result_cache import Prompt

if TYPE_CHECKING:
    from see_ray.config import FitConfig
    from see_ray.engine.engine import EmbeddedEngine
    from see_ray.engine.interface import Expert, SamplingParams


class BatchInference:
    """Runs the generalist, and experts that lie in folders, on lists of prompts.

    Args:
        engine: holds the base model. An expert is loaded for the length of one call.
        tokenizer: of the base model.
    """

    def __init__(self, engine: EmbeddedEngine, tokenizer: Any):
        self._engine, self._tokenizer = engine, tokenizer

    def decisions(self, prompts: Sequence[Prompt], expert: Expert) -> list[float]:
        """P(accept) of an expert for each prompt (token ids up to and including the generation prompt)."""
        with self._loaded(expert):
            return self._engine.decide_batch(prompts, expert.name)

    def answers(self, prompts: Sequence[Prompt], expert: Expert | None, max_tokens: int) -> list[str]:
        """The greedy answer to each prompt, at most `max_tokens` long; the generalist's if `expert` is None."""
        from see_ray.engine.interface import SamplingParams

        greedy = [SamplingParams(max_tokens)] * len(prompts)
        with self._loaded(expert):
            return asyncio.run(self._generate(prompts, expert.name if expert else None, greedy))

    def sample(self, prompts: Sequence[Prompt], temperature: float, seed: int, max_tokens: int) -> list[str]:
        """A sampled continuation of each prompt by the base model; prompt i is drawn with `seed + i`."""
        from see_ray.engine.interface import SamplingParams

        sampling = [SamplingParams(max_tokens, temperature, seed=seed + index) for index in range(len(prompts))]
        return asyncio.run(self._generate(prompts, None, sampling))

    @contextmanager
    def _loaded(self, expert: Expert | None) -> Iterator[None]:
        if expert is not None:
            self._engine.load(expert)
        try:
            yield
        finally:
            if expert is not None:
                self._engine.unload(expert.name)

    async def _generate(
        self, prompts: Sequence[Prompt], expert: str | None, sampling: Sequence[SamplingParams]
    ) -> list[str]:
        from see_ray.engine.interface import GenerateRequest
        from see_ray.engine.scheduler import MAX_NUM_SEQS

        async def generate(index: int) -> str:
            stream = self._engine.generate(GenerateRequest(tuple(prompts[index]), expert, sampling[index]))
            ids = [token.id async for token in stream]
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))

        # Batches of similar length, as many as one engine step decodes: more would only hold memory.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        texts = [""] * len(prompts)
        for start in range(0, len(order), MAX_NUM_SEQS):
            batch = order[start : start + MAX_NUM_SEQS]
            for index, text in zip(batch, await asyncio.gather(*map(generate, batch)), strict=True):
                texts[index] = text
        return texts


def set_threads(config: FitConfig) -> None:
    """Use as many torch threads as CPUs are reserved for this process, since others run at the same time."""

    import torch

    torch.set_num_threads(config.threads_per_worker or min(available_cpus(), max(1, int(config.cpus_per_worker))))
