"""Options of the deployments whose replicas hold an engine."""

from __future__ import annotations

import pytest

from see_ray.config import ServeConfig
from see_ray.serving.engine_host import replica_options


def test_a_fixed_number_of_replicas_is_not_autoscaled() -> None:
    options = replica_options(ServeConfig(min_replicas=2, max_replicas=2))
    assert options["num_replicas"] == 2
    assert "autoscaling_config" not in options


def test_serve_autoscales_between_the_two_limits() -> None:
    options = replica_options(ServeConfig(min_replicas=1, max_replicas=4, look_back_period_s=6))
    assert "num_replicas" not in options
    assert options["autoscaling_config"]["max_replicas"] == 4
    assert options["autoscaling_config"]["metrics_interval_s"] == 2


@pytest.mark.parametrize(("engine", "size", "workers"), [("vllm", 2, 2), ("vllm", 1, 0), ("embedded", 2, 0)])
def test_vllms_workers_have_bundles_of_their_own(engine: str, size: int, workers: int) -> None:
    options = replica_options(ServeConfig(engine=engine, vllm={"tensor_parallel_size": size}, replica_gpus=1))
    bundles = options.get("placement_group_bundles", [])
    assert sum(bundle.get("GPU", 0) for bundle in bundles) == workers
    assert options["ray_actor_options"]["num_gpus"] == (0 if workers else 1)
