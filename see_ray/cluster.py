"""Connecting to Ray: to the cluster that is there, else to a new one on this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from see_ray.config import Config, FitConfig
from see_ray.errors import ConfigError, SeeError, ServingError

WORKER_ENVIRONMENT = {
    # Ray would run workers at the lowest priority but four: threads that compute together then
    # wait for each other whenever anything else on the machine stirs.
    "RAY_worker_niceness": "0",
    # glibc would return every large tensor's memory to the system and fetch it again.
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}
"""Handed on to the workers of a Ray that starts here; a cluster sets it for its nodes."""

CONNECT_S = 10
"""How long the port of a cluster may take to accept a connection."""


def disconnect() -> None:
    """Leave Ray; one that was started for this process ends."""
    import ray

    ray.shutdown()


def set_environment() -> None:
    """Set what is not set yet of the environment that this process, and all that Ray starts from here, must share."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect() -> bool:
    """Connect this process to Ray; True if a new local Ray was started for it.

    `$RAY_ADDRESS` is respected (a submitted job has it set; `local` means a new Ray), then a Ray
    that runs on this machine, and otherwise Ray starts here, on loopback, and ends with this process.

    Raises:
        ServingError: the cluster cannot be reached.
    """
    set_environment()
    import ray

    if ray.is_initialized():
        return False
    _check_listens(os.environ.get("RAY_ADDRESS", ""))
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    try:
        try:
            if os.environ.get("RAY_ADDRESS") == "local":
                raise ConnectionError("a new Ray is asked for")
            ray.init(address="auto", **quiet)
        except ConnectionError:
            if os.environ.get("RAY_ADDRESS") not in (None, "", "local"):
                raise
            ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
            return True
    except Exception as error:  # Ray raises a bare one where a node does not start in time
        where = os.environ.get("RAY_ADDRESS") or "this machine"
        said, _, _ = str(error).partition("\n")
        raise ServingError(f"cannot connect to Ray on {where}: {said}") from error
    return False


def _check_listens(address: str) -> None:
    """Refuse an address where nothing listens: Ray would look for minutes before it says so."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # none, `auto`, `local`, or a service with an address form of its own
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ServingError(
            f"cannot connect to Ray on {address}: {error}; start it (`ray start --head`), or unset RAY_ADDRESS "
            "to use a Ray on this machine"
        ) from error


def check_submitted(config: Config) -> None:
    """Refuse a submitted job (`ray job submit`) whose experts would be lost with its working copy.

    Raises:
        ConfigError: `store.url` is a folder below the job's working directory.
    """
    place = config.store.url
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "://" not in place and not os.path.isabs(place):
        raise ConfigError(
            f"store.url is {place}, a folder inside this job's own copy of the working directory; other nodes and "
            "later jobs do not see it: give a bucket (--store s3://…) or an absolute path that all nodes share"
        )


def with_gpu(config: FitConfig) -> bool:
    """Whether a fit's workers get a GPU each: as configured, else if the cluster has any."""
    import ray

    return bool(ray.cluster_resources().get("GPU")) if config.use_gpu == "auto" else config.use_gpu


def as_fit_worker(work: Callable[..., Any], config: FitConfig) -> Any:
    """A function as a Ray remote function with the resources of one fit worker."""
    import ray

    return ray.remote(work).options(num_cpus=config.cpus_per_worker, num_gpus=int(with_gpu(config)), max_retries=2)


def result_of(pending: Any) -> Any:
    """Wait for a remote result; our own errors come back as themselves."""
    import ray

    try:
        return ray.get(pending)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SeeError):
            raise error.cause from error
        raise
