"""Open-loop load on an endpoint: requests are sent when they are due, whether or not others were answered.

    poisson_arrivals(rate, seconds, draw, seed)  -> when which query is due: a Poisson process with a changing rate
    offer_load(url, arrivals)                    -> the outcome of each

A closed loop (so many users, each waiting for an answer before the next question) slows down with the endpoint and
hides its overload; the usual load tools are of that kind.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from see_ray.errors import ConfigError

Rate = Callable[[float], float]
"""Second of the run -> offered requests a second."""

DrawQuery = Callable[[float, random.Random], tuple[str, str]]
"""Second of the run, random generator -> a query: (kind, text)."""

MAX_TOKENS = 8
"""Default limit of an answer, in tokens."""

TIMEOUT_S = 120.0
"""Seconds after which a client gives up."""


@dataclass(frozen=True)
class Arrival:
    """A request that is due `at` seconds after the start; `kind` is for the report."""

    at: float
    kind: str
    text: str


@dataclass(frozen=True)
class Outcome:
    """The outcome of one arrival.

    Attributes:
        at: seconds after the start when it was due.
        late: seconds by which it was sent later than that: the generator's own delay.
        status: HTTP status; 0 where there was no complete response.
        seconds: from sending to the end of the answer.
        answered_by: the expert, `generalist`, or empty.
        retry_after: seconds, of a refusal.
        tokens: of the answer.
    """

    at: float
    kind: str
    late: float
    status: int
    seconds: float
    answered_by: str = ""
    retry_after: int | None = None
    tokens: int = 0


def load_profile(name: str, base: float, peak: float, seconds: float) -> Rate:
    """A load profile by name, in requests a second between `base` and `peak`.

    - steady: `base`.
    - step: `base`, then `peak` after a third of the time.
    - ramp: rising linearly from `base` to `peak`.
    - spike: `base`, with `peak` for a tenth of the time.
    - diurnal: two sine waves between the two.
    - idle: nothing, then `peak` for a quarter of the time, then nothing.

    Raises:
        ConfigError: no profile of that name.
    """

    def ramp(t: float) -> float:
        return base + (peak - base) * t / seconds

    def diurnal(t: float) -> float:
        return base + (peak - base) * (1 - math.cos(4 * math.pi * t / seconds)) / 2

    profiles: dict[str, Rate] = {
        "steady": lambda t: base,
        "step": lambda t: peak if t >= seconds / 3 else base,
        "ramp": ramp,
        "spike": lambda t: peak if 0.4 <= t / seconds < 0.5 else base,
        "diurnal": diurnal,
        "idle": lambda t: peak if 0.25 <= t / seconds < 0.5 else 0.0,
    }
    if name not in profiles:
        raise ConfigError(f"there is no load profile {name}; choose from {', '.join(profiles)}")
    return profiles[name]


def poisson_arrivals(rate: Rate, seconds: float, draw: DrawQuery, seed: int = 0) -> list[Arrival]:
    """Arrivals of a Poisson process with a time-varying rate, by thinning (Lewis and Shedler, 1979)."""
    rng = random.Random(seed)
    max_rate = max(rate(seconds * step / 1000) for step in range(1001))
    arrivals: list[Arrival] = []
    t = 0.0
    while max_rate > 0:
        t += rng.expovariate(max_rate)
        if t >= seconds:
            break
        if rng.random() < rate(t) / max_rate:
            arrivals.append(Arrival(t, *draw(t, rng)))
    return arrivals


async def offer_load(
    url: str,
    arrivals: Sequence[Arrival],
    *,
    model: str = "see",
    max_tokens: int = MAX_TOKENS,
    api_key: str | None = None,
) -> list[Outcome]:
    """Send each arrival when it is due, however many are in flight, and wait for the last.

    Args:
        url: of the endpoint.
        arrivals: in order of time.
        model: the request's `model`.
        max_tokens: limit of each answer.
        api_key: where the endpoint asks for one.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    started = time.monotonic()
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=TIMEOUT_S) as client:

        async def send(arrival: Arrival) -> Outcome:
            messages = [{"role": "user", "content": arrival.text}]
            body = {"model": model, "messages": messages, "max_tokens": max_tokens}
            sent = time.monotonic()
            status, answered_by, retry_after, tokens = 0, "", None, 0
            try:
                response = await client.post("/v1/chat/completions", json=body)
                status, answered_by = response.status_code, response.headers.get("x-see-expert", "")
                retry_after = int(response.headers["retry-after"]) if "retry-after" in response.headers else None
                tokens = response.json()["usage"]["completion_tokens"] if status == 200 else 0
            except httpx.HTTPError:
                pass
            return Outcome(
                at=arrival.at,
                kind=arrival.kind,
                late=sent - started - arrival.at,
                status=status,
                seconds=time.monotonic() - sent,
                answered_by=answered_by,
                retry_after=retry_after,
                tokens=tokens,
            )

        in_flight = []
        for arrival in arrivals:
            await asyncio.sleep(max(0.0, started + arrival.at - time.monotonic()))
            in_flight.append(asyncio.create_task(send(arrival)))
        return list(await asyncio.gather(*in_flight))
