"""The chain: the walk of one query over the sequence of experts (SEE, arXiv 2504.06664).

    newest expert ── pass ──► next ── pass ──► … ── pass ──► generalist
         │ accept              │ accept
         ▼                     ▼
       answers               answers

Each expert compares its own P(accept) with its own threshold. The first expert in order that accepts answers the query;
if none does, the generalist answers it. There is no router. This module imports neither models nor Ray: the caller
passes an async function that returns one expert's P(accept).
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
    """An expert cannot decide: its replica is gone and no other has replaced it yet."""


@dataclass(frozen=True)
class ChainEntry:
    """One expert in the sequence, and the P(accept) from which it accepts a query."""

    expert: str
    threshold: float


@dataclass(frozen=True)
class Decision:
    """One expert's decision on the query.

    Attributes:
        expert: its name.
        p_accept: P(accept); None if the expert was unavailable, which counts as a pass.
        threshold: P(accept) from which it accepts.
        ms: milliseconds until the decision arrived.
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
        """`accept`, `pass` or `unavailable`: the label in traces and metrics."""
        return "unavailable" if self.p_accept is None else "accept" if self.accepted else "pass"


@dataclass(frozen=True)
class Trace:
    """What the chain did for one query, and why.

    Attributes:
        sequence_version: version of the sequence that was walked.
        asked: decisions in the order of the sequence, up to the first that accepted.
        answered_by: name of the expert, or `generalist`.
        reason: `accepted`, `no expert accepted`, or `named by the request`.
        ms: milliseconds of the whole walk.
    """

    sequence_version: int
    asked: tuple[Decision, ...]
    answered_by: str
    reason: str
    ms: float = 0.0

    @classmethod
    def named_by_request(cls, expert: str, sequence_version: int) -> Trace:
        """The trace of a query whose request names the expert (or the generalist), so that none decides."""
        return cls(sequence_version, (), expert, "named by the request")

    def body(self) -> dict[str, Any]:
        """The trace as JSON: the `see` field of every answer."""
        return {
            "sequence_version": self.sequence_version,
            "answered_by": self.answered_by,
            "reason": self.reason,
            "asked": [
                {
                    "expert": decision.expert,
                    "p_accept": None if decision.p_accept is None else round(decision.p_accept, 6),
                    "threshold": round(decision.threshold, 6),
                    "decision": decision.decision,
                    "ms": round(decision.ms, 1),
                }
                for decision in self.asked
            ],
            "ms": round(self.ms, 1),
        }


async def walk(
    entries: Sequence[ChainEntry],
    decide: Callable[[str], Awaitable[float]],
    *,
    lookahead: int = 1,
    sequence_version: int = 0,
) -> Trace:
    """Find the expert that answers a query.

    Args:
        entries: the sequence in the order in which experts are asked (newest first).
        decide: returns an expert's P(accept); raises ExpertUnavailable if it cannot.
        lookahead: how many experts may decide concurrently. It does not change the outcome: a decision
            counts only once all experts before it have passed. Decisions that turn out not to be needed
            are cancelled.
        sequence_version: recorded in the trace.
    """
    started = time.perf_counter()
    remaining: Iterator[ChainEntry] = iter(entries)
    pending: deque[tuple[ChainEntry, asyncio.Task[Decision]]] = deque()
    decisions: list[Decision] = []

    async def ask(entry: ChainEntry) -> Decision:
        asked = time.perf_counter()
        try:
            p_accept: float | None = await decide(entry.expert)
        except ExpertUnavailable:
            p_accept = None
        return Decision(entry.expert, p_accept, entry.threshold, (time.perf_counter() - asked) * 1000)

    def trace(answered_by: str, reason: str) -> Trace:
        ms = (time.perf_counter() - started) * 1000
        return Trace(sequence_version, tuple(decisions), answered_by, reason, ms)

    try:
        while True:
            while len(pending) < max(1, lookahead) and (entry := next(remaining, None)) is not None:
                pending.append((entry, asyncio.ensure_future(ask(entry))))
            if not pending:
                return trace(GENERALIST, "no expert accepted")
            entry, task = pending[0]
            decisions.append(await task)
            pending.popleft()
            if decisions[-1].accepted:
                return trace(entry.expert, "accepted")
    finally:
        for _, task in pending:
            task.cancel()
        await asyncio.gather(*(task for _, task in pending), return_exceptions=True)
