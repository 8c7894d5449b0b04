"""Refusing at once what could not be answered in time.

Requests wait in line for their first token. Each that was served tells what a place in the line costs: how long
it took, over how many were in the line when it came. Whoever comes when the places before would take too long is
refused with 429 and told when to come again. What is let in is answered in bounded time, and nothing is spent on
the rest. It knows nothing of HTTP, models or Ray; a place costs less by itself when replicas are added.

Counting what is served a second would not do: an engine that reads all waiting prompts before it answers any
serves in bursts, and a rate measured in one lets far too many in.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from see_ray.errors import RequestError

ALWAYS = 16
"""Requests that may wait in any case: as many as `see`'s own client sends at once (`client.AT_ONCE`)."""

REMEMBERED = 32
"""Requests served last from which the cost of a place is taken."""


class AdmissionController:
    """Who waits for a first token.

    Args:
        max_wait_s: the longest wait that somebody is let in for, in seconds.
        clock: gives seconds; another one in tests and simulations.
    """

    def __init__(self, max_wait_s: float, clock: Callable[[], float] = time.monotonic):
        self.waiting = 0
        self._max_wait = max_wait_s
        self._clock = clock
        self._served: deque[tuple[float, int]] = deque(maxlen=REMEMBERED)  # seconds, place in the line

    def seconds_per_position(self) -> float | None:
        """Seconds that a place in the line costs, of late; None before anybody was served."""
        if not self._served:
            return None
        return sum(seconds for seconds, _ in self._served) / sum(place for _, place in self._served)

    def expected_wait_s(self) -> float:
        """How long those who wait will take; 0 where nothing is known yet."""
        return self.waiting * (self.seconds_per_position() or 0.0)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Wait in line for as long as the block takes; a block that raises was not served.

        Raises:
            RequestError: 429; the line is too long.
        """
        wait = self.expected_wait_s()
        if self.waiting >= ALWAYS and (wait >= self._max_wait or self.seconds_per_position() is None):
            raise RequestError(
                f"too many requests: {self.waiting} wait for an answer, the last of them for about {wait:.0f} s; "
                "try again later",
                429,
                "rate_limit_error",
                code="overloaded",
                retry_after_s=max(1, math.ceil(wait - self._max_wait / 2)),
            )
        self.waiting += 1
        place, came = self.waiting, self._clock()
        try:
            yield
            self._served.append((self._clock() - came, place))
        finally:
            self.waiting -= 1
