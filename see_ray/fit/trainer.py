"""What one worker of a fit does; `fit` starts it, on any node, in a process of its own.

    base model + adapter ─► DeepSpeed ─► [last checkpoint] ─► prefixes ─► steps ─► PEFT folder

The arithmetic is `fit_step`'s. Here is the run around it: going on from a checkpoint, writing them, looking at
held-out rows, stopping early, and saying what went wrong.
"""

from __future__ import annotations

import json
import math
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from see_ray.config import BaseModelConfig, FitConfig
from see_ray.cpus import available_cpus
from see_ray.data.reconstruct import Example
from see_ray.errors import FingerprintError, FitError, StoreError
from see_ray.fit import optimizer_state
from see_ray.fit.checkpoint import Checkpoints, TrainState
from see_ray.fit.rank_batches import EvalResult, ExpertLoss, RankBatches
from see_ray.fit.report import RESULT, FitSummary, Progress
from see_ray.fit.schedule import Schedule
from see_ray.models.activation import Activation
from see_ray.models.base_model import BaseModel, dtype_of, find, load_model

LEAST_GAIN = 0.001
"""RankBatches by which a response loss must fall to count as an improvement."""


def fit_share(settings: dict[str, Any]) -> None:
    """Fit this worker's share; worker 0 reports progress and the adapter.

    Args:
        settings: what :func:`see_ray.fit.launch.fit_expert` sends: examples, activation, configs.

    Raises:
        FingerprintError: this node has another base model than the driver.
        FitError: the settings do not fit the base model, the loss is not finite, or memory ran out.
    """
    config = FitConfig.model_validate(settings["config"])
    try:
        _Run(settings, config).run()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error).lower():
            raise
        raise FitError(_out_of_memory(error, settings, config)) from error


