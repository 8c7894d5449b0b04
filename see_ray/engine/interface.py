"""What an engine is asked, and what it gives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
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
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: only the likeliest tokens that together have this probability.
        seed: repeats a draw.
        logprobs: how many of the likeliest tokens to name beside each chosen one; None: no log-probabilities.
        ignore_eos: an end-of-turn token is a token like others, so that answers have the length that was asked for.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False


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

    def generate(
        self, prompt: Sequence[int], expert: str | None, max_tokens: int, draw: SamplingParams | None = None
    ) -> AsyncIterator[Token]:
        """The tokens of an answer, one by one, of an expert or of the generalist (None)."""
        ...
