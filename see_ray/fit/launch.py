"""Fit one expert: Ray Train starts the workers, DeepSpeed takes the steps.

    examples ──► [worker 0 .. n-1: prefix KV once, then steps over the rest] ──► PEFT folder

In the activated form the prefix of every prompt is read by the base model alone, so its keys
and values never change: they are computed once, without gradient, and kept across epochs;
forward and backward run over the few tokens behind the activation point. The full form is the
same code with an empty prefix.

The result does not depend on the number of workers: a step's examples are fixed by the seed,
each worker takes an even share of them, and the loss is normalized over the whole step. Only
the order of floating-point sums differs.

A fit has a name that follows from its data and settings, and checkpoints under that name: whatever was
killed, a worker, a node or this process, the same call again goes on from the last one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from see_ray.cluster import with_gpu
from see_ray.config import BaseModelConfig, FitConfig
from see_ray.data.reconstruct import Example
from see_ray.errors import FitError, SeeError
from see_ray.fit.checkpoint import Checkpoints
from see_ray.fit.report import RESULT, Comparison, FitSummary, Progress
from see_ray.models.activation import Activation
from see_ray.models.base_model import BaseModel
from see_ray.models.cache import cache_dir

CHANGES_NOTHING = frozenset({
    "num_workers", "placement_strategy", "accelerator_type", "resources_per_worker", "use_gpu", "cpus_per_worker",
    "threads_per_worker", "zero_stage", "kv_store_gb", "max_tokens_per_micro_batch", "checkpoint_every_s",
    "checkpoint_every_steps", "max_failures", "tracking_dir", "storage_path",
})  # fmt: skip
"""Settings that may differ between a fit's first start and a later one that goes on from its checkpoint."""


@dataclass(frozen=True)
class Fitted:
    """What a fit gives besides the adapter: its summary, P(accept) of each held-out row, and how it compares
    with the base model on those that are the task's own."""

    summary: FitSummary
    decisions: list[float]
    comparison: Comparison | None = None


class Listener:
    """Is told how a fit goes; this one ignores it."""

    def progress(self, progress: Progress) -> None:
        """Where it stands."""

    def note(self, text: str) -> None:
        """Something a person should know."""

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """What was measured after a step."""


