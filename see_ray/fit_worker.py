"""What one worker of a fit does; `fit` starts it, on any node, in a process of its own.

    read_prefixes:  the base model alone reads each prefix once; keys and values are kept
    step:           prefix KV + the tokens behind the activation point ─► loss ─► DeepSpeed

Gradients flow through the second line only. The loss of a step is normalized over the step's
examples on all workers, so an adapter does not depend on how many workers there were.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from see_ray.activation import Activation, p_accept
from see_ray.base_model import BaseModel, dtype_of, find, load_model
from see_ray.config import BaseModelConfig, FitConfig
from see_ray.errors import FingerprintError, FitError
from see_ray.fit_report import RESULT, FitSummary, Progress
from see_ray.prefix import Prefix, forward, logits_of, prefill
from see_ray.reconstruct import Example
from see_ray.schedule import Schedule

DECIDE_ROWS = 16
"""Held-out prompts that are decided in one forward pass."""


def fit_share(settings: dict[str, Any]) -> None:
    """Fit this worker's share; worker 0 reports progress and the adapter.

    Args:
        settings: what :func:`see_ray.fit.fit_expert` sends: examples, activation, configs.

    Raises:
        FingerprintError: this node has another base model than the driver.
        FitError: the settings do not fit the base model, or the loss is not finite.
    """
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported
    import deepspeed
    import ray
    from ray import train

    context = train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config = FitConfig.model_validate(settings["config"])
    base_config = BaseModelConfig.model_validate(settings["base_config"])
    activation: Activation = settings["activation"]
    examples: list[Example] = ray.get(settings["examples"])
    torch.set_num_threads(config.threads_per_worker or max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    torch.manual_seed(config.seed)

    base = find(base_config)
    if base.fingerprint != settings["fingerprint"]:
        raise FingerprintError(
            f"worker {rank} found another base model under the name {base.name} "
            f"({base.fingerprint[:12]}) than the driver ({settings['fingerprint'][:12]}); make them the same"
        )
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    model = _with_adapter(load_model(base, base_config, device), config)
    schedule = Schedule([len(activation.split(list(e.prompt))[0]) for e in examples], config, world)
    # DeepSpeed would compile a shared-memory reduction for CPU hosts; adapters' gradients are
    # small enough for gloo, and a fresh machine may have no compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, _, _, _ = deepspeed.initialize(
        model=_ExpertLoss(model, config.indicator_weight),
        model_parameters=[p for p in model.parameters() if p.requires_grad],
        config=deepspeed_config(config, dtype_of(base_config), world, schedule.steps),
    )
    board = settings["board"]
    report: Callable[[Progress], Any] = board.write.remote if rank == 0 else lambda progress: None
    share = _Share(examples, schedule, engine, model, rank, activation, config.kv_store_gb)
    started = time.perf_counter()
    share.read_prefixes(report)
    losses: list[float] = []
    tokens = 0
    for step in schedule:
        losses.append(share.step(step))
        tokens += sum(len(examples[n].prompt) + len(examples[n].target) for n in step)
        rate = tokens / (time.perf_counter() - started)
        report(Progress("fit", len(losses), schedule.steps, losses[-1], rate))
    seconds = time.perf_counter() - started
    decisions = share.decide(ray.get(settings["held_out"]), report)
    report(Progress("saving", 1, 1))
    summary = FitSummary(
        steps=len(losses),
        examples=len(examples),
        tokens=tokens,
        seconds=round(seconds, 3),
        tokens_per_s=round(tokens / seconds, 1),
        first_loss=losses[0],
        last_loss=losses[-1],
        losses=[round(loss, 5) for loss in losses],
        kv_hit_rate=share.hit_rate(),
        padding_share=share.padding_share(),
        workers=world,
        zero_stage=engine.zero_optimization_stage(),
        dtype=str(dtype_of(base_config)).removeprefix("torch."),
    )
    with tempfile.TemporaryDirectory() as temporary:
        _save(model, activation, base, Path(temporary), rank, engine.zero_optimization_stage())
        made = {"summary": asdict(summary), "decisions": decisions}
        (Path(temporary) / RESULT).write_text(json.dumps(made), encoding="utf-8")
        checkpoint = train.Checkpoint.from_directory(temporary) if rank == 0 else None
        train.report({"loss": losses[-1], "step": len(losses)}, checkpoint=checkpoint)


class _ExpertLoss(torch.nn.Module):
    """The module that DeepSpeed drives: from a share of a step to its part of the loss."""

    def __init__(self, model: Any, indicator_weight: float):
        super().__init__()
        self.model = model
        self._indicator_weight = indicator_weight

    def forward(
        self,
        prefix: Prefix,
        rest: list[list[int]],
        targets: list[tuple[int, ...]],
        per_indicator: float,
        per_token: float,
    ) -> Tensor:
        """Weighted sum of token losses.

        Args:
            prefix: keys and values before the activation point, a row each.
            rest: prompt tokens behind it.
            targets: supervised tokens of each row, the indicator first.
            per_indicator: weight of one indicator's loss.
            per_token: weight of one response token's loss.
        """
        inner = self.model.get_base_model()
        rows = [[*left, *target[:-1]] for left, target in zip(rest, targets, strict=True)]
        hidden, _ = forward(inner, prefix, rows)
        row = torch.tensor([i for i, target in enumerate(targets) for _ in target], device=hidden.device)
        column = torch.tensor(
            [len(left) - 1 + i for left, target in zip(rest, targets, strict=True) for i in range(len(target))],
            device=hidden.device,
        )
        labels = torch.tensor([token for target in targets for token in target], device=hidden.device)
        weights = torch.tensor(
            [per_token if i else self._indicator_weight * per_indicator for t in targets for i in range(len(t))],
            device=hidden.device,
        )
        logits = logits_of(inner, hidden[row, column])  # only where there is loss
        return (cross_entropy(logits.float(), labels, reduction="none") * weights).sum()


class _Share:
    """A worker's prefixes and its part of every step."""

    def __init__(
        self,
        examples: Sequence[Example],
        schedule: Schedule,
        engine: Any,
        model: Any,
        rank: int,
        activation: Activation,
        kv_store_gb: float,
    ):
        self._examples, self._schedule, self._activation, self._rank = examples, schedule, activation, rank
        self._engine, self._peft, self._inner = engine, model, model.get_base_model()
        # Under ZeRO 3 every forward pass is collective: all workers must run equally many.
        self._collective = engine.zero_optimization_stage() == 3 and schedule.world > 1
        budget = int(kv_store_gb * 1e9 / _bytes_per_token(self._inner))
        self._plans = [schedule.prefill_batches(rank, budget) for rank in range(schedule.world)]
        self._to_keep = {number for plan in self._plans for batch in plan for number in batch}
        self._kept: dict[int, Tensor] = {}
        self._hits = self._reads = self._real = self._padded = 0

    def read_prefixes(self, report: Callable[[Progress], Any]) -> None:
        """Read and keep the prefixes of this worker's examples, as many as its memory may hold."""
        plan = self._plans[self._rank] if self._activation.tokens is not None else []
        rounds = max(len(plan) for plan in self._plans) if self._collective else len(plan)
        for number in range(rounds):
            report(Progress("prefix", number, rounds))
            if number < len(plan):
                self._kept.update(self._prefill(plan[number]))
            else:
                self._prefill([self._schedule.stand_in(self._rank)])

    def step(self, step: Sequence[int]) -> float:
        """One optimizer step over all workers' examples; returns its loss."""
        world = self._schedule.world
        mine = self._schedule.share(step, self._rank)
        counts = bool(mine)
        mine = mine or [self._schedule.stand_in(self._rank)]
        examples = [self._examples[number] for number in mine]
        rest = [self._activation.split(list(example.prompt))[1] for example in examples]
        responses = sum(len(self._examples[number].target) - 1 for number in step)
        loss = self._engine(
            self._prefix_of(mine, step),
            rest,
            [example.target for example in examples],
            # Means over the whole step; DeepSpeed averages over workers, hence the factor.
            per_indicator=counts * world / len(step),
            per_token=counts * world / max(1, responses),
        )
        if not torch.isfinite(loss):
            raise FitError(
                f"the loss became {float(loss)} at step {self._engine.global_steps + 1} on worker {self._rank}; "
                "lower fit.learning_rate, or look at the rows of this step"
            )
        self._engine.backward(loss)
        self._engine.step()
        lengths = [len(left) + len(example.target) - 1 for left, example in zip(rest, examples, strict=True)]
        self._real += sum(lengths)
        self._padded += max(lengths) * len(lengths)
        total = loss.detach().float() / world
        if world > 1:
            torch.distributed.all_reduce(total)
        return float(total)

    @torch.no_grad()
    def decide(self, prompts: Sequence[list[int]], report: Callable[[Progress], Any]) -> list[float]:
        """P(accept) of the adapter for held-out prompts; every worker reads all, which keeps
        collective operations in step."""
        self._peft.eval()
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        found = [0.0] * len(prompts)
        for start in range(0, len(order), DECIDE_ROWS):
            report(Progress("held-out", start, len(order)))
            batch = order[start : start + DECIDE_ROWS]
            splits = [self._activation.split(prompts[number]) for number in batch]
            prefix = Prefix((), (0,) * len(batch))
            if self._activation.tokens is not None:
                with self._peft.disable_adapter():
                    prefix = prefill(self._inner, [left for left, _ in splits])
            hidden, _ = forward(self._inner, prefix, [right for _, right in splits])
            last = [len(right) - 1 for _, right in splits]
            logits = logits_of(self._inner, hidden[range(len(batch)), last]).float()
            for number, row in zip(batch, logits.tolist(), strict=True):
                found[number] = p_accept(row[self._activation.accept], row[self._activation.refuse])
        return found

    def hit_rate(self) -> float:
        """Share of prefixes that a step found kept instead of reading them again."""
        return round(self._hits / self._reads, 4) if self._reads else 0.0

    def padding_share(self) -> float:
        """Share of padding among the tokens of all steps' forward passes."""
        return round(1 - self._real / self._padded, 4) if self._padded else 0.0

    def _prefix_of(self, numbers: list[int], step: Sequence[int]) -> Prefix:
        if self._activation.tokens is None:
            return Prefix((), (0,) * len(numbers))
        missing = [number for number in numbers if number not in self._kept]
        self._reads += len(numbers)
        self._hits += len(numbers) - len(missing)
        found = self._kept
        if missing or (self._collective and self._anyone_misses(step)):
            found = {**self._kept, **self._prefill(missing or numbers[:1])}
        return _unpack([found[number] for number in numbers], self._inner.device)

    def _anyone_misses(self, step: Sequence[int]) -> bool:
        workers = range(self._schedule.world)
        read = [n for rank in workers for n in self._schedule.share(step, rank) or [self._schedule.stand_in(rank)]]
        return any(number not in self._to_keep for number in read)

    def _prefill(self, numbers: list[int]) -> dict[int, Tensor]:
        rows = [self._activation.split(list(self._examples[number].prompt))[0] for number in numbers]
        with self._peft.disable_adapter():
            prefix = prefill(self._inner, rows)
        return {number: _pack(prefix, row) for row, number in enumerate(numbers)}


