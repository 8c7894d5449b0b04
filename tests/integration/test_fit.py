"""Fitting with Ray Train and DeepSpeed: any number of workers and ZeRO stage, the same expert."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from see_ray.config import Config
from see_ray.data.demo_tasks import DemoTask
from see_ray.data.general_queries import read_general_file
from see_ray.data.reconstruct import Example, Kind, reconstruct
from see_ray.data.task import SplitOptions, read_task
from see_ray.errors import FitError
from see_ray.fit.launch import fit_expert
from see_ray.fit.report import Progress
from see_ray.fit.spec import FitSpec
from see_ray.fit.status import FitListener
from see_ray.models.activation import activation_of
from see_ray.models.base_model import BaseModel

TOLERANCE = 0.02
"""Largest difference of P(accept) between fits that differ only in how sums are ordered."""


class Recorder(FitListener):
    """Keeps the status of a fit."""

    def __init__(self) -> None:
        self.progresses: list[Progress] = []
        self.notes: list[str] = []
        self.measured: list[tuple[int, dict[str, float]]] = []

    def progress(self, progress: Progress) -> None:
        self.progresses.append(progress)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def figures(self, step: int, figures: dict[str, float]) -> None:
        self.measured.append((step, figures))


@pytest.fixture(scope="module")
def prepared(
    config: Config,
    tokenizer: Any,
    tasks: dict[str, DemoTask],
    task_file: Callable[[DemoTask, int], Path],
    general_file: Path,
) -> Any:
    """21 accept and 16 pass examples: neither divides by the workers or by the batch."""
    task = read_task(task_file(tasks["dates"], 24), split=SplitOptions(eval_share=0.1))
    activation = activation_of(tokenizer, config.base_model, config.fit)
    general = read_general_file(general_file)
    return activation, reconstruct(task, tokenizer, activation, config.reconstruct, earlier={}, general=general, seed=0)


@pytest.fixture(scope="module")
def fit(
    config: Config,
    ray_here: None,
    base: BaseModel,
    prepared: Any,
    tokenizer: Any,
    tasks: dict[str, DemoTask],
    tmp_path_factory: pytest.TempPathFactory,
) -> Any:
    """Fits with changed settings; returns the folder and what fit_expert returned."""
    from see_ray.models.activation import encode_prompt

    activation, reconstruction = prepared
    kinds: list[tuple[str, tuple[int, ...], Kind]] = [
        ("dates", (activation.accept, 42, 43), "accept"),
        ("tickets", (activation.refuse,), "rehearsal"),
    ]
    held_out = [
        Example(tuple(encode_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])), target, kind, name)
        for name, target, kind in kinds
        for row in tasks[name].test[:8]
    ]

    def run(name: str, listener: Any = None, **changes: Any) -> Any:
        folder = tmp_path_factory.mktemp(name)
        settings = config.fit.model_copy(update={"train_batch_size": 8, "threads_per_worker": 1, **changes})
        point = activation_of(tokenizer, config.base_model, settings)
        spec = FitSpec(reconstruction.train, base, config.base_model, point, settings, held_out)
        return folder, fit_expert(f"test-{name}", spec, folder, listener)

    return run


@pytest.fixture(scope="module")
def one_worker(fit: Any) -> Any:
    recorder = Recorder()
    folder, fitted = fit("one", recorder)
    return folder, fitted, recorder


def test_a_fit_learns(one_worker: Any) -> None:
    summary = one_worker[1].summary
    assert summary.last_loss < summary.first_loss / 5
    assert summary.steps == len(summary.losses) == 2 * 5  # 2 epochs of 37 examples, 8 a step


def test_held_out_decisions_tell_own_from_foreign(one_worker: Any) -> None:
    decisions = one_worker[1].decisions
    assert sum(p > 0.5 for p in decisions[:8]) >= 7
    assert sum(decisions[8:]) / 8 < sum(decisions[:8]) / 8


def test_the_adapter_is_compared_with_the_base_model_alone(
    one_worker: Any, base: BaseModel, config: Config, tokenizer: Any, tasks: dict[str, DemoTask]
) -> None:
    import torch

    from see_ray.models.activation import encode_prompt
    from see_ray.models.base_model import load_model

    model, losses = load_model(base, config.base_model, "cpu"), []
    for row in tasks["dates"].test[:8]:
        prompt = encode_prompt(tokenizer, [{"role": "user", "content": row["prompt"]}])
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt, 42]])).logits[0, -2:]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([42, 43])).item())
    comparison = one_worker[1].comparison
    assert comparison.rows == 8
    assert comparison.generalist_loss == pytest.approx(sum(losses) / 8, rel=1e-3)
    assert abs(comparison.expert_loss - comparison.generalist_loss) > 0.1
    assert comparison.change > 1


def test_the_workers_report_their_progress(one_worker: Any) -> None:
    phases = [progress.phase for progress in one_worker[2].progresses]
    assert "starting" in phases
    steps = [progress for progress in one_worker[2].progresses if progress.phase == "fit"]
    assert [progress.done for progress in steps] == sorted(progress.done for progress in steps)
    assert all(progress.total == 10 and progress.loss > 0 and progress.tokens_per_s > 0 for progress in steps)


def test_prefixes_are_read_once_and_kept(one_worker: Any) -> None:
    assert one_worker[1].summary.kv_hit_rate == 1.0


def test_suffixes_are_packed_without_padding(one_worker: Any) -> None:
    assert one_worker[1].summary.padding_share == 0.0


def test_every_row_is_read_once_an_epoch(one_worker: Any) -> None:
    assert (one_worker[1].summary.fewest_reads, one_worker[1].summary.most_reads) == (2, 2)


def test_every_step_is_measured_once_and_held_out_rows_after_each_epoch(one_worker: Any) -> None:
    measured = one_worker[2].measured
    assert [step for step, figures in measured if "train/loss" in figures] == list(range(1, 11))
    assert [step for step, figures in measured if "eval/own_accuracy" in figures] == [5, 10]


def test_the_result_is_a_peft_folder(one_worker: Any) -> None:
    folder = one_worker[0]
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["base_model_name_or_path"]) == ("LORA", 8, "embedded")
    assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "fit.json"}


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_workers_fit_the_same_expert_as_one(fit: Any, one_worker: Any, stage: int) -> None:
    # Under ZeRO 3 every forward gathers the whole model: evaluate only in the end.
    _, fitted = fit(f"zero{stage}", num_workers=2, zero_stage=stage, eval_every_steps=1000)
    assert (fitted.summary.workers, fitted.summary.zero_stage) == (2, stage)
    assert (fitted.summary.fewest_reads, fitted.summary.most_reads) == (2, 2)
    assert fitted.summary.losses[0] == pytest.approx(one_worker[1].summary.losses[0], rel=1e-4)
    assert fitted.decisions == pytest.approx(one_worker[1].decisions, abs=TOLERANCE)
    assert fitted.comparison.generalist_loss == pytest.approx(one_worker[1].comparison.generalist_loss, rel=1e-4)
    assert fitted.comparison.expert_loss == pytest.approx(one_worker[1].comparison.expert_loss, rel=0.05)


class Killer(Recorder):
    """Kills the fit's worker, once, after it has written a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.killed = 0

    def progress(self, progress: Progress) -> None:
        super().progress(progress)
        if progress.phase == "fit" and progress.done >= 5 and not self.killed:
            workers = [
                p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
            ]
            for worker in workers:
                worker.kill()
                self.killed += 1


