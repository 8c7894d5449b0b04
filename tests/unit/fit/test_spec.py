"""A fit's digest: the same for whatever gives the same adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from see_ray.config import BaseModelConfig, FitConfig
from see_ray.data.reconstruct import Example
from see_ray.fit.spec import SETTINGS_WITHOUT_EFFECT_ON_RESULT, FitSpec
from see_ray.models.activation import Activation
from see_ray.models.base_model import BaseModel

SPEC = FitSpec(
    examples=[Example((1, 2, 3), (60, 5), "accept", "a"), Example((4, 2, 3), (61,), "general", "b")],
    base=BaseModel("small", Path("here"), "fingerprint"),
    base_config=BaseModelConfig(),
    activation=Activation((2, 3), 1, 60, 61),
    config=FitConfig(),
    held_out=[Example((5, 2, 3), (61,), "mixed", "c")],
)


def test_settings_without_effect_on_the_result_are_settings() -> None:
    assert set(FitConfig.model_fields) >= SETTINGS_WITHOUT_EFFECT_ON_RESULT


@pytest.mark.parametrize(
    "same",
    [
        replace(SPEC, config=FitConfig(num_workers=3, zero_stage=3, kv_store_gb=1, checkpoint_every_steps=5)),
        replace(SPEC, base=BaseModel("other name", Path("elsewhere"), "fingerprint")),
        # Kinds and names of rows are for people and reports: an older version wrote other ones for the same data.
        replace(SPEC, held_out=[Example((5, 2, 3), (61,), "rehearsal", "other")]),
    ],
    ids=["settings of workers", "another place", "kinds of rows"],
)
def test_what_does_not_change_the_adapter_does_not_change_the_digest(same: Any) -> None:
    assert same.digest() == SPEC.digest()


@pytest.mark.parametrize(
    "other",
    [
        replace(SPEC, config=FitConfig(learning_rate=1e-5)),
        replace(SPEC, base=BaseModel("small", Path("here"), "another")),
        replace(SPEC, examples=SPEC.examples[::-1]),
        replace(SPEC, held_out=()),
        replace(SPEC, activation=Activation((2, 3), 2, 60, 61)),
    ],
    ids=["learning rate", "base model", "order of examples", "held-out rows", "activation"],
)
def test_what_changes_the_adapter_changes_the_digest(other: Any) -> None:
    assert other.digest() != SPEC.digest()


def test_prefix_lengths_end_at_the_activation_point() -> None:
    assert SPEC.prefix_lengths() == [2, 2]
    assert replace(SPEC, activation=Activation((2, 3), None, 60, 61)).prefix_lengths() == [0, 0]
