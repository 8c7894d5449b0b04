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


def _engine(stage: int, world: int, rank: int) -> tuple[Any, Any, Any]:
    """A new fit of a tiny model: (share, schedule, learning rate's schedule)."""
    import deepspeed
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from see_ray.config import FitConfig
    from see_ray.data.reconstruct import Example
    from see_ray.fit.rank_batches import ExpertLoss, RankBatches
    from see_ray.fit.schedule import Schedule
    from see_ray.fit.trainer import deepspeed_config, with_adapter
    from see_ray.models.activation import Activation

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    config = FitConfig(
        r=3, train_batch_size=5, num_train_epochs=2, learning_rate=1e-2, zero_stage=stage, max_tokens_per_micro_batch=9
    )
    examples = [
        Example(tuple((i * 7 + j) % 60 for j in range(3 + i % 5)), (60, *range(i % 4), 62), "accept", f"row {i}")
        for i in range(13)
    ]
    activation = Activation((1, 2), 1, 60, 61)
    schedule = Schedule([len(e.prompt) - 1 for e in examples], config, world)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = with_adapter(LlamaForCausalLM(shape), config)
    engine, _, _, rates = deepspeed.initialize(
        model=ExpertLoss(model, activation, config),
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=deepspeed_config(config, torch.float32, world, STEPS),
    )
    share = RankBatches(examples, examples[:4], schedule, engine, rank, activation, config)
    share.read_prefixes(lambda progress: None)
    return share, schedule, rates


def _steps(share: Any, schedule: Any, first: int, last: int) -> list[float]:
    taken = [share.step(step)[0] for number, step in enumerate(schedule, 1) if first <= number <= last]
    return [loss.indicator + loss.response for loss in taken]


def _go_on(share: Any, schedule: Any, rates: Any, saved: Any) -> tuple[list[float], dict[str, Any]]:
    from see_ray.fit import optimizer_state

    tensors, scheduler = saved
    share.step(next(iter(schedule)))
    optimizer_state.restore(share._engine, tensors)
    rates.load_state_dict(scheduler)
    for group, rate in zip(share._engine.optimizer.param_groups, rates.get_lr(), strict=True):
        group["lr"] = rate
    return _steps(share, schedule, HALF + 1, STEPS), optimizer_state.weights(share._engine)


def _worker(rank: int, world: int, port: int, folder: str) -> None:
    """Two workers: fit straight through, and at each stage half way; one worker: go on from the latter."""
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    import torch

    from see_ray.fit import optimizer_state

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    results: dict[str, Any] = {}
    if world == 2:
        share, schedule, _ = _engine(2, world, rank)
        results["straight"] = _steps(share, schedule, 1, STEPS), optimizer_state.weights(share._engine)
        for stage in range(4):
            share, schedule, rates = _engine(stage, world, rank)
            _steps(share, schedule, 1, HALF)
            saved = optimizer_state.gather(share._engine), rates.state_dict()
            if rank == 0:
                torch.save(saved, f"{folder}/{stage}.pt")
            other = (stage + 1) % 4
            results[f"two workers, stage {stage} to {other}"] = _go_on(*_engine(other, world, rank), saved)
    else:
        for stage in range(4):
            saved = torch.load(f"{folder}/{stage}.pt", weights_only=True)
            results[f"two workers to one, stage {stage} to 2"] = _go_on(*_engine(2, world, rank), saved)
    if rank == 0:
        torch.save(results, f"{folder}/results-{world}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    import torch
    from torch.multiprocessing import spawn

    folder = tmp_path_factory.mktemp("states")
    found: dict[str, Any] = {}
    for world in (2, 1):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        spawn(_worker, args=(world, port, str(folder)), nprocs=world)
        found |= torch.load(Path(folder) / f"results-{world}.pt", weights_only=True)
    return found


CASES = [
    *(f"two workers, stage {stage} to {(stage + 1) % 4}" for stage in range(4)),
    *(f"two workers to one, stage {stage} to 2" for stage in range(4)),
]


@pytest.mark.parametrize("case", CASES)
def test_the_losses_are_those_of_the_undisturbed_fit(results, case):
    assert results[case][0] == pytest.approx(results["straight"][0][HALF:], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_the_adapter_is_that_of_the_undisturbed_fit(results, case):
    straight, found = results["straight"][1], results[case][1]
    assert straight.keys() == found.keys()
    for name, weights in straight.items():
        assert (weights - found[name]).abs().max() < 2e-4 * max(1.0, float(weights.abs().max())), name
