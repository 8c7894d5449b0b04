"""An answer in progress, and how its next token is chosen."""

from __future__ import annotations

import asyncio

import torch
from torch import Tensor

from see_ray.engine.forward_batch import DecodeStep
from see_ray.engine.interface import Expert, SamplingParams, Token
from see_ray.engine.kv_cache import Slot
from see_ray.engine.prefix_cache import Prompt, Row


class Loaded:
    """An expert in the bank. One that is loaded anew under the same name is another.

    Attributes:
        key: its name in the bank.
        slot: of its adapter.
        full: it reads the whole prompt by itself (full form).
        adapted: tokens at the end of a prompt that its rows read.
        gone: its slot may be another's by now.
    """

    _count = 0

    def __init__(self, expert: Expert):
        Loaded._count += 1
        self.expert, self.name, self.key = expert, expert.name, f"{expert.name} {Loaded._count}"
        self.slot, self.gone = 0, False
        self.full = expert.activation.tokens is None
        # In the full form the prompt was read with the adapter, all but its last token.
        self.adapted = expert.activation.tokens or 1


class GenerationRequest:
    """An answer in progress.

    Attributes:
        expert: whose it is; None is the generalist's.
        length: tokens of prompt and answer, at most.
        prompt, row: where it goes on from.
        slot: where its keys and values are, once there is room.
        token: chosen last, not yet read.
        tokens: for whoever asked: tokens, then None, or an error.
        over: finished, or given up.
    """

    def __init__(self, expert: Loaded | None, length: int, sampling: SamplingParams):
        self.expert, self.length, self._left, self._sampling = expert, length, sampling.max_tokens, sampling
        self.prompt: Prompt | None = None
        self.row: Row | None = None
        self.slot: Slot | None = None
        self.token = -1
        self.tokens: asyncio.Queue[Token | BaseException | None] = asyncio.Queue()
        self.over = False
        self._chosen: list[Token | None] = []
        self._generator = torch.Generator()
        if sampling.temperature > 0:
            self._generator.manual_seed(sampling.seed) if sampling.seed is not None else self._generator.seed()

    def step(self) -> DecodeStep:
        assert self.slot is not None
        return DecodeStep(self.token, self.expert.slot if self.expert else 0, self.slot)

    def choose(self, logits: Tensor, best: int, eos: frozenset[int]) -> None:
        """Take the next token, or end.

        Args:
            logits: [vocabulary].
            best: the token with the highest.
            eos: tokens that end an answer.
        """
        if self._left > 0:
            self.token = best if self._sampling.temperature == 0 else _drawn(logits, self._sampling, self._generator)
        if self._left <= 0 or (self.token in eos and not self._sampling.ignore_eos):
            self._chosen.append(None)
            self.over = True
            return
        self._left -= 1
        self._chosen.append(_with_logprobs(self.token, logits, self._sampling.logprobs))
        if self._left == 0:
            self._chosen.append(None)
            self.over = True

    def flush(self) -> None:
        """Hand on what was chosen; on the event loop's thread, where queues belong."""
        for token in self._chosen:
            self.tokens.put_nowait(token)
        self._chosen.clear()

    def fail(self, error: BaseException) -> None:
        self.over = True
        self.tokens.put_nowait(error)


def _drawn(logits: Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
    chances = torch.softmax(logits.float().cpu() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        ranked, order = chances.sort(descending=True)
        ranked[ranked.cumsum(0) - ranked >= sampling.top_p] = 0  # the first is always kept
        chances = torch.zeros_like(chances).scatter(0, order, ranked)
    return int(torch.multinomial(chances, 1, generator=generator))


def _with_logprobs(token: int, logits: Tensor, count: int | None) -> Token:
    if count is None:
        return Token(token)
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    best = logprobs.topk(count) if count else None
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if best else ()
    return Token(token, float(logprobs[token]), top)
