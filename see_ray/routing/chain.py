"""The chain: the walk of one query over the sequence of experts.

    newest expert ── pass ──► next ── pass ──► … ── pass ──► generalist
         │ accept              │ accept
         ▼                     ▼
       answers               answers

Each expert decides for itself (P(accept) against its own threshold); the first in order that
accepts answers, and if none does, the generalist. There is no router. The chain knows neither
models nor Ray: it is given an async callable that asks one expert.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from see_ray.errors import ServingError

GENERALIST = "generalist"


class ExpertUnavailable(ServingError):
    """An expert that could not be asked: its replica is gone and none has taken its place."""


@dataclass(frozen=True)
class ChainEntry:
    """One place in the sequence: an expert and the P(accept) from which it accepts."""

    expert: str
    threshold: float


@dataclass(frozen=True)
class Decision:
    """One expert's decision on the query.

    Attributes:
        p_accept: its decision; None if it could not be asked, which counts as a pass.
        ms: milliseconds until its decision arrived.
    """

    expert: str
    p_accept: float | None
    threshold: float
    ms: float

    @property
    def accepted(self) -> bool:
        return self.p_accept is not None and self.p_accept >= self.threshold

    @property
    def decision(self) -> str:
        """In words, for people and metrics."""
        return "unavailable" if self.p_accept is None else "accept" if self.accepted else "pass"


@dataclass(frozen=True)
class Trace:
    """What the chain did for one query, and why.

    Attributes:
        sequence_version: of the sequence that was walked.
        asked: decisions in the order of the sequence, up to the one that settled it.
        answered_by: name of the expert, or `generalist`.
        reason: `accepted`, `no expert accepted`, or `named by the request`.
        ms: milliseconds of the whole walk.
    """

    sequence_version: int
    asked: tuple[Decision, ...]
    answered_by: str
    reason: str
    ms: float = 0.0

    def body(self) -> dict[str, Any]:
        """The trace as JSON: the `see` field of every answer."""
        return {
            "sequence_version": self.sequence_version,
            "answered_by": self.answered_by,
            "reason": self.reason,
            "asked": [
                {
                    "expert": asked.expert,
                    "p_accept": None if asked.p_accept is None else round(asked.p_accept, 6),
                    "threshold": round(asked.threshold, 6),
                    "decision": asked.decision,
                    "ms": round(asked.ms, 1),
                }
                for asked in self.asked
            ],
            "ms": round(self.ms, 1),
        }


def named(expert: str, sequence_version: int) -> Trace:
    """The trace of a query whose expert (or the generalist) was named, so that none was asked."""
    return Trace(sequence_version, (), expert, "named by the request")


async def walk(
    links: Sequence[ChainEntry],
    decide: Callable[[str], Awaitable[float]],
    *,
    lookahead: int = 1,
    sequence_version: int = 0,
) -> Trace:
    """Find who answers.

    Args:
        links: the sequence, in the order in which experts are asked (newest first).
        decide: asks one expert, gives its P(accept); raises ExpertUnavailable if it cannot be asked.
        lookahead: how many experts may be asked at the same time. The outcome is the same for
            every value: a decision counts only once all experts before it have passed. What was
            asked too much is cancelled.
        sequence_version: noted in the trace.
    """
    started = time.perf_counter()
    waiting: deque[tuple[ChainEntry, asyncio.Task[Decision]]] = deque()
    ahead: Iterator[ChainEntry] = iter(links)
    asked: list[Decision] = []

    async def ask(link: ChainEntry) -> Decision:
        begun = time.perf_counter()
        try:
            p_accept: float | None = await decide(link.expert)
        except ExpertUnavailable:
            p_accept = None
        return Decision(link.expert, p_accept, link.threshold, (time.perf_counter() - begun) * 1000)

    def trace(answered_by: str, reason: str) -> Trace:
        return Trace(sequence_version, tuple(asked), answered_by, reason, (time.perf_counter() - started) * 1000)

    try:
        while True:
            while len(waiting) < max(1, lookahead) and (link := next(ahead, None)) is not None:
                waiting.append((link, asyncio.ensure_future(ask(link))))
            if not waiting:
                return trace(GENERALIST, "no expert accepted")
            link, task = waiting[0]
            asked.append(await task)
            waiting.popleft()
            if asked[-1].accepted:
                return trace(link.expert, "accepted")
    finally:
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)
