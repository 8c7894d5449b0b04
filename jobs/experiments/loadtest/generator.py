"""Offering load to an endpoint, open-loop: arrivals come when they come and wait for no answer.

    arrivals(profile, seconds, draw, seed)  -> when which query comes: a Poisson process with a rate that changes
    offer(url, arrivals)                    -> what became of each

A closed loop (so many users, each waiting for an answer before the next question) slows down with the endpoint
and hides its overload; the usual load tools are of that kind.
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

Profile = Callable[[float], float]
"""Offered requests a second at a second of the run."""

Draw = Callable[[float, random.Random], tuple[str, str]]
"""Which query comes at a second of the run: (its kind, its text)."""

TOKENS = 8
"""Longest answer that is asked for where nothing else is said."""

PATIENCE_S = 120.0
"""Seconds after which a client gives up."""


@dataclass(frozen=True)
class Arrival:
    """A request that is to come `at` seconds after the start; `kind` is for the report."""

    at: float
    kind: str
    text: str


@dataclass(frozen=True)
class Outcome:
    """What became of an arrival.

    Attributes:
        at: seconds after the start when it was due.
        late: seconds by which it was sent later than that: the generator's own delay.
        status: of HTTP; 0 where there was no whole answer.
        seconds: from sending to the answer's end.
        answered_by: the expert, `generalist`, or empty.
        retry_after: of a refusal, in seconds.
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


def profile(name: str, base: float, peak: float, seconds: float) -> Profile:
    """A load profile by name, between two rates.

    steady, step, ramp, spike: `base`, and from a third on `peak`; rising evenly; for a tenth of the time `peak`.
    diurnal: two days' waves. idle: nothing, then `peak` for a quarter, then nothing again.

    Raises:
        ConfigError: no profile of that name.
    """

    def ramp(t: float) -> float:
        return base + (peak - base) * t / seconds

    def diurnal(t: float) -> float:
        return base + (peak - base) * (1 - math.cos(4 * math.pi * t / seconds)) / 2

    profiles: dict[str, Profile] = {
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


def arrivals(rate: Profile, seconds: float, draw: Draw, seed: int = 0) -> list[Arrival]:
    """A Poisson process whose rate changes as `rate` says, by thinning (Lewis and Shedler, 1979)."""
    chance = random.Random(seed)
    most = max(rate(seconds * step / 1000) for step in range(1001))
    made: list[Arrival] = []
    t = 0.0
    while most > 0:
        t += chance.expovariate(most)
        if t >= seconds:
            break
        if chance.random() < rate(t) / most:
            made.append(Arrival(t, *draw(t, chance)))
    return made


async def offer(
    url: str, coming: Sequence[Arrival], *, model: str = "see", max_tokens: int = TOKENS, api_key: str | None = None
) -> list[Outcome]:
    """Send each arrival when it is due, however many are under way, and wait for the last.

    Args:
        url: of the endpoint.
        coming: in order of time.
        model: who is asked, as in a request.
        max_tokens: longest answer.
        api_key: where the endpoint asks for one.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    timeout = httpx.Timeout(PATIENCE_S)
    began = time.monotonic()
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=timeout) as client:

        async def one(arrival: Arrival) -> Outcome:
            chat = [{"role": "user", "content": arrival.text}]
            body = {"model": model, "messages": chat, "max_tokens": max_tokens}
            sent = time.monotonic()
            status, who, retry, tokens = 0, "", None, 0
            try:
                response = await client.post("/v1/chat/completions", json=body)
                status, who = response.status_code, response.headers.get("x-see-expert", "")
                retry = int(response.headers["retry-after"]) if "retry-after" in response.headers else None
                tokens = response.json()["usage"]["completion_tokens"] if status == 200 else 0
            except httpx.HTTPError:
                pass
            late = sent - began - arrival.at
            return Outcome(arrival.at, arrival.kind, late, status, time.monotonic() - sent, who, retry, tokens)

        under_way = []
        for arrival in coming:
            await asyncio.sleep(max(0.0, began + arrival.at - time.monotonic()))
            under_way.append(asyncio.create_task(one(arrival)))
        return list(await asyncio.gather(*under_way))
