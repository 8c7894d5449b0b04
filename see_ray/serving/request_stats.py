"""Records a request: metrics, and a line in the log."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from see_ray.observability import metrics
from see_ray.routing.chain import Trace

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True)
class RequestStats:
    """A request that was routed and is being answered.

    Attributes:
        path: of its endpoint.
        started: when it arrived, by `time.perf_counter`.
        trace: how it was routed.
        prompt_tokens: length of its prompt.
    """

    path: str
    started: float
    trace: Trace
    prompt_tokens: int

    def first_chunk_arrived(self) -> None:
        """Record the walk and the time to first token."""
        record_walk(self.trace)
        seconds = time.perf_counter() - self.started
        metrics.observe("see_time_to_first_token_seconds", seconds, answered_by=self.trace.answered_by)

    def finished(self, completion_tokens: int) -> None:
        """Record duration and tokens, and log the request; Serve adds its id to the line."""
        seconds, trace = time.perf_counter() - self.started, self.trace
        metrics.observe("see_request_duration_seconds", seconds, path=self.path)
        metrics.count("see_prompt_tokens_total", self.prompt_tokens, answered_by=trace.answered_by)
        metrics.count("see_completion_tokens_total", completion_tokens, answered_by=trace.answered_by)
        logger.info(
            "answered by %s (%s), sequence version %d: %d experts asked, %d prompt tokens, %d tokens, %.0f ms",
            *(trace.answered_by, trace.reason, trace.sequence_version, len(trace.asked)),
            *(self.prompt_tokens, completion_tokens, seconds * 1000),
        )


def record_walk(trace: Trace) -> None:
    """Record who answers a query, and what each expert decided."""
    metrics.count("see_answers_total", answered_by=trace.answered_by, reason=trace.reason)
    for decision in trace.asked:
        metrics.count("see_decisions_total", expert=decision.expert, decision=decision.decision)
        if decision.p_accept is not None:
            metrics.observe("see_p_accept", decision.p_accept, expert=decision.expert)
