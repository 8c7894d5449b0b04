"""Policies and scenes of the autoscaling experiment."""

from __future__ import annotations

from typing import Any

import pytest
from loadtest.scenario import POLICIES, Scenario, policies

from see_ray.config import load_config
from see_ray.errors import ConfigError


@pytest.mark.parametrize("name", POLICIES)
def test_a_policys_settings_exist(name: Any) -> None:
    serve = load_config(None, list(POLICIES[name].settings)).serve
    assert serve.min_replicas <= serve.max_replicas


def test_a_scene_is_read_from_a_line() -> None:
    assert Scenario.parse("spike:20@dates+learn") == Scenario("spike:20@dates+learn", "spike", 20.0, "dates", True)
    assert Scenario.parse("step") == Scenario("step", "step", None, None, False)
    assert Scenario.parse("spike:20@dates+learn").file_name == "spike-20-dates-learn"


@pytest.mark.parametrize("text", ["spike:", "spike:x", "nothing", "step+fit", ""])
def test_what_is_no_scene_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"profile"):
        Scenario.parse(text)


def test_policies_are_read_from_a_list() -> None:
    assert [policy.name for policy in policies("zero,fixed")] == ["zero", "fixed"]


def test_an_unknown_policy_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="no scaling policy 'slow'; there are fixed, quick, steady, zero"):
        policies("fixed,slow")
