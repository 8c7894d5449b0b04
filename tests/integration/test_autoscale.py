"""What the experiments ask, which policies they know, and the times that the model works with."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import psutil
import pytest
from loadtest.experiment import POLICIES, Scene, draws
from loadtest.service_times import measure, of_endpoint
from loadtest.simulation import Design, Times

from see_ray.config import load_config
from see_ray.errors import ConfigError, ServingError
from see_ray.store.expert_store import ExpertStore


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
    draw = draws(ExpertStore.open(config.store.url), "dates")
    kinds = Counter(draw(0, random.Random(seed))[0] for seed in range(300))
    assert kinds["dates"] > 3 * (kinds["tickets"] + kinds["general"])


def test_skewed_load_asks_most_for_the_newest(config, experts):
    draw = draws(ExpertStore.open(config.store.url), "skewed")
    kinds = Counter(draw(0, random.Random(seed))[0] for seed in range(600))
    newest, older = (ref.name for ref in ExpertStore.open(config.store.url).head().newest_first())
    assert kinds[newest] / kinds[older] == pytest.approx(2, rel=0.35)


def test_who_is_not_live_cannot_be_hot(config, experts):
    with pytest.raises(ConfigError, match="no expert nobody"):
        draws(ExpertStore.open(config.store.url), "nobody")


def test_a_scene_is_read_from_a_line():
    assert Scene.of("spike:20@dates+learn") == Scene("spike:20@dates+learn", "spike", 20.0, "dates", True)
    assert Scene.of("step") == Scene("step", "step", None, None, False)
    assert Scene.of("spike:20@dates+learn").file == "spike-20-dates-learn"


@pytest.mark.parametrize("text", ["spike:", "spike:x", "nothing", "step+fit", ""])
def test_what_is_no_scene_is_refused(text):
    with pytest.raises(ConfigError, match=r"profile"):
        Scene.of(text)


def test_no_query_comes_twice(config, experts):
    draw = draws(ExpertStore.open(config.store.url))
    texts = [draw(0, random.Random(seed))[1] for seed in range(100)]
    assert len(set(texts)) == len(texts)


def test_service_times_are_those_of_real_work(config, experts):
    draw = draws(ExpertStore.open(config.store.url))
    texts = [draw(0, random.Random(seed))[1] for seed in range(20)]
    times = measure(config, texts, tokens=4, start=10, node=3)
    assert min(times.read, times.decide, times.token) > 0.001
    assert 0 < times.hand < times.read
    # Together they share the pass over the base model.
    assert times.read_more < times.read
    assert times.decide_also < times.decide
    assert times.token_more < times.token
    assert 1 <= times.crowd < 10
    assert (times.hop, times.start, times.node) == (0, 10, 3)


def test_an_endpoint_takes_more_of_the_processors_than_its_replicas_computing(config, experts, endpoint):
    draw = draws(ExpertStore.open(config.store.url))
    texts = [draw(0, random.Random(seed))[1] for seed in range(100, 105)]
    design = Design.of(config.serve, ("dates", "tickets"))
    nothing = Times(
        read=0, read_more=0, decide=0, decide_more=0, decide_also=0, token=0, token_more=0, hop=0, start=10, node=3
    )
    # If replicas took no time to compute, all that is seen would be the hops'; if they took for ever, nothing.
    all_hops = of_endpoint(endpoint, texts, nothing, design, tokens=4)
    assert all_hops.hop > 0.001
    assert 0 < all_hops.idle < psutil.cpu_count()
    assert of_endpoint(endpoint, texts, replace(nothing, decide=100.0), design, tokens=4).hop == 0


def test_without_an_expert_there_is_nothing_to_measure(config, tmp_path):
    empty = config.model_copy(update={"store": config.store.model_copy(update={"url": str(tmp_path)})})
    with pytest.raises(ServingError, match="see learn"):
        measure(empty, ["a", "b"], tokens=4, start=0, node=0)
