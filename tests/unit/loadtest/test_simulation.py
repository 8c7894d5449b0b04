"""The model against what queueing theory says, and against itself."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from loadtest.generator import Arrival, poisson_arrivals
from loadtest.simulation import EndpointDesign, ServiceTimes, Work, _Replica, _Simulation, processor_seconds, simulate

QUICK = ServiceTimes(
    read=0.2, read_more=0.16, decide=0.1, decide_more=0.06, decide_also=0.01, token=0.05, token_more=0.01, hop=0.005,
    start=5, node=20,
)  # fmt: skip
ONE = EndpointDesign("shared", ("a",), tokens=1, max_wait_s=1e9)


def steady(rate: float, seconds: float, kind: str = "a") -> list[Arrival]:
    return poisson_arrivals(lambda t: rate, seconds, lambda t, rng: (kind, ""), seed=1)


def test_alone_a_request_takes_the_sum_of_its_work() -> None:
    alone = steady(1, 5)[:1]
    run = simulate(alone, QUICK, replace(ONE, tokens=3), 5)
    # A hop, prefill and decision in one batch (0.04 is its own); a hop, three tokens.
    assert run.outcomes[0].seconds == pytest.approx(0.005 + 0.26 + 0.005 + 3 * 0.05)


def test_a_batch_pays_its_fixed_part_once() -> None:
    together = [replace(steady(1, 5)[0], at=0) for _ in range(3)]
    times = [outcome.seconds for outcome in simulate(together, QUICK, ONE, 5).outcomes]
    # 0.04 is a batch's own: 0.22 more for each prompt and its decision, 0.01 for each answer's step.
    assert times == pytest.approx([0.005 + 0.04 + 3 * 0.22 + 0.005 + 0.04 + 3 * 0.01] * 3)


def test_the_wait_at_a_replica_is_that_of_a_queue_with_one_server() -> None:
    """M/D/1 (Pollaczek and Khinchine): the mean wait is u s / (2 (1 - u)) for work of s seconds at utilization u."""
    simulation = _Simulation(replace(QUICK, token=QUICK.token_more), replace(ONE, prompts_per_batch=1))
    replica, waits = _Replica(simulation), []

    def one() -> Any:
        came = simulation.env.now
        yield replica.submit(Work(0.0, 0.5))
        waits.append(simulation.env.now - came - 0.5)

    def all_of_them() -> Any:
        for arrival in steady(1.4, 20000):
            yield simulation.env.timeout(arrival.at - simulation.env.now)
            simulation.env.process(one())

    simulation.env.process(all_of_them())
    simulation.env.run(until=20000)
    assert sum(waits) / len(waits) == pytest.approx(0.7 * 0.5 / (2 * 0.3), rel=0.05)


def test_per_expert_asks_one_after_another_and_each_reads_the_prompt() -> None:
    design = EndpointDesign("per_expert", ("a", "b", "c"), tokens=1)
    (first,) = simulate(steady(1, 5, "a")[:1], QUICK, design, 5).outcomes
    (last,) = simulate(steady(1, 5, "c")[:1], QUICK, design, 5).outcomes
    assert last.seconds - first.seconds == pytest.approx(2 * (0.005 + 0.26))


def test_a_prompt_that_is_read_once_is_handed_on() -> None:
    design = EndpointDesign("per_expert", ("a", "b", "c"), tokens=1, share_prefix=True)
    times = replace(QUICK, hand=0.003)
    (last,) = simulate(steady(1, 5, "c")[:1], times, design, 5).outcomes
    # A hop and reading; three hops (the first meanwhile), taking over and deciding; a hop, the first token.
    assert last.seconds == pytest.approx(0.005 + 0.2 + 2 * 0.005 + 3 * 0.103 + 0.005 + 0.05)
    (nobodys,) = simulate(steady(1, 5, "nobody")[:1], times, design, 5).outcomes
    assert nobodys.seconds == pytest.approx(last.seconds)  # the generalist has read it


def test_lookahead_asks_several_at_once() -> None:
    design = EndpointDesign("per_expert", tuple("abcd"), tokens=1)
    (one,) = simulate(steady(1, 5, "d")[:1], QUICK, design, 5).outcomes
    (four,) = simulate(steady(1, 5, "d")[:1], QUICK, replace(design, lookahead=4), 5).outcomes
    assert one.seconds - four.seconds == pytest.approx(3 * (0.005 + 0.26))


def test_overload_is_refused_and_the_served_wait_a_bounded_time() -> None:
    run = simulate(steady(20, 120), QUICK, replace(ONE, max_wait_s=10), 120)
    refused = [outcome for outcome in run.outcomes if outcome.status == 429]
    served = [outcome for outcome in run.outcomes if outcome.status == 200]
    assert len(served) / 120 == pytest.approx(1 / (0.22 + 0.01 + 0.04 / 6), rel=0.15)  # capacity
    assert len(refused) == len(run.outcomes) - len(served)
    assert all(outcome.seconds == 0 for outcome in refused)
    assert max(outcome.seconds for outcome in served) < 2 * 10


def test_replicas_come_with_the_load_and_go() -> None:
    scaling = replace(ONE, max_replicas=8, look_back_period_s=3, upscale_delay_s=2, downscale_delay_s=10)
    coming = [a for a in steady(8, 100) if a.at < 60]
    samples = simulate([*coming, replace(coming[-1], at=150)], QUICK, scaling, 150).samples
    assert max(sum(sample.replicas.values()) for sample in samples) == 8
    assert sum(samples[-1].replicas.values()) == 1


def test_from_zero_the_first_waits_for_node_and_replica() -> None:
    scaling = replace(ONE, min_replicas=0, max_replicas=2)
    run = simulate(steady(1, 5)[:1], QUICK, scaling, 5)
    assert 25 < run.outcomes[0].seconds < 27


def test_work_is_what_processors_do_for_a_query_wherever_they_are() -> None:
    design = EndpointDesign("per_expert", ("a", "b"), tokens=2, lookahead=2, share_prefix=True)
    times = replace(QUICK, hand=0.003)
    # Reading once; both decide, at the same time; two tokens; hops: reading, two decisions, answering.
    assert processor_seconds("a", times, design) == pytest.approx(0.2 + 2 * 0.103 + 2 * 0.05 + 4 * 0.005)


def test_what_else_runs_on_the_machine_takes_its_share() -> None:
    alone = steady(1, 5)[:1]
    (free,) = simulate(alone, QUICK, replace(ONE, cores=2), 5).outcomes
    (busy,) = simulate(alone, replace(QUICK, idle=1.0), replace(ONE, cores=2), 5).outcomes
    assert busy.seconds == pytest.approx(2 * free.seconds)


def test_processors_that_work_at_the_same_time_are_slower() -> None:
    two = [replace(steady(1, 5)[0], at=0) for _ in range(2)]
    design = replace(ONE, min_replicas=2, max_replicas=2, cores=2)
    free = simulate(two, QUICK, design, 5).summary()
    crowded = simulate(two, replace(QUICK, crowd=1.5), design, 5).summary()
    assert crowded["p50_s"] == pytest.approx(1.5 * free["p50_s"], rel=0.05)


def test_replicas_on_one_machine_wait_for_each_other() -> None:
    both = [replace(steady(1, 5)[0], at=0, kind=random.Random(0).choice(["a"])) for _ in range(4)]
    apart = simulate(both, QUICK, replace(ONE, min_replicas=4, max_replicas=4), 5).summary()
    together = simulate(both, QUICK, replace(ONE, min_replicas=4, max_replicas=4, cores=1), 5).summary()
    assert together["p99_s"] > 3 * apart["p50_s"]