class _Run:
    """One worker's run, from the base model to the adapter."""

    def __init__(self, settings: dict[str, Any], config: FitConfig):
        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
        import deepspeed
        import ray
        from ray import train

        context = train.get_context()
        self._began = time.perf_counter()
        self._config = config
        self._base_config = BaseModelConfig.model_validate(settings["base_config"])
        self._activation: Activation = settings["activation"]
        self._examples: list[Example] = ray.get(settings["examples"])
        self._held_out: list[Example] = ray.get(settings["held_out"])
        self._board = settings["board"]
        self._rank, self._world = context.get_world_rank(), context.get_world_size()
        local = context.get_local_world_size()
        torch.set_num_threads(config.threads_per_worker or max(1, available_cpus() // local))
        torch.manual_seed(config.seed)

        self._base = find(self._base_config)
        if self._base.fingerprint != settings["fingerprint"]:
            raise FingerprintError(
                f"worker {self._rank} found another base model under the name {self._base.name} "
                f"({self._base.fingerprint[:12]}) than the driver ({settings['fingerprint'][:12]}); make them the same"
            )
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
        dtype = dtype_of(self._base_config)
        model = with_adapter(load_model(self._base, self._base_config, device), config)
        prefixes = [len(self._activation.split(list(example.prompt))[0]) for example in self._examples]
        self._schedule = Schedule(prefixes, config, self._world)
        # DeepSpeed would compile a shared-memory reduction for CPU hosts; adapters' gradients are
        # small enough for gloo, and a fresh machine may have no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._engine, _, _, self._scheduler = deepspeed.initialize(
            model=ExpertLoss(model, self._activation, config),
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            config=deepspeed_config(config, dtype, self._world, self._schedule.steps),
        )
        self._share = RankBatches(
            self._examples, self._held_out, self._schedule, self._engine, self._rank, self._activation, config
        )
        self._checkpoints = Checkpoints(settings["storage"], settings["fit"])
        self._position = TrainState(reads=[0] * len(self._examples))
        self._best: tuple[int, dict[str, Tensor]] | None = None
        self._newest_look: EvalResult | None = None  # at the adapter as it stands
        self._own = [example.target[0] == self._activation.accept for example in self._held_out]

    def run(self) -> None:
        """All steps from where the last checkpoint stands, then the result."""
        setup = time.perf_counter() - self._began
        started = time.perf_counter()
        self._share.read_prefixes(self._report)
        self._resume()
        before = self._position.seconds
        saved_at = time.perf_counter()
        stopped = self._had_enough()
        for number, step in enumerate(self._schedule, 1):
            if number <= self._position.step or stopped:
                continue
            due = time.perf_counter() - saved_at >= self._config.checkpoint_every_s
            loss, due = self._share.step(step, raised=self._rank == 0 and due)
            position = self._position
            position.step = number
            position.indicator_losses.append(loss.indicator)
            position.response_losses.append(loss.response)
            position.seconds = before + time.perf_counter() - started
            for row in step:
                position.reads[row] += 1
                position.tokens += len(self._examples[row].prompt) + len(self._examples[row].target)
            self._report_step(number)
            self._newest_look = None
            if number % (self._config.eval_every_steps or self._schedule.steps_per_epoch) == 0:
                self._look()
                stopped = self._had_enough()
            every = self._config.checkpoint_every_steps
            if number < self._schedule.steps and (due or (every and number % every == 0)):
                self._save_checkpoint()
                saved_at = time.perf_counter()
        self._position.seconds = before + time.perf_counter() - started
        if stopped and self._best is not None:
            optimizer_state.set_weights(self._engine, self._best[1])
            self._newest_look = None
        look = self._newest_look or self._share.look(self._report)
        self._finish(look, stopped, setup)

    # --- going on ----------------------------------------------------------------------------

    def _resume(self) -> None:
        found: list[Any] = [self._checkpoints.load(self._tell) if self._rank == 0 else None]
        if self._world > 1:  # all from the same one
            torch.distributed.broadcast_object_list(found, src=0)
        if found[0] is None:
            return
        position, tensors = found[0]
        # Optimizers make their state in the first step; this one is overwritten.
        self._share.step(next(iter(self._schedule)))
        optimizer_state.restore(self._engine, tensors)
        self._scheduler.load_state_dict(position.scheduler)
        for group, rate in zip(self._engine.optimizer.param_groups, self._scheduler.get_lr(), strict=True):
            group["lr"] = rate
        self._engine.global_steps = position.step
        if "best" in tensors:
            self._best = (int(tensors["best"]), _named(tensors, "best."))
        self._position = position
        position.resumed += 1
        self._tell(f"going on from the checkpoint of step {position.step} of {self._schedule.steps}")

    def _save_checkpoint(self) -> None:
        tensors = optimizer_state.gather(self._engine)
        if self._best is not None:
            tensors["best"] = torch.tensor(self._best[0])
            tensors |= {f"best.{name}": value for name, value in self._best[1].items()}
        if self._rank != 0:
            return
        self._position.scheduler = self._scheduler.state_dict()
        try:
            self._checkpoints.save(self._position, tensors)
            self._board.saved.remote(self._position.step)
        except StoreError as error:  # a full disk, say: the one before is still there
            self._tell(f"no checkpoint at step {self._position.step}: {error}")

    # --- held-out rows -------------------------------------------------------------------------

    def _look(self) -> None:
        look = self._newest_look = self._share.look(self._report)
        own, foreign = look.accuracy(self._own)
        step = self._position.step
        figures = {"step": step, "own_accuracy": own, "foreign_accuracy": foreign, "response_loss": look.response_loss}
        self._position.evaluations.append(figures)
        self._log(step, {f"eval/{name}": value for name, value in figures.items() if name != "step"})
        if self._config.early_stopping_patience and best_step(self._position.evaluations) == step:
            self._best = (step, optimizer_state.weights(self._engine))

    def _had_enough(self) -> bool:
        patience = self._config.early_stopping_patience
        return patience is not None and had_enough(self._position.evaluations, patience)

    # --- telling -------------------------------------------------------------------------------

    def _report(self, progress: Progress) -> None:
        if self._rank == 0:
            self._board.write.remote(progress)

    def _tell(self, note: str) -> None:
        if self._rank == 0:
            self._board.tell.remote(note)

    def _log(self, step: int, figures: dict[str, float]) -> None:
        if self._rank == 0:
            self._board.log.remote(step, figures)

    def _report_step(self, number: int) -> None:
        position = self._position
        indicator, response = position.indicator_losses[-1], position.response_losses[-1]
        rate = position.tokens / position.seconds
        self._report(Progress("fit", number, self._schedule.steps, self._total(-1), rate))
        figures = {"loss": self._total(-1), "indicator_loss": indicator, "response_loss": response}
        figures |= {"tokens_per_s": rate, "learning_rate": self._engine.optimizer.param_groups[0]["lr"]}
        figures |= {"padding_share": self._share.padding_share(), "kv_hit_rate": self._share.hit_rate()}
        figures["memory_gb"] = _memory_gb()
        self._log(number, {f"train/{name}": value for name, value in figures.items()})

    def _total(self, index: int) -> float:
        position = self._position
        return self._config.indicator_weight * position.indicator_losses[index] + position.response_losses[index]

    def _finish(self, look: EvalResult, stopped: bool, setup: float) -> None:
        from ray import train

        comparison = self._share.compare()
        self._report(Progress("saving", 1, 1))
        position = self._position
        losses = [round(self._total(index), 5) for index in range(position.step)]
        summary = FitSummary(
            steps=position.step,
            examples=len(self._examples),
            tokens=position.tokens,
            seconds=round(position.seconds, 3),
            setup_seconds=round(setup, 3),
            tokens_per_s=round(position.tokens / position.seconds, 1),
            first_loss=losses[0],
            last_loss=losses[-1],
            losses=losses,
            indicator_losses=[round(loss, 5) for loss in position.indicator_losses],
            response_losses=[round(loss, 5) for loss in position.response_losses],
            evaluations=position.evaluations,
            fewest_reads=min(position.reads),
            most_reads=max(position.reads),
            resumed=position.resumed,
            stopped_early=stopped,
            kv_store_gb=self._config.kv_store_gb,
            kv_hit_rate=self._share.hit_rate(),
            padding_share=self._share.padding_share(),
            memory_gb=round(_memory_gb(), 2),
            workers=self._world,
            zero_stage=self._engine.zero_optimization_stage(),
            dtype=str(dtype_of(self._base_config)).removeprefix("torch."),
        )
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            _save(self._engine, self._activation, self._base, folder, self._rank)
            compared = asdict(comparison) if comparison else None
            made = {"summary": asdict(summary), "decisions": look.decisions, "comparison": compared}
            (folder / RESULT).write_text(json.dumps(made), encoding="utf-8")
            checkpoint = train.Checkpoint.from_directory(temporary) if self._rank == 0 else None
            train.report({"loss": losses[-1], "step": position.step}, checkpoint=checkpoint)


def best_step(evaluations: list[dict[str, float]]) -> int:
    """The step of the best look at held-out rows: the most decisions right, then the lowest response loss."""
    best = max(evaluations, key=lambda look: (_right(look), -look["response_loss"]))
    return int(best["step"])


def had_enough(evaluations: list[dict[str, float]], patience: int) -> bool:
    """Whether the last `patience` looks improved neither decision accuracy nor response loss (by 0.1 %)."""
    newest, accuracy, loss = 0, -1.0, math.inf
    for number, look in enumerate(evaluations):
        if _right(look) > accuracy or look["response_loss"] < (1 - LEAST_GAIN) * loss:
            newest = number
        accuracy, loss = max(accuracy, _right(look)), min(loss, look["response_loss"])
    return len(evaluations) - 1 - newest >= patience


def _right(look: dict[str, float]) -> float:
    return look["own_accuracy"] + look["foreign_accuracy"]


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _memory_gb() -> float:
    """The most memory this worker has used so far: on the GPU where it has one, else in the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _out_of_memory(error: BaseException, settings: dict[str, Any], config: FitConfig) -> str:
    """What ran out, an estimate of what is needed, and which settings change it."""
    import ray
    from safetensors import safe_open
    from transformers import AutoConfig

    base_config = BaseModelConfig.model_validate(settings["base_config"])
    base = find(base_config)
    shape = AutoConfig.from_pretrained(base.folder).get_text_config()
    size = dtype_of(base_config).itemsize
    activation: Activation = settings["activation"]
    examples: Sequence[Example] = ray.get(settings["examples"])
    rests = [len(activation.split(list(e.prompt))[1]) + len(e.target) - 1 for e in examples]
    tokens = max(max(rests), min(config.max_tokens_per_micro_batch, sum(sorted(rests)[-config.train_batch_size :])))
    inner = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    per_token = shape.num_hidden_layers * (16 * shape.hidden_size + 4 * inner) * size + 12 * shape.vocab_size
    weights = size * sum(
        math.prod(file.get_slice(name).get_shape())
        for path in base.folder.glob("*.safetensors")
        for file in [safe_open(path, "pt")]
        for name in file.keys()  # noqa: SIM118, not a mapping
    )
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return (
        f"out of memory: {reason}. One worker needs about {weights / 1e9:.1f} GB for the base model, up to "
        f"{config.kv_store_gb:g} GB for kept prefixes, and about {tokens * per_token / 1e9:.1f} GB for one pass of "
        f"{tokens} tokens; lower fit.max_tokens_per_micro_batch (now {config.max_tokens_per_micro_batch}), "
        f"fit.kv_store_gb (now {config.kv_store_gb:g}) or fit.max_length, or set fit.kv_store_dtype=bfloat16"
        + ("" if config.zero_stage == 3 else ", or shard the base model over workers with fit.zero_stage=3")
    )


# --- model, settings, result -----------------------------------------------------------------


def with_adapter(model: Any, config: FitConfig) -> Any:
    """A base model with a new LoRA adapter of PEFT around it.

    Raises:
        FitError: the target modules do not fit the model.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
    )
    try:
        # Adapters in the base model's type: a cast per layer costs more than it gives, and
        # DeepSpeed keeps float32 masters for the optimizer where the type is shorter.
        return get_peft_model(model, lora, autocast_adapter_dtype=False)
    except ValueError as error:
        raise FitError(f"fit.target_modules {targets!r} does not fit this base model: {error}") from error


