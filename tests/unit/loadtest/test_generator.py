"""Open-loop load: when requests are due, and that they are sent whether or not others were answered."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
from loadtest.generator import Arrival, load_profile, offer_load, poisson_arrivals

from see_ray.errors import ConfigError


def draw(t: float, rng: random.Random) -> tuple[str, str]:
    return "kind", "text"


# --- when they come ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["steady", "step", "ramp", "spike", "diurnal", "idle"])
def test_a_profile_stays_between_its_rates(name: str) -> None:
    rates = [load_profile(name, 2, 10, 100)(second) for second in range(100)]
    assert min(rates) >= (0 if name == "idle" else 2)
    assert max(rates) <= 10
    assert len(set(rates)) == 1 or max(rates) > 9


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="ramp"):
        load_profile("romp", 1, 2, 3)


def test_as_many_come_as_the_rate_says() -> None:
    coming = poisson_arrivals(load_profile("step", 5, 50, 300), 300, draw)
    assert sum(a.at < 100 for a in coming) == pytest.approx(500, rel=0.15)
    assert sum(a.at >= 100 for a in coming) == pytest.approx(10000, rel=0.05)


def test_gaps_are_those_of_a_poisson_process() -> None:
    coming = poisson_arrivals(lambda t: 10, 1000, draw)
    gaps = [b.at - a.at for a, b in itertools.pairwise(coming)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.05)


def test_the_same_seed_gives_the_same_load() -> None:
    assert poisson_arrivals(lambda t: 3, 50, draw, seed=4) == poisson_arrivals(lambda t: 3, 50, draw, seed=4)


def test_no_load_is_nobody() -> None:
    assert poisson_arrivals(lambda t: 0, 50, draw) == []


# --- offering it -----------------------------------------------------------------------------------


async def test_arrivals_wait_for_no_answer() -> None:
    """Twenty a second for a second, at a server that takes a second for each."""

    async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().splitlines() if line.startswith(b"content-length:"))
        await reader.readexactly(length)
        await asyncio.sleep(1)
        writer.write(b"HTTP/1.1 429 Too Many\r\nRetry-After: 7\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(slow, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        began = asyncio.get_running_loop().time()
        outcomes = await offer_load(f"http://127.0.0.1:{port}", [Arrival(n / 20, "k", "t") for n in range(20)])
        took = asyncio.get_running_loop().time() - began
    assert took < 5  # one after another they would take 20 s
    assert {(o.status, o.retry_after) for o in outcomes} == {(429, 7)}


async def test_a_server_that_is_not_there_is_a_failure_not_an_exception() -> None:
    (outcome,) = await offer_load("http://127.0.0.1:9", [Arrival(0, "k", "t")])
    assert outcome.status == 0
