"""Fit one expert on a Ray cluster: Ray Train starts the workers, DeepSpeed takes the steps.

    examples ──► [rank 0 .. n-1: read each prefix once, then steps over the suffixes] ──► PEFT folder

In the activated form the base model alone reads the prefix of every prompt, so its keys and values never change:
they are computed once, without gradient, and kept across epochs; forward and backward run over the few tokens
after the activation point. The full form is the same code with an empty prefix.

The result does not depend on the number of workers: a batch's examples are fixed by the seed, each rank takes an
even part of them, and the loss is normalized over the whole batch. Only the order of floating-point sums differs.

The name of a fit is a digest of its data and settings, and its checkpoints are stored under that name. After a worker,
a node or this process was killed, the same call resumes from the last checkpoint.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

from see_ray.cluster import with_gpu
from see_ray.errors import FitError, SeeError
from see_ray.fit.checkpoint import Checkpoints
from see_ray.fit.report import RESULT_FILE, Fitted
from see_ray.fit.spec import FitSpec
from see_ray.fit.status import FitListener, FitStatusActor, status_forwarded
from see_ray.models.cache import cache_dir


def fit_expert(name: str, spec: FitSpec, folder: Path, listener: FitListener | None = None) -> Fitted:
    """Fit an adapter and write it to `folder` as a PEFT folder.

    Needs a connection to Ray. `folder` gets `adapter_config.json`, `adapter_model.safetensors` and `fit.json`.
    The fitted adapter decides on the held-out rows while it is still loaded. A fit of the same name, data and
    settings that was killed resumes from its last checkpoint.

    Args:
        name: of the fit, with which its checkpoints and Ray Train's run begin.
        spec: what is fitted, and how.
        folder: gets the adapter.
        listener: receives the fit's status.

    Raises:
        FitError: the workers could not start, died too often, or a step failed; the message names the log.
    """
    import ray
    from ray.train.v2.api.exceptions import TrainingFailedError

    config = spec.config
    status = ray.remote(FitStatusActor).options(num_cpus=0).remote(config.max_failures)
    storage = config.storage_path or str(cache_dir(spec.base_config) / "runs")
    fit = f"{name}-{spec.digest()[:12]}"
    run = f"{fit}-{uuid.uuid4().hex[:8]}"  # Ray Train would take an old run of this name for its own
    gpu = with_gpu(config)
    trainer = _torch_trainer(spec, run, storage, f"checkpoints/{fit}", status, gpu)
    workers = config.num_workers if isinstance(config.num_workers, int) else config.num_workers[0]
    needed = f"{workers} x {config.cpus_per_worker:g} CPU{' and 1 GPU' if gpu else ''}"
    with status_forwarded(status, needed, listener or FitListener()):
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise _as_fit_error(error, ray.get(status.failure.remote()), Path(storage) / run) from error
    if failure := ray.get(status.failure.remote()):
        raise failure
    if result.checkpoint is None:
        raise FitError(f"the fit {run} ended without an adapter; see the worker logs in {storage}/{run}")
    result.checkpoint.to_directory(folder)
    fitted = Fitted.read(folder)
    (folder / RESULT_FILE).unlink()
    (folder / "fit.json").write_text(json.dumps(asdict(fitted.summary), indent=2), encoding="utf-8")
    Checkpoints(storage, f"checkpoints/{fit}").clear()
    result.filesystem.delete_dir(result.path)
    return fitted


def _torch_trainer(spec: FitSpec, run: str, storage: str, checkpoints: str, status: Any, gpu: bool) -> Any:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = spec.config
    return TorchTrainer(
        _train_loop_per_worker,
        train_loop_config={
            "examples": ray.put(list(spec.examples)),
            "held_out": ray.put(list(spec.held_out)),
            "fingerprint": spec.base.fingerprint,
            "activation": spec.activation,
            "base_config": spec.base_config.model_dump(mode="json"),
            "config": config.model_dump(mode="json"),
            "status": status,
            "storage": storage,
            "checkpoints": checkpoints,
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
            # FitStatusActor limits failures: they count only as long as there is no new checkpoint.
            failure_config=FailureConfig(max_failures=-1),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )


def _as_fit_error(error: Exception, reported: SeeError | None, run: Path) -> SeeError:
    """The error that a worker reported, else the last line of Ray Train's that names one."""
    if reported is not None:
        return reported
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else type(error).__name__)
    return FitError(f"the fit stopped: {reason[:400]}; the workers' logs are named in {run}")


def _train_loop_per_worker(settings: dict[str, Any]) -> None:
    """One worker's whole run; Ray Train calls it in each worker process, and again after one of them died."""
    import ray
    from ray import train

    status = settings["status"]
    if train.get_context().get_world_rank() == 0:
        ray.get(status.workers_started.remote())
    train.report({})  # a barrier, so that all ranks see the same failure or none
    if ray.get(status.failure.remote()):
        return  # a restart by Ray Train that cannot succeed: end without a result

    from see_ray.fit.trainer import fit_rank

    try:
        fit_rank(settings)
    except SeeError as error:
        ray.get(status.set_failure.remote(error))
        raise
    except Exception as error:
        if train.get_context().get_world_size() == 1 or not _is_lost_peer(error):
            lines = str(error).splitlines() or [""]
            failure = FitError(f"the fit stopped: {type(error).__name__}: {lines[0][:400]}")
            ray.get(status.set_failure.remote(failure))
        raise


def _is_lost_peer(error: Exception) -> bool:
    """Whether a collective operation broke off, as it does when another worker dies."""
    from torch.distributed import DistError

    words = ("gloo", "connection", "peer", "nccl", "socket", "broken pipe")
    return isinstance(error, DistError) or any(word in str(error).lower() for word in words)
