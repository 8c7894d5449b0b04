"""What an engine is asked, and what it gives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from see_ray.models.activation import Activation


@dataclass(frozen=True)
class Expert:
    """An expert as an engine needs it: its PEFT folder and where it is activated."""

    name: str
    folder: Path
    activation: Activation


@dataclass(frozen=True)
class SamplingParams:
    """How the tokens of an answer are chosen; names as in vLLM.

    Attributes:
        max_tokens: most tokens of the answer.
        temperature: 0 is greedy.
        top_p: sample from the likeliest tokens whose probabilities add up to this.
        stop: strings at which the text ends; they are not part of it.
        seed: makes sampling repeatable.
        logprobs: number of likeliest tokens reported beside each sampled one; None: no log-probabilities.
        ignore_eos: go on to `max_tokens` after an end-of-turn token.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False


@dataclass(frozen=True)
class GenerateRequest:
    """One answer to generate.

    Attributes:
        prompt: token ids up to and including the generation prompt.
        expert: whose adapter answers; None: the generalist.
        sampling: how tokens are chosen.
        stream: whether the caller wants text as it comes, or in few pieces.
    """

    prompt: tuple[int, ...]
    expert: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    stream: bool = False


class Token(NamedTuple):
    """One token of an answer.

    Attributes:
        id: in the vocabulary.
        logprob: natural logarithm of its probability before temperature and top_p; None where not asked for.
        top: (id, log-probability) of the likeliest tokens, most likely first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class TokenText(NamedTuple):
    """A token as text, and its bytes, which need not be whole characters."""

    text: str
    bytes: bytes
    logprob: float


class Engine(Protocol):
    """A base model with experts beside it. Prompts are token ids up to and including the generation prompt."""

    def load(self, expert: Expert) -> None:
        """Add an expert; requests go on meanwhile."""

    def unload(self, name: str) -> None:
        """Forget an expert; answers that it has begun are finished."""

    async def decide(self, prompt: Sequence[int], experts: Sequence[str], *, fallback: bool = False) -> list[float]:
        """P(accept) of each named expert; with `fallback` an answer is to follow here, by one of them or by the
        generalist, who is made ready, too."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[Token]:
        """The tokens of an answer, one by one; an expert's begin after its accept indicator."""
        ...
