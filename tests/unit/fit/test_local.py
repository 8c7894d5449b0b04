"""A fit in this process gives the adapter that DeepSpeed gives; on a small random model, where that takes seconds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from see_ray.config import BaseModelConfig, FitConfig
from see_ray.data.reconstruct import Example
from see_ray.fit.local import fit_local, learning_rate_factor
from see_ray.fit.spec import FitSpec
from see_ray.models.activation import Activation
from see_ray.models.base_model import BaseModel

ACTIVATION = Activation((1, 2, 3), 1, 60, 61)
CONFIG = FitConfig(
    r=4, train_batch_size=4, num_train_epochs=3, learning_rate=1e-2, weight_decay=0.01, max_tokens_per_micro_batch=20
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def small_model(dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
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


def spec(config: FitConfig = CONFIG, held_out: tuple[Example, ...] = ()) -> FitSpec:
    base = BaseModel("small", Path(), "")
    return FitSpec(small_examples(), base, BaseModelConfig(), ACTIVATION, config, held_out)


def with_deepspeed(dtype: str, folder: Path) -> None:
    """The steps of `trainer` with DeepSpeed's engine, alone in a process."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    from see_ray.fit.deepspeed_config import deepspeed_config, initialize_engine
    from see_ray.fit.held_out import HeldOutRows
    from see_ray.fit.loss import ExpertLoss
    from see_ray.fit.optimizer_state import weights
    from see_ray.fit.peft_adapter import save_adapter, with_adapter
    from see_ray.fit.prefix_cache import PrefixCache
    from see_ray.fit.rank_batches import RankBatches
    from see_ray.fit.rank_model import RankModel
    from see_ray.fit.schedule import Schedule

    model = small_model(DTYPES[dtype])
    torch.manual_seed(CONFIG.seed)
    peft = with_adapter(model, CONFIG)
    examples = small_examples()
    schedule = Schedule(spec().prefix_lengths(), CONFIG, 1)
    store = torch.distributed.FileStore(str(folder / "store"), 1)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    engine, _ = initialize_engine(
        ExpertLoss(peft, ACTIVATION, CONFIG), deepspeed_config(CONFIG, DTYPES[dtype], 1, schedule.steps)
    )
    rank_model = RankModel(engine, ACTIVATION)
    prefixes = PrefixCache(rank_model, examples, schedule, CONFIG)
    batches = RankBatches(rank_model, examples, schedule, prefixes, CONFIG)
    prefixes.fill(lambda progress: None)
    losses = [batches.train_step(batch)[0] for batch in schedule]
    held_out = HeldOutRows(rank_model, examples, prefixes.free_tokens)
    result = {
        "losses": [CONFIG.indicator_weight * loss.indicator + loss.response for loss in losses],
        "decisions": held_out.evaluate(lambda progress: None).decisions,
    }
    state = {name.removeprefix("model."): value for name, value in weights(engine).items()}
    save_adapter(state, peft, ACTIVATION, BaseModel("small", folder, ""), folder)
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture(scope="module", params=list(DTYPES))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(what fit_local returned, its folder, what DeepSpeed gave, its folder, type of the weights)"""
    here, there = tmp_path_factory.mktemp("here"), tmp_path_factory.mktemp("there")
    fitted = fit_local(spec(held_out=tuple(small_examples())), small_model(DTYPES[request.param]), here)
    done = subprocess.run(
        [sys.executable, __file__, request.param, str(there)],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return fitted, here, json.loads((there / "result.json").read_text()), there, request.param


def test_the_losses_are_those_of_deepspeed(both: Any) -> None:
    fitted, _, result, _, dtype = both
    assert len(fitted.losses) == 18
    assert fitted.losses == pytest.approx(result["losses"], rel=1e-4 if dtype == "float32" else 0.02)
    assert fitted.comparison is not None
    assert fitted.comparison.expert_loss < fitted.comparison.generalist_loss - 0.05  # it has learned something


def test_the_adapter_is_that_of_deepspeed(both: Any) -> None:
    _, here, _, there, dtype = both
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (here, there))
    assert ours.keys() == theirs.keys()
    apart = sum(float((ours[name] - value).square().sum()) for name, value in theirs.items()) ** 0.5
    size = sum(float(value.square().sum()) for value in theirs.values()) ** 0.5
    assert apart < (1e-3 if dtype == "float32" else 0.05) * size


def test_the_decisions_are_those_of_deepspeed(both: Any) -> None:
    fitted, _, result, _, dtype = both
    assert fitted.decisions == pytest.approx(result["decisions"], abs=1e-3 if dtype == "float32" else 0.03)


def test_the_base_model_is_as_before(tmp_path: Path) -> None:
    model = small_model(torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit_local(spec(), model, tmp_path)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_it_goes_on_from_an_adapter(tmp_path: Path) -> None:
    model = small_model(torch.float32)
    first = fit_local(spec(), model, tmp_path / "first")
    still = CONFIG.model_copy(update={"learning_rate": 1e-12})
    again = fit_local(spec(still), model, tmp_path / "again", start=tmp_path / "first")
    before, after = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "again"))
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in before.items())
    assert sum(again.losses) < sum(first.losses)


@pytest.mark.parametrize(("warmup", "steps"), [(1, 12), (3, 30)])
def test_the_learning_rate_is_that_of_deepspeed(warmup: int, steps: int) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.runtime.lr_schedules import WarmupCosineLR

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = WarmupCosineLR(
        optimizer, total_num_steps=steps, warmup_num_steps=warmup, warmup_type="linear", cos_min_ratio=0.0001
    )
    for step in range(steps):
        assert learning_rate_factor(step, warmup, steps) == pytest.approx(optimizer.param_groups[0]["lr"])
        scheduler.step()


if __name__ == "__main__":
    with_deepspeed(sys.argv[1], Path(sys.argv[2]))
