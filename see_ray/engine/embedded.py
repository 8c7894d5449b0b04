"""The embedded engine: decisions and answers on transformers and PyTorch, in this process.

It holds the base model once and any number of experts beside it (`engine.adapters`). A prompt's
prefix is read once and kept for a while, so that a decision, the winner's answer and the
generalist's all continue from the same keys and values.

Answers are written together: each step takes one token of every answer in progress, whoever gives
it, in one forward pass. A new answer joins between two steps; one that is finished or given up
leaves. PyTorch runs on one worker thread, one forward pass at a time. The engine knows token ids
only; text is `engine.text`'s business.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from see_ray.activation import Activation, p_accept
from see_ray.base_model import BaseModel, load_model
from see_ray.config import BaseModelConfig
from see_ray.engine.adapters import AdapterBank
from see_ray.errors import ServingError
from see_ray.prefix import Prefix, forward, logits_of, prefill

T = TypeVar("T")

STEP_ROWS = 32
"""Answers that one step goes on with at most; the others take the next turn."""

ROOM = 64
"""Tokens by which an answer's memory for keys and values grows."""


@dataclass(frozen=True)
class Expert:
    """An expert as the engine needs it: its PEFT folder and where it is activated."""

    name: str
    folder: Path
    activation: Activation


@dataclass(frozen=True)
class Draw:
    """How the next token is chosen. `temperature` 0 takes the most likely one."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


class EmbeddedEngine:
    """Base model, experts, and a bounded store of prefixes.

    Args:
        base: the base model to load.
        config: its settings (dtype).
        device: `cpu` or a CUDA device; None takes a GPU if there is one.
        prefix_tokens: prefixes of at most this many tokens in all are kept; the last one always is.
    """

    def __init__(
        self, base: BaseModel, config: BaseModelConfig, *, device: str | None = None, prefix_tokens: int = 8192
    ):
        self.model = load_model(base, config, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        eos = self.model.generation_config.eos_token_id
        self.eos = frozenset([eos] if isinstance(eos, int) else eos or [])
        self._bank = AdapterBank(self.model)
        self._experts: dict[str, Expert] = {}
        self._prefixes: OrderedDict[tuple[str | None, tuple[int, ...]], Prefix] = OrderedDict()
        self._room = prefix_tokens
        self._writing: list[_Answer] = []
        self._writer: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    # --- experts ---------------------------------------------------------------------------

    def load(self, expert: Expert) -> None:
        """Add an expert.

        Raises:
            ServingError: its adapter does not fit the base model, or changes nothing. Either
                would make the base model answer in the expert's name.
        """
        self._bank.add(expert.name, expert.folder)
        self._experts[expert.name] = expert
        probe = [*expert.activation.generation_prompt] * 2
        if torch.equal(self._next_logits(probe, [None]), self._next_logits(probe, [expert.name])):
            self.unload(expert.name)
            raise ServingError(
                f"the adapter of {expert.name} in {expert.folder} changes nothing: "
                "all its updates are zero; fit it again"
            )

    def unload(self, name: str) -> None:
        """Forget an expert."""
        del self._experts[name]
        self._bank.remove(name)
        for key in [key for key in self._prefixes if key[0] == name]:
            del self._prefixes[key]

    # --- decisions and answers -----------------------------------------------------------

    async def decide(self, prompt: Sequence[int], experts: Sequence[str]) -> list[float]:
        """P(accept) of each named expert for one prompt (token ids)."""
        return await self._run(lambda: self.decide_now(prompt, experts))

    def decide_now(self, prompt: Sequence[int], experts: Sequence[str]) -> list[float]:
        """As :meth:`decide`, on the calling thread."""
        decisions: dict[str, float] = {}
        for group in self._grouped(experts):
            logits = self._next_logits(prompt, group)
            for name, row in zip(group, logits, strict=True):
                decisions[name] = self._decision(name, row)
        return [decisions[name] for name in experts]

    def decide_batch(self, prompts: Sequence[Sequence[int]], expert: str, rows: int = 16) -> list[float]:
        """P(accept) of one expert for many prompts, read in length-sorted batches."""
        activation = self._expert(expert).activation
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        result = [0.0] * len(prompts)
        for start in range(0, len(order), rows):
            batch = order[start : start + rows]
            splits = [activation.split(list(prompts[i])) for i in batch]
            with torch.inference_mode():
                before = prefill(self.model, [left for left, _ in splits])
                with self._bank.active([expert] * len(batch)):
                    hidden, _ = forward(self.model, before, [right for _, right in splits])
                last = torch.tensor([len(right) - 1 for _, right in splits], device=hidden.device)
                logits = logits_of(self.model, hidden[torch.arange(len(batch), device=hidden.device), last])
            for i, row in zip(batch, logits, strict=True):
                result[i] = self._decision(expert, row)
        return result

    async def generate(
        self, prompt: Sequence[int], expert: str | None, max_tokens: int, draw: Draw | None = None
    ) -> AsyncIterator[int]:
        """Token ids of an answer, one by one; ends before an end-of-turn token.

        Args:
            prompt: token ids up to and including the generation prompt.
            expert: who answers; None is the generalist. An expert's answer starts behind its
                accept indicator, as it was fitted.
            max_tokens: most tokens to yield.
            draw: how tokens are chosen; greedy where None.
        """
        draw = draw or Draw()
        generator = torch.Generator()
        if draw.temperature > 0:
            generator.manual_seed(draw.seed) if draw.seed is not None else generator.seed()
        answer = await self._run(lambda: self._start(prompt, expert, max_tokens, draw, generator))
        answer.flush()
        if not answer.over:
            self._writing.append(answer)
            if self._writer is None or self._writer.done():
                self._writer = asyncio.get_running_loop().create_task(self._write())
        try:
            while (token := await answer.tokens.get()) is not None:
                if isinstance(token, BaseException):
                    raise token
                yield token
        finally:
            answer.over = True

    async def _write(self) -> None:
        """Go on with all answers in progress, step by step, until there are none."""
        while self._writing:
            batch = self._writing[:STEP_ROWS]
            try:
                await self._run(lambda batch=batch: self._step(batch))  # type: ignore[misc]
            except Exception as error:
                for answer in batch:
                    answer.over = True
                    answer.tokens.put_nowait(error)
            # Those that had their turn go to the end.
            rest = [*self._writing[len(batch) :], *batch]
            for answer in batch:
                answer.flush()
            self._writing = [answer for answer in rest if not answer.over]

    # --- forward passes, on the worker thread ---------------------------------------------------

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    @torch.inference_mode()
    def _next_logits(self, prompt: Sequence[int], experts: Sequence[str | None]) -> Tensor:
        """Logits behind the prompt for each of some experts that share one prefix: [experts, vocabulary]."""
        before, rest = self._split(prompt, experts[0])
        with self._bank.active(experts):
            hidden, _ = forward(self.model, before.repeat(len(experts)), [rest] * len(experts))
        return logits_of(self.model, hidden[:, -1])

    @torch.inference_mode()
    def _start(
        self, prompt: Sequence[int], expert: str | None, most: int, draw: Draw, generator: torch.Generator
    ) -> _Answer:
        """Read what is left of the prompt and choose the answer's first token."""
        before, rest = self._split(prompt, expert)
        if expert is not None:
            rest = [*rest, self._expert(expert).activation.accept]
        with self._bank.active([expert]):
            hidden, cache = forward(self.model, before, [rest])
        kv = torch.stack([kv[0] for layer in cache.layers for kv in (layer.keys, layer.values)])
        answer = _Answer(expert, kv, kv.shape[2], most, draw, generator)
        answer.choose(logits_of(self.model, hidden[0, -1]), self.eos)
        return answer

    @torch.inference_mode()
    def _step(self, answers: list[_Answer]) -> None:
        """One more token of each answer, in one forward pass."""
        answers = [answer for answer in answers if not answer.over]
        if not answers:
            return
        lengths = tuple(answer.length for answer in answers)
        first = answers[0].kv
        if len(answers) == 1:
            both = first[:, None, :, : lengths[0]]
        else:
            both = first.new_zeros(first.shape[0], len(answers), first.shape[1], max(lengths), first.shape[3])
            for row, answer in enumerate(answers):
                both[:, row, :, : answer.length] = answer.kv[:, :, : answer.length]
        prefix = Prefix(tuple((both[i], both[i + 1]) for i in range(0, both.shape[0], 2)), lengths)
        with self._bank.active([answer.expert for answer in answers]):
            hidden, cache = forward(self.model, prefix, [[answer.token] for answer in answers])
        logits = logits_of(self.model, hidden[:, -1])
        new = torch.stack([kv[:, :, -1] for layer in cache.layers for kv in (layer.keys, layer.values)])
        for row, answer in enumerate(answers):
            answer.append(new[:, row])
            answer.choose(logits[row], self.eos)

    def _split(self, prompt: Sequence[int], expert: str | None) -> tuple[Prefix, list[int]]:
        """The kept prefix of a prompt and the tokens that follow it."""
        tokens = self._expert(expert).activation.tokens if expert is not None else 1
        if tokens is None:  # full form: the prefix is the expert's own
            return self._prefix(expert, prompt), list(prompt[-1:])
        # Any activation point is served by the prefix up to the last token, cut shorter.
        before = self._prefix(None, prompt)
        return before.cut(len(prompt) - tokens), list(prompt[-tokens:])

    def _prefix(self, owner: str | None, prompt: Sequence[int]) -> Prefix:
        key = (owner, tuple(prompt[:-1]))
        found = self._prefixes.get(key)
        if found is None:
            with self._bank.active([owner]):
                found = prefill(self.model, [prompt[:-1]])
            self._prefixes[key] = found
            while len(self._prefixes) > 1 and sum(len(ids) for _, ids in self._prefixes) > self._room:
                self._prefixes.popitem(last=False)
        self._prefixes.move_to_end(key)
        return found

    def _grouped(self, experts: Sequence[str]) -> list[list[str]]:
        """Experts that can share one forward pass: those activated at the same point."""
        groups: dict[Any, list[str]] = {}
        for name in experts:
            tokens = self._expert(name).activation.tokens
            groups.setdefault(tokens if tokens is not None else name, []).append(name)
        return list(groups.values())

    def _decision(self, name: str, logits: Tensor) -> float:
        activation = self._expert(name).activation
        return p_accept(float(logits[activation.accept]), float(logits[activation.refuse]))

    def _expert(self, name: str) -> Expert:
        try:
            return self._experts[name]
        except KeyError:
            raise ServingError(f"this engine holds no expert {name}; it holds {sorted(self._experts)}") from None