def fit_expert(
    examples: Sequence[Example],
    base: BaseModel,
    activation: Activation,
    base_config: BaseModelConfig,
    config: FitConfig,
    folder: Path,
    *,
    name: str,
    held_out: Sequence[Example] = (),
    listener: Listener | None = None,
) -> Fitted:
    """Fit an adapter on `examples` and write it to `folder` as a PEFT folder.

    Needs a connection to Ray. `folder` gets `adapter_config.json`, `adapter_model.safetensors` and `fit.json`.
    The fitted adapter then decides on the `held_out` rows while it is still loaded. A fit of the same name,
    data and settings that was killed goes on from its last checkpoint.

    Raises:
        FitError: the workers could not start, died too often, or a step failed; says where the log is.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    gpu = with_gpu(config)
    board = ray.remote(FitStatusActor).options(num_cpus=0).remote(config.max_failures)
    storage = config.storage_path or str(cache_dir(base_config) / "runs")
    fit = f"{name}-{_digest(examples, held_out, base, activation, config)[:12]}"
    run = f"{fit}-{uuid.uuid4().hex[:8]}"  # Ray Train would take an old run of this name for its own
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "examples": ray.put(list(examples)),
            "held_out": ray.put(list(held_out)),
            "fingerprint": base.fingerprint,
            "activation": activation,
            "base_config": base_config.model_dump(mode="json"),
            "config": config.model_dump(mode="json"),
            "board": board,
            "storage": storage,
            "fit": f"checkpoints/{fit}",
        },
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, "GPU": int(gpu), **config.resources_per_worker},
            placement_strategy=config.placement_strategy,
            accelerator_type=config.accelerator_type,
        ),
        run_config=RunConfig(
            name=run,
            storage_path=storage,
            # How often is the board's to say: failures count only as long as there is no new checkpoint.
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    workers = config.num_workers if isinstance(config.num_workers, int) else config.num_workers[0]
    wanted = f"{workers} x {config.cpus_per_worker:g} CPU{' and 1 GPU' if gpu else ''}"
    with _watched(board, wanted, listener or Listener()):
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise _as_fit_error(error, ray.get(board.failure.remote()), Path(storage) / run) from error
    if failure := ray.get(board.failure.remote()):
        raise failure
    if result.checkpoint is None:
        raise FitError(f"the fit {run} ended without an adapter; see the worker logs in {storage}/{run}")
    result.checkpoint.to_directory(folder)
    made = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    (folder / RESULT).unlink()
    summary = FitSummary(**made["summary"])
    (folder / "fit.json").write_text(json.dumps(made["summary"], indent=2), encoding="utf-8")
    # It is done: what it needed on the way is of no use any more.
    Checkpoints(storage, f"checkpoints/{fit}").clear()
    result.filesystem.delete_dir(result.path)
    comparison = Comparison(**made["comparison"]) if made["comparison"] else None
    return Fitted(summary, made["decisions"], comparison)


def _digest(
    examples: Sequence[Example], held_out: Sequence[Example], base: BaseModel, activation: Activation, config: FitConfig
) -> str:
    """Names a fit: the same for the same data, base model and settings that change the result."""
    settings = config.model_dump(mode="json", exclude=set(CHANGES_NOTHING))
    rows = [[(example.prompt, example.target) for example in part] for part in (examples, held_out)]
    whole = json.dumps([rows, base.fingerprint, asdict(activation), settings], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


class FitStatusActor:
    """A Ray actor between workers and driver: where the fit stands, what was measured, why it failed.

    Args:
        max_failures: starts in a row without a new checkpoint in between, beyond the first.
    """

    def __init__(self, max_failures: int) -> None:
        self._progress = Progress("starting", 0, 1)
        self._notes: list[str] = []
        self._figures: list[tuple[int, dict[str, float]]] = []
        self._failure: SeeError | None = None
        self._max_failures = max_failures
        self._starts = 0

    def begin(self) -> None:
        """The workers start, for the first time or again."""
        self._progress = Progress("starting", 0, 1)
        if self._starts > self._max_failures and self._failure is None:
            self._failure = FitError(
                f"workers died {self._starts} times in a row without a new checkpoint (fit.max_failures is "
                f"{self._max_failures}); if they ran out of memory, lower "
                "fit.max_tokens_per_micro_batch or fit.kv_store_gb; "
                "else see the workers' logs, and start the fit again: it goes on from its last checkpoint"
            )
        if self._starts:
            self._notes.append("workers died; starting them again")
        self._starts += 1

    def saved(self, step: int) -> None:
        """There is a new checkpoint."""
        self._starts = 1

    def write(self, progress: Progress) -> None:
        self._progress = progress

    def tell(self, note: str) -> None:
        self._notes.append(note)

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._figures.append((step, figures))

    def fail(self, error: SeeError) -> None:
        self._failure = self._failure or error

    def take(self) -> tuple[Progress, list[str], list[tuple[int, dict[str, float]]]]:
        """Progress, and the notes and figures that were not taken before."""
        taken = self._progress, self._notes, self._figures
        self._notes, self._figures = [], []
        return taken

    def failure(self) -> SeeError | None:
        return self._failure


@contextlib.contextmanager
def _watched(board: Any, wanted: str, listener: Listener) -> Iterator[None]:
    """Hand on what is on the board while the block runs, since `trainer.fit()` itself blocks."""
    import ray

    stop = threading.Event()

    def take() -> None:
        # A board that does not answer is no reason to stop: the fit's own result says what is wrong.
        with contextlib.suppress(ray.exceptions.RayError):
            progress, notes, figures = ray.get(board.take.remote(), timeout=5)
            for note in notes:
                listener.note(note)
            for step, measured in figures:
                listener.figures(step, measured)
            if progress.phase == "starting":
                free = ray.available_resources()
                free_now = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU") if kind in free)
                progress = replace(progress, waiting=f"for {wanted}, {free_now or 'nothing'} unreserved")
            listener.progress(progress)

    def watch() -> None:
        while not stop.wait(0.5):
            take()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        take()  # the last figures


def _as_fit_error(error: Exception, reported: SeeError | None, run: Path) -> SeeError:
    if reported is not None:
        return reported
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else type(error).__name__)
    return FitError(f"the fit stopped: {reason[:400]}; the workers' logs are named in {run}")


def _work(settings: dict[str, Any]) -> None:
    """One worker's whole run; Ray Train calls it in each worker process, and again after one of them died."""
    import ray
    from ray import train

    board = settings["board"]
    if train.get_context().get_world_rank() == 0:
        ray.get(board.begin.remote())
    train.report({})  # a barrier, so that all see the same failure or none
    if ray.get(board.failure.remote()):
        return  # Ray Train started once more what cannot succeed: end without a result

    from see_ray.fit.trainer import fit_share

    try:
        fit_share(settings)
    except SeeError as error:
        ray.get(board.fail.remote(error))
        raise
    except Exception as error:
        if train.get_context().get_world_size() == 1 or not _lost_a_peer(error):
            lines = str(error).splitlines() or [""]
            ray.get(board.fail.remote(FitError(f"the fit stopped: {type(error).__name__}: {lines[0][:400]}")))
        raise


def _lost_a_peer(error: Exception) -> bool:
    """Whether a collective operation broke off, as it does when another worker dies."""
    from torch.distributed import DistError

    words = ("gloo", "connection", "peer", "nccl", "socket", "broken pipe")
    return isinstance(error, DistError) or any(word in str(error).lower() for word in words)
