"""What an engine is asked, and what it returns: the interface between serving and evaluation, and the engines."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from see_ray.models.activation import Activation

if TYPE_CHECKING:
    from numpy.typing import NDArray

PrefixArrays: TypeAlias = "Sequence[NDArray[Any]]"
"""Keys and values of a prompt: for each layer an array of keys and one of values, each [1, heads, tokens, head size].
Half-precision numbers are given as int16, bit by bit, since NumPy has no bfloat16."""


@dataclass(frozen=True)
class Expert:
    """An expert as an engine loads it: its PEFT folder, and where its adapter applies."""

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
        stop: strings at which the text ends; they are not part of it. Engines know token ids only and ignore them;
            `engine.detokenize` applies them.
        seed: makes sampling repeatable.
        logprobs: number of likeliest tokens reported beside each sampled one; None: no log-probabilities.
        ignore_eos: continue to `max_tokens` after an end-of-turn token.
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
        stream: whether text is wanted token by token, or in few chunks; engines always return tokens one by one.
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
    """A base model and experts. Prompts are token ids up to and including the generation prompt.

    Methods raise ServingError for an expert that is not loaded.
    """

    def load(self, expert: Expert) -> None:
        """Add an expert; replaces one of the same name. Requests in progress continue.

        Raises:
            ServingError: the adapter does not fit the base model, or changes nothing.
        """

    def unload(self, name: str) -> None:
        """Remove an expert. Answers of it that are in progress are finished."""

    async def decide(self, prompt: Sequence[int], experts: Sequence[str], *, fallback: bool = False) -> list[float]:
        """P(accept) of each named expert for a prompt.

        Args:
            prompt: token ids.
            experts: names.
            fallback: an answer will follow, by one of these experts or the generalist, so prepare its first token too.
        """
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Token, None]:
        """The tokens of an answer, one by one, without the end-of-turn token.

        An expert's answer is generated after its accept indicator, which is not returned.
        """
        ...

    async def export_prefix(self, prompt: Sequence[int]) -> PrefixArrays:
        """Keys and values of a prompt as the base model computes them, for `import_prefix` of another engine.

        Raises:
            ServingError: this engine cannot export them.
        """
        ...

    def import_prefix(self, prompt: Sequence[int], arrays: PrefixArrays) -> None:
        """Use a prompt's keys and values that another engine of the same base model has computed.

        Raises:
            ServingError: this engine cannot import them.
        """

    def check_health(self) -> None:
        """Raise ServingError if the engine can no longer answer and must be created anew."""
