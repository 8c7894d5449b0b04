"""A fit in this process gives the adapter that DeepSpeed gives; on a small random model, where that takes seconds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from see_ray.config import FitConfig
from see_ray.data.reconstruct import Example
from see_ray.fit.local import fit_here, learning_rate_share
from see_ray.models.activation import Activation
from see_ray.models.base_model import BaseModel

ACTIVATION = Activation((1, 2, 3), 1, 60, 61)
CONFIG = FitConfig(
    r=4, train_batch_size=4, num_train_epochs=3, learning_rate=1e-2, weight_decay=0.01, max_tokens_per_micro_batch=20
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def small_model(dtype: torch.dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    shape = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(shape).to(dtype).requires_grad_(False).eval()


def small_examples() -> list[Example]:
    """22 rows: it does not divide by the batch, and `max_tokens_per_micro_batch` splits some steps."""
    draw = random.Random(3)
    made = []
    for number in range(22):
        prompt = (*(draw.randrange(4, 60) for _ in range(draw.randint(3, 9))), 1, 2, 3)
        mine = number % 3 != 0
        target = (60, *(draw.randrange(4, 60) for _ in range(draw.randint(1, 8))), 0) if mine else (61,)
        made.append(Example(prompt, target, "accept" if mine else "general"))
    return made


def with_deepspeed(dtype: str, folder: Path) -> None:
    """The steps of `fit_worker` with DeepSpeed's engine, alone in a process."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    import deepspeed

    from see_ray.fit.optimizer_state import weights
    from see_ray.fit.rank_batches import ExpertLoss, RankBatches
    from see_ray.fit.schedule import Schedule
    from see_ray.fit.trainer import deepspeed_config, save_adapter, with_adapter

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = small_model(DTYPES[dtype])
    torch.manual_seed(CONFIG.seed)
    peft = with_adapter(model, CONFIG)
    examples = small_examples()
    schedule = Schedule([len(ACTIVATION.split(list(e.prompt))[0]) for e in examples], CONFIG, 1)
    store = torch.distributed.FileStore(str(folder / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    engine, *_ = deepspeed.initialize(
        model=ExpertLoss(peft, ACTIVATION, CONFIG),
        model_parameters=[p for p in peft.parameters() if p.requires_grad],
        config=deepspeed_config(CONFIG, DTYPES[dtype], 1, schedule.steps),
    )
    share = RankBatches(examples, examples, schedule, engine, 0, ACTIVATION, CONFIG)
    share.read_prefixes(lambda progress: None)
    losses = [share.step(step)[0] for step in schedule]
    told = {
        "losses": [CONFIG.indicator_weight * loss.indicator + loss.response for loss in losses],
        "decisions": share.look(lambda progress: None).decisions,
    }
    state = {name.removeprefix("model."): value for name, value in weights(engine).items()}
    save_adapter(state, peft, ACTIVATION, BaseModel("small", folder, ""), folder)
    (folder / "told.json").write_text(json.dumps(told))


@pytest.fixture(scope="module", params=list(DTYPES))
def both(request, tmp_path_factory):
    """(what fit_here made, its folder, what DeepSpeed made, its folder, type of the weights)"""
    here, there = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("there")
    examples = small_examples()
    made = fit_here(
        examples, small_model(DTYPES[request.param]), BaseModel("small", here, ""), ACTIVATION, CONFIG, here,
        held_out=examples,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, request.param, str(there)], cwd=Path(__file__).parents[3],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return made, here, json.loads((there / "told.json").read_text()), there, request.param


def test_the_losses_are_those_of_deepspeed(both):
    made, _, told, _, dtype = both
    assert len(made.losses) == 18
    assert made.losses == pytest.approx(told["losses"], rel=1e-4 if dtype == "float32" else 0.02)
    assert made.comparison is not None
    assert made.comparison.expert_loss < made.comparison.generalist_loss - 0.05  # it has learned something


def test_the_adapter_is_that_of_deepspeed(both):
    _, here, _, there, dtype = both
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (here, there))
    assert ours.keys() == theirs.keys()
    apart = sum((ours[name] - value).square().sum() for name, value in theirs.items()).sqrt()
    size = sum(value.square().sum() for value in theirs.values()).sqrt()
    assert apart < (1e-3 if dtype == "float32" else 0.05) * size


def test_the_decisions_are_those_of_deepspeed(both):
    made, _, told, _, dtype = both
    assert made.decisions == pytest.approx(told["decisions"], abs=1e-3 if dtype == "float32" else 0.03)


def test_the_base_model_is_as_before(tmp_path):
    model = small_model(torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit_here(small_examples(), model, BaseModel("small", tmp_path, ""), ACTIVATION, CONFIG, tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_it_goes_on_from_an_adapter(tmp_path):
    model, base = small_model(torch.float32), BaseModel("small", tmp_path, "")
    first = fit_here(small_examples(), model, base, ACTIVATION, CONFIG, tmp_path / "first")
    still = CONFIG.model_copy(update={"learning_rate": 1e-12})
    again = fit_here(small_examples(), model, base, ACTIVATION, still, tmp_path / "again", start=tmp_path / "first")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "again"))
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in before.items())
    assert sum(again.losses) < sum(first.losses)


@pytest.mark.parametrize(("warmup", "steps"), [(1, 12), (3, 30)])
def test_the_learning_rate_is_that_of_deepspeed(warmup, steps):
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.runtime.lr_schedules import WarmupCosineLR

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = WarmupCosineLR(
        optimizer, total_num_steps=steps, warmup_num_steps=warmup, warmup_type="linear", cos_min_ratio=0.0001
    )
    for step in range(steps):
        assert learning_rate_share(step, warmup, steps) == pytest.approx(optimizer.param_groups[0]["lr"])
        scheduler.step()


if __name__ == "__main__":
    with_deepspeed(sys.argv[1], Path(sys.argv[2]))
