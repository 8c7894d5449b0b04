"""Admission control: reject requests that could not be answered in time, as soon as they arrive.

A request waits until its first token. Each served request gives a sample of the cost of a queue position, in seconds:
its wait, divided by the number of requests that were waiting when it was admitted (itself included). The expected wait
of the queue is its length times the mean cost of recent samples. A request that arrives when this exceeds `max_wait_s`
is rejected with 429 and `Retry-After`, so admitted requests wait a bounded time and nothing is computed for the others.
With more replicas the measured cost falls.

Measuring requests served per second instead would not work: an engine that prefills all waiting prompts before it
decodes serves in bursts, and a rate measured within a burst admits far too many.

This module does not use HTTP, models or Ray.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from see_ray.errors import RequestError

ALWAYS_ADMITTED = 16
"""Below this many waiting requests, none is rejected. `see demo` sends as many at once: two lists of prompts, each with
`client.AT_ONCE` concurrent requests."""

SAMPLES = 32
"""Most recently served requests over which the cost of a queue position is averaged."""


class AdmissionController:
    """Admits requests while the expected wait for a first token is below a limit.

    Args:
        max_wait_s: reject when the expected wait reaches this, in seconds.
        clock: returns seconds; simulations and tests pass their own.

    Attributes:
        waiting: admitted requests that still wait for their first token.
    """

    def __init__(self, max_wait_s: float, clock: Callable[[], float] = time.monotonic):
        self.waiting = 0
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._served: deque[tuple[float, int]] = deque(maxlen=SAMPLES)  # wait in seconds, queue position

    def seconds_per_position(self) -> float | None:
        """Mean cost of a queue position in seconds; None before any request was served."""
        if not self._served:
            return None
        return sum(seconds for seconds, _ in self._served) / sum(position for _, position in self._served)

    def expected_wait_s(self) -> float:
        """Seconds until all waiting requests are served; 0 before any request was served."""
        return self.waiting * (self.seconds_per_position() or 0.0)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Admit a request; it counts as waiting while the block runs. If the block raises, its wait is not a sample.

        Raises:
            RequestError: 429, the expected wait is too long.
        """
        expected_wait_s = self.expected_wait_s()
        known = self.seconds_per_position() is not None
        if self.waiting >= ALWAYS_ADMITTED and (not known or expected_wait_s >= self._max_wait_s):
            raise RequestError(
                f"too many requests: {self.waiting} are waiting, for about {expected_wait_s:.0f} s; try again later",
                429,
                "rate_limit_error",
                code="overloaded",
                retry_after_s=max(1, math.ceil(expected_wait_s - self._max_wait_s / 2)),
            )
        self.waiting += 1
        position, admitted_at = self.waiting, self._clock()
        try:
            yield
            self._served.append((self._clock() - admitted_at, position))
        finally:
            self.waiting -= 1
