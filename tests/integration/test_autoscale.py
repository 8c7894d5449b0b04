"""The load of the experiments, at a real endpoint, and the service times that the simulation works with."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from loadtest.generator import Arrival, offer_load, poisson_arrivals
from loadtest.report import quantile
from loadtest.scenario import query_mix
from loadtest.service_times import add_overhead, measure_service_times
from loadtest.simulation import EndpointDesign, ServiceTimes

from see_ray.config import Config
from see_ray.errors import ConfigError, ServingError
from see_ray.store.expert_store import ExpertStore

if TYPE_CHECKING:
    from tests.conftest import Fitted


def test_queries_are_of_every_live_expert_and_of_nobody(config: Config, experts: Fitted) -> None:
    draw = query_mix(ExpertStore.open(config.store.url))
    kinds = Counter(draw(0, random.Random(seed))[0] for seed in range(300))
    assert set(kinds) == {"tickets", "dates", "general"}
    assert kinds["general"] == pytest.approx(30, abs=20)


def test_a_hot_expert_gets_nine_of_ten(config: Config, experts: Fitted) -> None:
    draw = query_mix(ExpertStore.open(config.store.url), "dates")
    kinds = Counter(draw(0, random.Random(seed))[0] for seed in range(300))
    assert kinds["dates"] > 3 * (kinds["tickets"] + kinds["general"])


def test_skewed_load_asks_most_for_the_newest(config: Config, experts: Fitted) -> None:
    draw = query_mix(ExpertStore.open(config.store.url), "skewed")
    kinds = Counter(draw(0, random.Random(seed))[0] for seed in range(600))
    newest, older = (ref.name for ref in ExpertStore.open(config.store.url).head().newest_first())
    assert kinds[newest] / kinds[older] == pytest.approx(2, rel=0.35)


def test_who_is_not_live_cannot_be_hot(config: Config, experts: Fitted) -> None:
    with pytest.raises(ConfigError, match="no expert nobody"):
        query_mix(ExpertStore.open(config.store.url), "nobody")


def test_no_query_comes_twice(config: Config, experts: Fitted) -> None:
    draw = query_mix(ExpertStore.open(config.store.url))
    texts = [draw(0, random.Random(seed))[1] for seed in range(100)]
    assert len(set(texts)) == len(texts)


def test_service_times_are_those_of_real_work(config: Config, experts: Fitted) -> None:
    draw = query_mix(ExpertStore.open(config.store.url))
    texts = [draw(0, random.Random(seed))[1] for seed in range(20)]
    times = measure_service_times(config, texts, tokens=4, start=10, node=3)
    assert min(times.read, times.decide, times.token) > 0.001
    assert 0 < times.hand < times.read
    # Batched, they share the work of the base model.
    assert times.read_more < times.read
    assert times.decide_also < times.decide
    assert times.token_more < times.token
    assert 1 <= times.crowd < 10
    assert (times.hop, times.start, times.node) == (0, 10, 3)


def test_an_endpoint_takes_more_of_the_processors_than_its_replicas_computing(
    config: Config, experts: Fitted, endpoint: str
) -> None:
    draw = query_mix(ExpertStore.open(config.store.url))
    texts = [draw(0, random.Random(seed))[1] for seed in range(100, 105)]
    design = EndpointDesign.from_config(config.serve, ("dates", "tickets"))
    nothing = ServiceTimes(
        read=0, read_more=0, decide=0, decide_more=0, decide_also=0, token=0, token_more=0, hop=0, start=10, node=3
    )
    # If replicas took no time to compute, all that is seen would be the hops'; if they took for ever, nothing.
    all_hops = add_overhead(endpoint, texts, nothing, design, tokens=4)
    assert all_hops.hop > 0.001
    assert 0 < all_hops.idle < psutil.cpu_count()
    assert add_overhead(endpoint, texts, replace(nothing, decide=100.0), design, tokens=4).hop == 0


def test_without_an_expert_there_is_nothing_to_measure(config: Config, tmp_path: Path) -> None:
    empty = config.model_copy(update={"store": config.store.model_copy(update={"url": str(tmp_path)})})
    with pytest.raises(ServingError, match="see learn"):
        measure_service_times(empty, ["a", "b"], tokens=4, start=0, node=0)


def test_a_spike_is_served_in_time_or_refused_at_once(endpoint: str, config: Config) -> None:
    coming = poisson_arrivals(lambda t: 80, 3, lambda t, rng: ("general", f"What is {rng.randrange(999)} plus one?"))
    warm_up = asyncio.run(offer_load(endpoint, [Arrival(0, "k", "Hello"), Arrival(1, "k", "Hi")], max_tokens=2))
    assert {o.status for o in warm_up} == {200}
    outcomes = asyncio.run(offer_load(endpoint, coming, max_tokens=2))
    served = [o.seconds for o in outcomes if o.status == 200]
    refused = [o for o in outcomes if o.status == 429]
    assert len(served) + len(refused) == len(outcomes)
    assert len(served) >= 10
    assert len(refused) > len(outcomes) / 6
    assert all(o.retry_after and o.retry_after >= 1 for o in refused)
    median = quantile([o.seconds for o in refused], 0.5)
    assert median is not None
    assert median < 2  # on two cores, which those that are served compute on
    assert max(served) < 3 * config.serve.max_wait_s
    (after,) = asyncio.run(offer_load(endpoint, [Arrival(0, "k", "Hello again")], max_tokens=2))
    assert after.status == 200