def deepspeed_config(config: FitConfig, dtype: torch.dtype, world: int, steps: int) -> dict[str, Any]:
    """The DeepSpeed JSON of a fit; `fit.deepspeed` is merged over it."""
    warmup = max(1, math.ceil(config.warmup_ratio * steps))
    settings: dict[str, Any] = {
        # Only for DeepSpeed's own bookkeeping: shares are made by Schedule, and need not be even.
        "train_micro_batch_size_per_gpu": max(1, math.ceil(config.train_batch_size / world)),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        # DeepSpeed keeps no float32 copies at stage 0.
        "zero_optimization": {"stage": max(config.zero_stage, int(dtype != torch.float32))},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.learning_rate,
                "weight_decay": config.weight_decay,
                "torch_adam": True,  # PyTorch's own, which needs no compiler
            },
        },
        "scheduler": {
            "type": "WarmupCosineLR",
            "params": {"total_num_steps": max(steps, warmup + 1), "warmup_num_steps": warmup, "warmup_type": "linear"},
        },
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "steps_per_print": 1 << 30,
    }
    return _merged(settings, config.deepspeed)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result


def _save(engine: Any, activation: Activation, base: BaseModel, folder: Path, rank: int) -> None:
    """Write the adapter of a DeepSpeed engine. Collective."""
    state = {name.removeprefix("model."): value for name, value in optimizer_state.weights(engine).items()}
    if rank == 0:
        save_adapter(state, engine.module.model, activation, base, folder)


def save_adapter(state: dict[str, Tensor], model: Any, activation: Activation, base: BaseModel, folder: Path) -> None:
    """Write an adapter as a PEFT folder, in float32.

    Args:
        state: its weights by parameter name.
        model: the PEFT model that it belongs to.
        activation: where it applies; told to PEFT where PEFT can express it.
        base: names the base model.
        folder: where to.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    settings = model.peft_config["default"]
    settings.base_model_name_or_path = base.name
    settings.alora_invocation_tokens = activation.peft_invocation()
    settings.inference_mode = True
    settings.save_pretrained(folder)
    # Not "auto": PEFT would ask the hub whether the base model's vocabulary was changed.
    weights = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    save_file(weights, folder / "adapter_model.safetensors")
