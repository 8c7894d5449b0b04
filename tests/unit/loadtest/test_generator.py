"""Open-loop load: when requests come, that they wait for no answer, and what the endpoint does with too many."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter

import pytest
from loadtest.generator import Arrival, arrivals, offer, profile
from loadtest.report import Run, Second, per_second, quantile, written

from see_ray.errors import ConfigError


def draw(t: float, chance: random.Random) -> tuple[str, str]:
    return "kind", "text"


# --- when they come ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["steady", "step", "ramp", "spike", "diurnal", "idle"])
def test_a_profile_stays_between_its_rates(name):
    rates = [profile(name, 2, 10, 100)(second) for second in range(100)]
    assert min(rates) >= (0 if name == "idle" else 2)
    assert max(rates) <= 10
    assert len(set(rates)) == 1 or max(rates) > 9


def test_an_unknown_profile_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match="ramp"):
        profile("romp", 1, 2, 3)


def test_as_many_come_as_the_rate_says():
    coming = arrivals(profile("step", 5, 50, 300), 300, draw)
    assert sum(a.at < 100 for a in coming) == pytest.approx(500, rel=0.15)
    assert sum(a.at >= 100 for a in coming) == pytest.approx(10000, rel=0.05)


def test_gaps_are_those_of_a_poisson_process():
    coming = arrivals(lambda t: 10, 1000, draw)
    gaps = [b.at - a.at for a, b in itertools.pairwise(coming)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert deviation == pytest.approx(mean, rel=0.05)


def test_the_same_seed_gives_the_same_load():
    assert arrivals(lambda t: 3, 50, draw, seed=4) == arrivals(lambda t: 3, 50, draw, seed=4)


def test_no_load_is_nobody():
    assert arrivals(lambda t: 0, 50, draw) == []


# --- offering it -----------------------------------------------------------------------------------


async def test_arrivals_wait_for_no_answer():
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
        outcomes = await offer(f"http://127.0.0.1:{port}", [Arrival(n / 20, "k", "t") for n in range(20)])
        took = asyncio.get_running_loop().time() - began
    assert took < 5  # one after another they would take 20 s
    assert {(o.status, o.retry_after) for o in outcomes} == {(429, 7)}


async def test_a_server_that_is_not_there_is_a_failure_not_an_exception():
    (outcome,) = await offer("http://127.0.0.1:9", [Arrival(0, "k", "t")])
    assert outcome.status == 0


def test_a_spike_is_served_in_time_or_refused_at_once(endpoint, config):
    coming = arrivals(lambda t: 80, 3, lambda t, chance: ("general", f"What is {chance.randrange(999)} plus one?"))
    warm_up = asyncio.run(offer(endpoint, [Arrival(0, "k", "Hello"), Arrival(1, "k", "Hi")], max_tokens=2))
    assert {o.status for o in warm_up} == {200}
    outcomes = asyncio.run(offer(endpoint, coming, max_tokens=2))
    served = [o.seconds for o in outcomes if o.status == 200]
    refused = [o for o in outcomes if o.status == 429]
    assert len(served) + len(refused) == len(outcomes)
    assert len(served) >= 10
    assert len(refused) > len(outcomes) / 6
    assert all(o.retry_after and o.retry_after >= 1 for o in refused)
    assert quantile([o.seconds for o in refused], 0.5) < 2  # on two cores, which those that are served compute on
    assert max(served) < 3 * config.serve.max_wait_s
    (after,) = asyncio.run(offer(endpoint, [Arrival(0, "k", "Hello again")], max_tokens=2))
    assert after.status == 200


# --- what came of it ---------------------------------------------------------------------------------


def test_a_run_is_summed_up_and_written(tmp_path):
    from loadtest.generator import Outcome

    outcomes = [Outcome(0.5, "a", 0, 200, 1.0, "a"), Outcome(1.5, "a", 0, 429, 0.01, "", 3), Outcome(2, "a", 0, 0, 9)]
    run = Run("step", "fixed", 4, outcomes, [Second(float(n), 1, {"a": 2}) for n in range(5)])
    summary = run.summary()
    assert (summary["offered"], summary["served"], summary["refused"], summary["failed"]) == (3, 1, 1, 1)
    assert (summary["replica_seconds"], summary["node_seconds"]) == (8, 4)
    assert [row["served"] for row in per_second(run)] == [0, 1, 0, 0, 0]
    written(run, tmp_path / "fixed-step")
    assert {path.name for path in tmp_path.iterdir()} == {
        "fixed-step.csv", "fixed-step.outcomes.csv", "fixed-step.png"}  # fmt: skip
    assert json.loads(json.dumps(summary)) == summary


def test_a_quantile_is_a_value_that_was_there():
    values = [3.0, 1.0, 2.0]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([], 0.5)) == (2.0, 3.0, None)
    assert Counter(values)[quantile(values, 0.95)] == 1
