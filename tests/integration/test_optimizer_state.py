"""A fit's state goes from any ZeRO stage and number of workers to any other, and the fit goes on as before.

A random two-layer model and plain processes instead of Ray: what is tested is the arithmetic.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

STEPS = 6
HALF = 3


def _start(stage: int, world_size: int, rank: int) -> tuple[Any, Any, Any, Any]:
    """A new fit of a tiny model: (batches, schedule, engine, learning-rate scheduler)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from see_ray.config import FitConfig
    from see_ray.data.reconstruct import Example
    from see_ray.fit.deepspeed_config import deepspeed_config, initialize_engine
    from see_ray.fit.loss import ExpertLoss
    from see_ray.fit.peft_adapter import with_adapter
    from see_ray.fit.prefix_cache import PrefixCache
    from see_ray.fit.rank_batches import RankBatches
    from see_ray.fit.rank_model import RankModel
    from see_ray.fit.schedule import Schedule
    from see_ray.models.activation import Activation

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    config = FitConfig(
        r=3, train_batch_size=5, num_train_epochs=2, learning_rate=1e-2, zero_stage=stage, max_tokens_per_micro_batch=9
    )
    examples = [
        Example(tuple((i * 7 + j) % 60 for j in range(3 + i % 5)), (60, *range(i % 4), 62), "accept", f"row {i}")
        for i in range(13)
    ]
    activation = Activation((1, 2), 1, 60, 61)
    schedule = Schedule([len(e.prompt) - 1 for e in examples], config, world_size)
    model = with_adapter(LlamaForCausalLM(shape), config)
    engine, scheduler = initialize_engine(
        ExpertLoss(model, activation, config), deepspeed_config(config, torch.float32, world_size, STEPS)
    )
    rank_model = RankModel(engine, activation, rank, world_size)
    prefixes = PrefixCache(rank_model, examples, schedule, config)
    prefixes.fill(lambda progress: None)
    return RankBatches(rank_model, examples, schedule, prefixes, config), schedule, engine, scheduler


def _losses(batches: Any, schedule: Any, first: int, last: int) -> list[float]:
    losses = [batches.train_step(batch)[0] for step, batch in enumerate(schedule, 1) if first <= step <= last]
    return [loss.indicator + loss.response for loss in losses]


def _resume(stage: int, world_size: int, rank: int, saved: Any) -> tuple[list[float], dict[str, Any]]:
    from see_ray.fit import optimizer_state

    batches, schedule, engine, scheduler = _start(stage, world_size, rank)
    tensors, scheduler_state = saved
    batches.train_step(next(iter(schedule)))
    optimizer_state.restore(engine, tensors)
    scheduler.load_state_dict(scheduler_state)
    for group, rate in zip(engine.optimizer.param_groups, scheduler.get_lr(), strict=True):
        group["lr"] = rate
    return _losses(batches, schedule, HALF + 1, STEPS), optimizer_state.weights(engine)


def _worker(rank: int, world_size: int, port: int, folder: str) -> None:
    """Two workers: fit straight through, and at each stage half way; one worker: resume from the latter."""
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    from see_ray.fit import optimizer_state

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    results: dict[str, Any] = {}
    if world_size == 2:
        batches, schedule, engine, _ = _start(2, world_size, rank)
        results["straight"] = _losses(batches, schedule, 1, STEPS), optimizer_state.weights(engine)
        for stage in range(4):
            batches, schedule, engine, scheduler = _start(stage, world_size, rank)
            _losses(batches, schedule, 1, HALF)
            saved = optimizer_state.gather(engine), scheduler.state_dict()
            if rank == 0:
                torch.save(saved, f"{folder}/{stage}.pt")
            other = (stage + 1) % 4
            results[f"two workers, stage {stage} to {other}"] = _resume(other, world_size, rank, saved)
    else:
        for stage in range(4):
            saved = torch.load(f"{folder}/{stage}.pt", weights_only=True)
            results[f"two workers to one, stage {stage} to 2"] = _resume(2, world_size, rank, saved)
    if rank == 0:
        torch.save(results, f"{folder}/results-{world_size}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    import torch
    from torch.multiprocessing.spawn import spawn

    folder = tmp_path_factory.mktemp("states")
    collected: dict[str, Any] = {}
    for world_size in (2, 1):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        spawn(_worker, args=(world_size, port, str(folder)), nprocs=world_size)
        collected |= torch.load(Path(folder) / f"results-{world_size}.pt", weights_only=True)
    return collected


CASES = [
    *(f"two workers, stage {stage} to {(stage + 1) % 4}" for stage in range(4)),
    *(f"two workers to one, stage {stage} to 2" for stage in range(4)),
]


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_of_the_undisturbed_fit(results: dict[str, Any], case: Any) -> None:
    assert results[case][0] == pytest.approx(results["straight"][0][HALF:], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_adapter_is_that_of_the_undisturbed_fit(results: dict[str, Any], case: Any) -> None:
    straight, resumed = results["straight"][1], results[case][1]
    assert straight.keys() == resumed.keys()
    for name, weights in straight.items():
        assert (weights - resumed[name]).abs().max() < 2e-4 * max(1.0, float(weights.abs().max())), name
