"""The training loop of one rank; `launch` starts it on any node, in a process of its own.

    base model + adapter ─► DeepSpeed ─► [last checkpoint] ─► prefixes ─► steps ─► PEFT folder

`rank_batches` computes one step. This module is the loop around it: resume from a checkpoint, write checkpoints,
evaluate on held-out rows, stop early, save the adapter.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from see_ray.config import BaseModelConfig, FitConfig
from see_ray.cpus import available_cpus
from see_ray.data.reconstruct import Example
from see_ray.errors import FingerprintError, FitError, StoreError
from see_ray.fit import optimizer_state
from see_ray.fit.checkpoint import Checkpoints, TrainState
from see_ray.fit.deepspeed_config import deepspeed_config, initialize_engine, select_accelerator
from see_ray.fit.early_stopping import BestAdapter, best_step, patience_exhausted
from see_ray.fit.held_out import EvalResult, HeldOutRows
from see_ray.fit.loss import ExpertLoss, Loss
from see_ray.fit.memory import largest_micro_batch, out_of_memory_message, peak_memory_gb
from see_ray.fit.peft_adapter import save_adapter, with_adapter
from see_ray.fit.prefix_cache import PrefixCache
from see_ray.fit.rank_batches import RankBatches
from see_ray.fit.rank_model import RankModel
from see_ray.fit.report import FitSummary, Fitted, Progress
from see_ray.fit.schedule import Schedule
from see_ray.fit.status import StatusReporter
from see_ray.models.activation import Activation
from see_ray.models.base_model import BaseModel, dtype_of, find, load_model


def fit_rank(settings: dict[str, Any]) -> None:
    """Run one rank of a fit; rank 0 reports progress and the adapter.

    Args:
        settings: what `see_ray.fit.launch.fit_expert` sends.

    Raises:
        FingerprintError: this node has another base model than the driver.
        FitError: the settings do not fit the base model, the loss is not finite, or memory ran out.
    """
    import ray

    config = FitConfig.model_validate(settings["config"])
    try:
        Trainer(settings, config).run()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        base_config = BaseModelConfig.model_validate(settings["base_config"])
        micro_batch = largest_micro_batch(ray.get(settings["examples"]), settings["activation"], config)
        raise FitError(out_of_memory_message(error, base_config, micro_batch, config)) from error


class Trainer:
    """One rank's run, from the base model to the adapter.

    Args:
        settings: what `see_ray.fit.launch.fit_expert` sends.
        config: of the fit.
    """

    def __init__(self, settings: dict[str, Any], config: FitConfig):
        import ray
        from ray import train

        context = train.get_context()
        self._began = time.perf_counter()
        select_accelerator()
        rank, world_size = context.get_world_rank(), context.get_world_size()
        local_world_size = context.get_local_world_size()
        torch.set_num_threads(config.threads_per_worker or max(1, available_cpus() // local_world_size))
        torch.manual_seed(config.seed)

        activation: Activation = settings["activation"]
        base_config = BaseModelConfig.model_validate(settings["base_config"])
        self._config, self._dtype = config, dtype_of(base_config)
        self._examples: list[Example] = ray.get(settings["examples"])
        self._held_out: list[Example] = ray.get(settings["held_out"])
        self._status = StatusReporter(settings["status"], rank)
        self._base = _find_base(base_config, settings["fingerprint"], rank)
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        peft = with_adapter(load_model(self._base, base_config, device), config)
        self._schedule = Schedule(
            [len(activation.split(list(example.prompt))[0]) for example in self._examples], config, world_size
        )
        self._engine: Any
        self._engine, self._lr_scheduler = initialize_engine(
            ExpertLoss(peft, activation, config),
            deepspeed_config(config, self._dtype, world_size, self._schedule.steps),
        )
        self._model = RankModel(self._engine, activation, rank, world_size)
        self._prefixes = PrefixCache(self._model, self._examples, self._schedule, config)
        self._batches = RankBatches(self._model, self._examples, self._schedule, self._prefixes, config)
        self._held_out_rows = HeldOutRows(self._model, self._held_out, self._prefixes.free_tokens)
        self._checkpoints = Checkpoints(settings["storage"], settings["checkpoints"])
        self._state = TrainState(reads=[0] * len(self._examples))
        self._best: BestAdapter | None = None
        self._evaluation: EvalResult | None = None  # of the adapter as it stands

    def run(self) -> None:
        """All steps after the last checkpoint, then the result."""
        setup_seconds = time.perf_counter() - self._began
        started = time.perf_counter()
        self._prefixes.fill(self._status.progress)
        self._resume()
        seconds_before = self._state.seconds
        saved_at = time.perf_counter()
        stopped = self._is_patience_exhausted()
        for step, batch in enumerate(self._schedule, 1):
            if step <= self._state.step:
                continue
            if stopped:
                break
            due = self._model.rank == 0 and time.perf_counter() - saved_at >= self._config.checkpoint_every_s
            loss, due = self._batches.train_step(batch, checkpoint_due=due)
            self._state.seconds = seconds_before + time.perf_counter() - started
            self._record(step, batch, loss)
            if step % (self._config.eval_every_steps or self._schedule.steps_per_epoch) == 0:
                self._evaluate()
                stopped = self._is_patience_exhausted()
            every = self._config.checkpoint_every_steps
            if step < self._schedule.steps and (due or (every and step % every == 0)):
                self._save_checkpoint()
                saved_at = time.perf_counter()
        self._state.seconds = seconds_before + time.perf_counter() - started
        if stopped and self._best is not None:
            optimizer_state.set_weights(self._engine, self._best.weights)
            self._evaluation = None
        evaluation = self._evaluation or self._held_out_rows.evaluate(self._status.progress)
        comparison = self._held_out_rows.compare()
        self._save_result(Fitted(self._summary(stopped, setup_seconds), evaluation.decisions, comparison))

    # --- checkpoints ---------------------------------------------------------------------------

    def _resume(self) -> None:
        """Continue from the last checkpoint, if there is one. Collective."""
        model = self._model
        loaded: list[Any] = [self._checkpoints.load(self._status.note) if model.rank == 0 else None]
        if model.world_size > 1:  # all ranks from the same one
            torch.distributed.broadcast_object_list(loaded, src=0)
        if loaded[0] is None:
            return
        state, tensors = loaded[0]
        # Optimizers create their state in their first step; restoring overwrites what this one did.
        self._batches.train_step(next(iter(self._schedule)))
        optimizer_state.restore(self._engine, tensors)
        self._lr_scheduler.load_state_dict(state.scheduler)
        for group, rate in zip(self._engine.optimizer.param_groups, self._lr_scheduler.get_lr(), strict=True):
            group["lr"] = rate
        self._engine.global_steps = state.step
        self._best = BestAdapter.from_tensors(tensors)
        self._state = state
        state.resumed += 1
        self._status.note(f"continuing from the checkpoint of step {state.step} of {self._schedule.steps}")

    def _save_checkpoint(self) -> None:
        """Gather the state of all ranks; rank 0 writes it. Collective."""
        tensors = optimizer_state.gather(self._engine)
        if self._best is not None:
            tensors |= self._best.to_tensors()
        if self._model.rank != 0:
            return
        self._state.scheduler = self._lr_scheduler.state_dict()
        try:
            self._checkpoints.save(self._state, tensors)
            self._status.checkpoint_saved()
        except StoreError as error:  # a full disk, for example: the checkpoint before it is still there
            self._status.note(f"no checkpoint at step {self._state.step}: {error}")

    # --- held-out rows -------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Evaluate on the held-out rows, and keep the weights if they are the best so far. Collective."""
        result = self._evaluation = self._held_out_rows.evaluate(self._status.progress)
        own, foreign = result.accuracy(self._held_out)
        step = self._state.step
        figures = {"own_accuracy": own, "foreign_accuracy": foreign, "response_loss": result.response_loss}
        self._state.evaluations.append({"step": step, **figures})
        self._status.figures(step, {f"eval/{name}": value for name, value in figures.items()})
        if self._config.early_stopping_patience and best_step(self._state.evaluations) == step:
            self._best = BestAdapter(step, optimizer_state.weights(self._engine))

    def _is_patience_exhausted(self) -> bool:
        patience = self._config.early_stopping_patience
        return patience is not None and patience_exhausted(self._state.evaluations, patience)

    # --- reports -------------------------------------------------------------------------------

    def _record(self, step: int, batch: list[int], loss: Loss) -> None:
        """Add a step to the state, and report it."""
        state = self._state
        state.step = step
        state.indicator_losses.append(loss.indicator)
        state.response_losses.append(loss.response)
        for index in batch:
            state.reads[index] += 1
            state.tokens += len(self._examples[index].prompt) + len(self._examples[index].target)
        self._evaluation = None
        total, tokens_per_s = loss.total(self._config.indicator_weight), state.tokens / state.seconds
        self._status.progress(Progress("fit", step, self._schedule.steps, total, tokens_per_s))
        figures = {
            "loss": total,
            "indicator_loss": loss.indicator,
            "response_loss": loss.response,
            "tokens_per_s": tokens_per_s,
            "learning_rate": self._engine.optimizer.param_groups[0]["lr"],
            "padding_share": self._batches.padding_share(),
            "kv_hit_rate": self._prefixes.hit_rate(),
            "memory_gb": peak_memory_gb(),
        }
        self._status.figures(step, {f"train/{name}": value for name, value in figures.items()})

    def _summary(self, stopped: bool, setup_seconds: float) -> FitSummary:
        state, config = self._state, self._config
        step_losses = [Loss(*pair) for pair in zip(state.indicator_losses, state.response_losses, strict=True)]
        losses = [round(loss.total(config.indicator_weight), 5) for loss in step_losses]
        return FitSummary(
            steps=state.step,
            examples=len(self._examples),
            tokens=state.tokens,
            seconds=round(state.seconds, 3),
            setup_seconds=round(setup_seconds, 3),
            tokens_per_s=round(state.tokens / state.seconds, 1),
            first_loss=losses[0],
            last_loss=losses[-1],
            losses=losses,
            indicator_losses=[round(loss.indicator, 5) for loss in step_losses],
            response_losses=[round(loss.response, 5) for loss in step_losses],
            evaluations=state.evaluations,
            fewest_reads=min(state.reads),
            most_reads=max(state.reads),
            resumed=state.resumed,
            stopped_early=stopped,
            kv_store_gb=config.kv_store_gb,
            kv_hit_rate=self._prefixes.hit_rate(),
            padding_share=self._batches.padding_share(),
            memory_gb=round(peak_memory_gb(), 2),
            workers=self._model.world_size,
            zero_stage=self._engine.zero_optimization_stage(),
            dtype=str(self._dtype).removeprefix("torch."),
        )

    def _save_result(self, fitted: Fitted) -> None:
        """Hand the adapter and what the fit did to the driver, as a checkpoint of Ray Train. Collective."""
        from ray import train

        self._status.progress(Progress("saving", 1, 1))
        weights = optimizer_state.weights(self._engine)
        metrics = {"loss": fitted.summary.last_loss, "step": fitted.summary.steps}
        if self._model.rank != 0:
            train.report(metrics)
            return
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            by_peft_name = {name.removeprefix("model."): value for name, value in weights.items()}
            save_adapter(by_peft_name, self._model.peft, self._model.activation, self._base, folder)
            fitted.write(folder)
            train.report(metrics, checkpoint=train.Checkpoint.from_directory(temporary))


def _find_base(base_config: BaseModelConfig, fingerprint: str, rank: int) -> BaseModel:
    """The base model on this node.

    Raises:
        FingerprintError: it is another one than the driver's.
    """
    base = find(base_config)
    if base.fingerprint != fingerprint:
        raise FingerprintError(
            f"worker {rank} found another base model under the name {base.name} ({base.fingerprint[:12]}) than the "
            f"driver ({fingerprint[:12]}); make them the same"
        )
    return base
