"""What the experiments ask, which policies they know, and the times that the model works with."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from see_ray.autoscale import POLICIES, draws
from see_ray.config import load_config
from see_ray.errors import ServingError
from see_ray.service_times import measure
from see_ray.store import ExpertStore


@pytest.mark.parametrize("name", POLICIES)
def test_a_policys_settings_exist(name):
    serve = load_config(None, list(POLICIES[name].settings)).serve
    assert serve.min_replicas <= serve.max_replicas


def test_queries_are_of_every_live_expert_and_of_nobody(config, experts):
    draw = draws(ExpertStore.open(config.store.url))
    kinds = Counter(draw(0, random.Random(seed))[0] for seed in range(300))
    assert set(kinds) == {"tickets", "dates", "general"}
    assert kinds["general"] == pytest.approx(30, abs=20)


def test_a_hot_expert_gets_nine_of_ten(config, experts):
    draw = draws(ExpertStore.open(config.store.url), hot="dates")
    kinds = Counter(draw(0, random.Random(seed))[0] for seed in range(300))
    assert kinds["dates"] > 3 * (kinds["tickets"] + kinds["general"])


def test_no_query_comes_twice(config, experts):
    draw = draws(ExpertStore.open(config.store.url))
    texts = [draw(0, random.Random(seed))[1] for seed in range(100)]
    assert len(set(texts)) == len(texts)


def test_service_times_are_those_of_real_work(config, experts):
    draw = draws(ExpertStore.open(config.store.url))
    texts = [draw(0, random.Random(seed))[1] for seed in range(4)]
    times = measure(config, texts, tokens=4, hop=0.01, start=10, node=3)
    assert min(times.read, times.decide, times.token) > 0.001
    assert times.decide_more < times.decide  # together they share the pass over the base model
    assert times.token_more < times.token
    assert (times.hop, times.start, times.node) == (0.01, 10, 3)


def test_without_an_expert_there_is_nothing_to_measure(config, tmp_path):
    empty = config.model_copy(update={"store": config.store.model_copy(update={"url": str(tmp_path)})})
    with pytest.raises(ServingError, match="see learn"):
        measure(empty, ["a", "b"], tokens=4, hop=0, start=0, node=0)