@pytest.mark.slow
def test_a_fit_whose_worker_is_killed_goes_on_and_ends_as_undisturbed(fit: Any, one_worker: Any) -> None:
    killer = Killer()
    _, fitted = fit("killed", killer, checkpoint_every_steps=2)
    assert killer.killed == 1
    assert fitted.summary.resumed == 1
    assert any("continuing from the checkpoint of step" in note for note in killer.notes)
    undisturbed = one_worker[1].summary
    assert fitted.summary.steps == undisturbed.steps
    assert (fitted.summary.fewest_reads, fitted.summary.most_reads) == (2, 2)
    assert fitted.summary.losses == pytest.approx(undisturbed.losses, rel=0.02, abs=0.02)
    assert fitted.decisions == pytest.approx(one_worker[1].decisions, abs=TOLERANCE)


@pytest.fixture(scope="module")
def full(fit: Any) -> Any:
    """A fit in the full form that learns nothing, and may stop."""
    return fit("full", form="full", learning_rate=1e-12, eval_every_steps=1, early_stopping_patience=1)[1].summary


@pytest.mark.slow
def test_a_fit_that_learns_nothing_more_stops_early(full: Any) -> None:
    assert full.stopped_early
    assert full.steps == len(full.evaluations) == 2


@pytest.mark.slow
def test_the_full_form_keeps_no_prefix(full: Any) -> None:
    assert full.kv_hit_rate == 0.0


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_fit(fit: Any) -> None:
    with pytest.raises(FitError, match=r"loss became (nan|inf) at step \d+, whose rows are .*dates\.jsonl:\d+"):
        fit("nan", learning_rate=1e30, max_grad_norm=1e30, warmup_ratio=0.0)


def test_out_of_memory_says_what_is_needed_and_which_settings_change_it(config: Config, base: BaseModel) -> None:
    from see_ray.fit.memory import out_of_memory_message

    message = out_of_memory_message(MemoryError("no room for 9 GB"), config.base_model, 1000, config.fit)
    assert "no room for 9 GB" in message
    assert "about 0.5 GB for the base model" in message
    assert "one micro-batch of 1000 tokens" in message
    for setting in ("fit.max_tokens_per_micro_batch (now 16384)", "fit.kv_store_gb (now 4)", "fit.zero_stage=3"):
        assert setting in message


def test_a_target_module_that_does_not_exist_is_named(base: BaseModel, config: Config) -> None:
    from see_ray.fit.peft_adapter import with_adapter
    from see_ray.models.base_model import load_model

    settings = config.fit.model_copy(update={"target_modules": ("no_such_layer",)})
    with pytest.raises(FitError, match="no_such_layer"):
        with_adapter(load_model(base, config.base_model), settings)