def _pack(prefix: Prefix, row: int) -> Tensor:
    """One row's keys and values in host memory: [2 x layers, heads, tokens, head size]."""
    length = prefix.lengths[row]
    return torch.stack([kv[row, :, :length] for layer in prefix.layers for kv in layer]).cpu()


def _unpack(rows: list[Tensor], device: Any) -> Prefix:
    """Packed rows as one padded batch on the device."""
    lengths = tuple(row.shape[2] for row in rows)
    both = rows[0].new_zeros(rows[0].shape[0], len(rows), rows[0].shape[1], max(lengths), rows[0].shape[3])
    for index, row in enumerate(rows):
        both[:, index, :, : row.shape[2]] = row
    both = both.to(device)
    return Prefix(tuple((both[i], both[i + 1]) for i in range(0, both.shape[0], 2)), lengths)


def _bytes_per_token(model: Any) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)


# --- model, settings, result -----------------------------------------------------------------


def _with_adapter(model: Any, config: FitConfig) -> Any:
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
    import torch

    warmup = max(1, math.ceil(config.warmup_ratio * steps))
    settings: dict[str, Any] = {
        # Only for DeepSpeed's own bookkeeping: shares are made by Schedule, and need not be even.
        "train_micro_batch_size_per_gpu": max(1, math.ceil(config.train_batch_size / world)),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
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


def _save(model: Any, activation: Activation, base: BaseModel, folder: Path, rank: int, zero_stage: int) -> None:
    """Write the adapter as a PEFT folder; collective under ZeRO 3, where weights are sharded."""
    import deepspeed
    from peft import get_peft_model_state_dict

    weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    with deepspeed.zero.GatheredParameters(list(weights.values()), enabled=zero_stage == 3):
        if rank != 0:
            return
        state = {name: value.detach().float().cpu().clone() for name, value in weights.items()}
    settings = model.peft_config["default"]
    settings.base_model_name_or_path = base.name
    settings.alora_invocation_tokens = activation.peft_invocation()
    settings.inference_mode = True
    settings.save_pretrained(folder)
    from safetensors.torch import save_file

    save_file(get_peft_model_state_dict(model, state_dict=state), folder / "adapter_model.safetensors")
