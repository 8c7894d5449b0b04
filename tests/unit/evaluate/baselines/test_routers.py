"""Classifiers that route queries, on made-up vectors and on real ones."""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import numpy
import pytest

from see_ray.config import Config
from see_ray.evaluate.baselines import routers, ssr
from see_ray.models.base_model import BaseModel, load_model

QUERIES = {
    "recipes": ["How do I bake bread?", "Give me a recipe for lentil soup.", "How long must rice cook?"],
    "planets": ["How far away is Mars?", "Which planet has the most moons?", "Why does Saturn have rings?"],
}
embeds = pytest.mark.skipif(
    importlib.util.find_spec(routers.EMBEDDING_PACKAGE) is None,
    reason="the embedding model is installed by make embeddings",
)


def clouds() -> tuple[numpy.ndarray, list[str]]:
    """Three clouds of points on a plane, one of them wide in a direction that says nothing."""
    rng = numpy.random.default_rng(0)
    centres = {"a": (0, 0), "b": (4, 0), "generalist": (0, 4)}
    points = [rng.normal(centre, 0.5, (30, 2)) for centre in centres.values()]
    return numpy.concatenate(points), [name for name in centres for _ in range(30)]


@pytest.mark.parametrize("fit", [partial(routers.fit_logistic_regression, seed=0), routers.fit_nearest_mean])
def test_points_go_to_their_own_cloud(fit: Any) -> None:
    classify = fit(*clouds())
    assert classify(numpy.array([[0.1, 0.2], [3.8, -0.1], [0.3, 4.2]])) == ["a", "b", "generalist"]


def test_a_single_class_takes_everything() -> None:
    assert routers.fit_logistic_regression(numpy.zeros((3, 2)), ["a"] * 3, 0)(numpy.ones((2, 2))) == ["a", "a"]


@embeds
def test_sentences_about_the_same_thing_are_nearer() -> None:
    vectors = routers.embed([text for texts in QUERIES.values() for text in texts])
    assert numpy.linalg.norm(vectors, axis=1) == pytest.approx(1)
    alike = vectors @ vectors.T
    assert alike[:3, :3].mean() > alike[:3, 3:].mean() + 0.2


@embeds
def test_the_diverse_part_has_something_of_each_kind() -> None:
    kind_of = {text: name for name, texts in QUERIES.items() for text in texts}
    assert {kind_of[text] for text in ssr.diverse(list(kind_of), 2, 0)} == {"recipes", "planets"}


def test_hidden_states_do_not_depend_on_what_stands_beside_them(base: BaseModel, config: Config) -> None:
    model = load_model(base, config.base_model, "cpu")
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]]
    together = routers.hidden_states(model, prompts)
    apart = numpy.concatenate([routers.hidden_states(model, [prompt]) for prompt in prompts])
    assert together == pytest.approx(apart, rel=1e-3, abs=1e-3)
