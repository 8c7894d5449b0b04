"""Asking one engine many things: decisions and answers for whole lists of prompts, remembered in files.

Answers of one expert are written together, up to 64 in each pass of the engine. An adapter never changes, so what
it was asked once is kept, and an interrupted evaluation goes on where it was.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from see_ray.models.cache import write_atomically

if TYPE_CHECKING:
    from see_ray.engine.engine import EmbeddedEngine
    from see_ray.engine.interface import Expert, SamplingParams

Prompt = Sequence[int]
T = TypeVar("T")


class Asker:
    """Asks the generalist, and experts that lie in folders.

    Args:
        engine: holds the base model; experts are loaded for as long as they are asked.
        tokenizer: of the base model.
    """

    def __init__(self, engine: EmbeddedEngine, tokenizer: Any):
        self._engine, self._tokenizer = engine, tokenizer

    def decisions(self, prompts: Sequence[Prompt], expert: Expert) -> list[float]:
        """P(accept) of an expert for each prompt (token ids up to and including the generation prompt)."""
        with self._loaded(expert):
            return self._engine.decide_batch(prompts, expert.name)

    def answers(self, prompts: Sequence[Prompt], expert: Expert | None, max_tokens: int) -> list[str]:
        """The text of each answer, at most so many tokens long; the generalist's where `expert` is None."""
        from see_ray.engine.interface import SamplingParams

        greedy = [SamplingParams(max_tokens)] * len(prompts)
        with self._loaded(expert):
            return asyncio.run(self._write(prompts, expert.name if expert else None, greedy))

    def sample(self, prompts: Sequence[Prompt], temperature: float, seed: int, max_tokens: int) -> list[str]:
        """What the base model goes on with after each prompt, drawn at a temperature."""
        from see_ray.engine.interface import SamplingParams

        each = [SamplingParams(max_tokens, temperature, seed=seed + number) for number in range(len(prompts))]
        return asyncio.run(self._write(prompts, None, each))

    @contextmanager
    def _loaded(self, expert: Expert | None) -> Iterator[None]:
        if expert is not None:
            self._engine.load(expert)
        try:
            yield
        finally:
            if expert is not None:
                self._engine.unload(expert.name)

    async def _write(
        self, prompts: Sequence[Prompt], expert: str | None, sampling: Sequence[SamplingParams]
    ) -> list[str]:
        from see_ray.engine.interface import GenerateRequest
        from see_ray.engine.scheduler import MAX_NUM_SEQS

        async def one(number: int) -> str:
            stream = self._engine.generate(GenerateRequest(tuple(prompts[number]), expert, sampling[number]))
            ids = [token.id async for token in stream]
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))

        # By length, and no more at once than a step writes: the rest would only hold memory.
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        texts = [""] * len(prompts)
        for start in range(0, len(order), MAX_NUM_SEQS):
            batch = order[start : start + MAX_NUM_SEQS]
            for number, text in zip(batch, await asyncio.gather(*map(one, batch)), strict=True):
                texts[number] = text
        return texts


def cached_by_prompt(path: Path, prompts: Sequence[Prompt], ask: Callable[[list[Prompt]], list[T]]) -> list[T]:
    """What was asked about each prompt, from a file where it is there, else asked now and kept.

    Args:
        path: a JSON file, of one decider or answerer; processes that share it wait for each other.
        prompts: token ids.
        ask: is given the prompts that are missing, each once.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    digests = [digest(list(prompt)) for prompt in prompts]
    with FileLock(f"{path}.lock"):
        known: dict[str, T] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        missing = {mark: prompt for mark, prompt in zip(digests, prompts, strict=True) if mark not in known}
        if missing:
            known |= zip(missing, ask(list(missing.values())), strict=True)
            write_json(path, known)
    return [known[mark] for mark in digests]


def digest(value: Any) -> str:
    """A short name for anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, body: Any) -> None:
    """Write a file that is there as a whole or not at all."""
    write_atomically(path, json.dumps(body, indent=1) + "\n")