@dataclass
class _Answer:
    """An answer in progress.

    Attributes:
        expert: whose it is; None is the generalist's.
        kv: keys and values so far, [2 x layers, heads, room, head size].
        length: tokens of them.
        left: tokens that it may still have.
        token: chosen last, not yet read.
        tokens: for whoever asked: token ids, then None, or an error.
        over: finished, or given up.
    """

    expert: str | None
    kv: Tensor
    length: int
    left: int
    draw: Draw
    generator: torch.Generator
    token: int = -1
    tokens: asyncio.Queue[int | BaseException | None] = field(default_factory=asyncio.Queue)
    over: bool = False
    _chosen: list[int | None] = field(default_factory=list)

    def choose(self, logits: Tensor, eos: frozenset[int]) -> None:
        """Take the next token, or end."""
        self.token = _choose(logits, self.draw, self.generator) if self.left > 0 else -1
        if self.left <= 0 or self.token in eos:
            self._chosen.append(None)
            self.over = True
            return
        self.left -= 1
        self._chosen.append(self.token)
        if self.left == 0:
            self._chosen.append(None)
            self.over = True

    def flush(self) -> None:
        """Hand on what was chosen; on the event loop's thread, where queues belong."""
        for token in self._chosen:
            self.tokens.put_nowait(token)
        self._chosen.clear()

    def append(self, new: Tensor) -> None:
        """Add one token's keys and values, [2 x layers, heads, head size]."""
        if self.length == self.kv.shape[2]:
            grown = self.kv.new_zeros(*self.kv.shape[:2], self.length + ROOM, self.kv.shape[3])
            grown[:, :, : self.length] = self.kv
            self.kv = grown
        self.kv[:, :, self.length] = new
        self.length += 1


def _choose(logits: Tensor, draw: Draw, generator: torch.Generator) -> int:
    if draw.temperature == 0:
        return int(logits.argmax())
    chances = torch.softmax(logits.float().cpu() / draw.temperature, dim=-1)
    if draw.top_p < 1:
        ranked, order = chances.sort(descending=True)
        ranked[ranked.cumsum(0) - ranked >= draw.top_p] = 0  # the first is always kept
        chances = torch.zeros_like(chances).scatter(0, order, ranked)
    return int(torch.multinomial(chances, 1, generator=generator))
