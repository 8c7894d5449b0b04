"""What is asked of the embedded engine, and what one pass does of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from see_ray.engine.forward_batch import DecisionRows, PrefillChunk
from see_ray.engine.prefix_cache import Prompt
from see_ray.engine.requests import GenerationRequest, Loaded
from see_ray.errors import ServingError


def name_of(one: Loaded | None) -> str | None:
    return None if one is None else one.name


def left_error(one: Loaded | None) -> ServingError:
    return ServingError(f"the expert {name_of(one)} left before it was done; ask again")


@dataclass(eq=False)
class PrefillRequest:
    """Somebody is to go on from a prompt.

    Attributes:
        prompt: which; `who`: names None for the generalist.
        feed: up to so many of them also read their accept indicators.
        done: when all have.
    """

    prompt: Prompt
    who: list[Loaded | None]
    feed: int
    done: asyncio.Future[None]

    def missing(self) -> list[Loaded | None]:
        return [one for one in self.who if name_of(one) not in self.prompt.rows]


@dataclass(eq=False)
class ScheduledBatch:
    """One pass: answers to begin before it, answers to go on with, prompts to read, and what came of them."""

    begun: list[GenerationRequest]
    answers: list[GenerationRequest]
    reads: list[PrefillChunk] = field(default_factory=list)
    asks: list[PrefillRequest] = field(default_factory=list)
    rows: list[tuple[Prompt, DecisionRows, list[Loaded | None], bool]] = field(default_factory=list)
    decisions: list[list[float]] = field(default_factory=list)
    gone: list[Loaded] = field(default_factory=list)
