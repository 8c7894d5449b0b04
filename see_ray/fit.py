"""Fit one expert: Ray Train starts the workers, DeepSpeed takes the steps.

    examples ──► [worker 0 .. n-1: prefix KV once, then steps over the rest] ──► PEFT folder

In the activated form the prefix of every prompt is read by the base model alone, so its keys
and values never change: they are computed once, without gradient, and kept across epochs;
forward and backward run over the few tokens behind the activation point. The full form is the
same code with an empty prefix.

The result does not depend on the number of workers: a step's examples are fixed by the seed,
each worker takes an even share of them, and the loss is normalized over the whole step. Only
the order of floating-point sums differs.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from see_ray.activation import Activation
from see_ray.base_model import BaseModel, cache_dir
from see_ray.config import BaseModelConfig, FitConfig
from see_ray.errors import FitError, SeeError
from see_ray.fit_report import RESULT, FitSummary, Progress
from see_ray.reconstruct import Example


@dataclass(frozen=True)
class Fitted:
    """What a fit gives besides the adapter: its summary, and P(accept) of each held-out prompt."""

    summary: FitSummary
    decisions: list[float]


def fit_expert(
    examples: Sequence[Example],
    base: BaseModel,
    activation: Activation,
    base_config: BaseModelConfig,
    config: FitConfig,
    folder: Path,
    *,
    run_name: str,
    held_out: Sequence[Sequence[int]] = (),
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Fitted:
    """Fit an adapter on `examples` and write it to `folder` as a PEFT folder.

    Needs a connection to Ray. `folder` gets `adapter_config.json`,
    `adapter_model.safetensors` and `fit.json`. The fitted adapter then decides on the `held_out`
    prompts (token ids) while it is still loaded.

    Raises:
        FitError: the workers could not start, or a step failed; says where the log is.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    gpu = bool(ray.cluster_resources().get("GPU")) if config.use_gpu == "auto" else config.use_gpu
    board = ray.remote(_Board).options(num_cpus=0).remote()
    storage = config.storage_path or str(cache_dir(base_config) / "runs")
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "examples": ray.put(list(examples)),
            "fingerprint": base.fingerprint,
            "held_out": ray.put([list(prompt) for prompt in held_out]),
            "activation": activation,
            "base_config": base_config.model_dump(mode="json"),
            "config": config.model_dump(mode="json"),
            "board": board,
        },
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=gpu, resources_per_worker={"CPU": config.cpus_per_worker}
        ),
        run_config=RunConfig(
            name=run_name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=0),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    wanted = f"{config.num_workers} x {config.cpus_per_worker:g} CPU{' and 1 GPU' if gpu else ''}"
    with _watched(board, wanted, on_progress):
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise _as_fit_error(error, ray.get(board.failure.remote()), Path(storage) / run_name) from error
    if result.checkpoint is None:
        raise FitError(f"the fit {run_name} ended without an adapter; see the worker logs in {storage}/{run_name}")
    result.checkpoint.to_directory(folder)
    made = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    (folder / RESULT).unlink()
    summary = FitSummary(**made["summary"])
    (folder / "fit.json").write_text(json.dumps(made["summary"], indent=2), encoding="utf-8")
    return Fitted(summary, made["decisions"])


class _Board:
    """A Ray actor on which worker 0 writes where it stands and any worker writes why it failed."""

    def __init__(self) -> None:
        self._progress = Progress("starting", 0, 1)
        self._failure: SeeError | None = None

    def write(self, progress: Progress) -> None:
        self._progress = progress

    def fail(self, error: SeeError) -> None:
        self._failure = self._failure or error

    def read(self) -> Progress:
        return self._progress

    def failure(self) -> SeeError | None:
        return self._failure


@contextlib.contextmanager
def _watched(board: Any, wanted: str, on_progress: Callable[[Progress], None]) -> Iterator[None]:
    """Read the board while the block runs, since `trainer.fit()` itself blocks."""
    import ray

    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            # A board that does not answer is no reason to stop: the fit's own result says what is wrong.
            with contextlib.suppress(ray.exceptions.RayError):
                progress = ray.get(board.read.remote(), timeout=5)
                if progress.phase == "starting":
                    free = ray.available_resources()
                    free_now = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU") if kind in free)
                    progress = replace(progress, waiting=f"for {wanted}, {free_now or 'nothing'} unreserved")
                on_progress(progress)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _as_fit_error(error: Exception, reported: SeeError | None, run: Path) -> SeeError:
    if reported is not None:
        return reported
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else type(error).__name__)
    return FitError(f"the fit stopped: {reason[:400]}; the workers' logs are named in {run}")


def _work(settings: dict[str, Any]) -> None:
    """One worker's whole run; Ray Train calls it in each worker process."""
    import ray

    from see_ray.fit_worker import fit_share

    try:
        fit_share(settings)
    except SeeError as error:
        ray.get(settings["board"].fail.remote(error))
        raise
