"""Connecting to Ray: to the running cluster if there is one, else to a new one on this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import Any

from see_ray.config import Config, FitConfig
from see_ray.errors import ConfigError, SeeError, ServingError

WORKER_ENVIRONMENT = {
    # Ray's default is 15, a low priority: threads that compute together would then wait for each other whenever
    # anything else on the machine runs.
    "RAY_worker_niceness": "0",
    # By default glibc returns the memory of every large tensor to the system, and requests it again for the next.
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}
"""Environment of the workers of a Ray that is started here; on a cluster, the nodes' configuration sets it."""

CONNECT_S = 10
"""Seconds within which the port of a cluster must accept a connection."""


def disconnect() -> None:
    """Disconnect from Ray, and stop it if it was started for this process."""
    import ray

    ray.shutdown()


def set_environment() -> None:
    """Set the environment variables that this process and those that Ray starts from it need, unless they are set."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def connect() -> bool:
    """Connect this process to Ray.

    In this order: the Ray at `$RAY_ADDRESS` (submitted jobs have it set; `local` means a new Ray), a Ray that runs on
    this machine, a new Ray on loopback that ends with this process.

    Returns:
        Whether a new Ray was started.

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
                raise ConnectionError("RAY_ADDRESS asks for a new Ray")
            ray.init(address="auto", **quiet)
        except ConnectionError:
            if os.environ.get("RAY_ADDRESS") not in (None, "", "local"):
                raise
            ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
            return True
    except Exception as error:  # Ray raises plain Exception if a node does not start in time
        address = os.environ.get("RAY_ADDRESS") or "this machine"
        reason, _, _ = str(error).partition("\n")
        raise ServingError(f"cannot connect to Ray on {address}: {reason}") from error
    return False


def _check_listens(address: str) -> None:
    """Raise ServingError if nothing listens at an address. Ray itself reports that only after minutes."""
    host, _, port = address.rpartition("//")[2].rpartition(":")
    if not host or not port.isdigit():
        return  # empty, `auto`, `local`, or an address of another form
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ServingError(
            f"cannot connect to Ray on {address}: {error}; start it (`ray start --head`), or unset RAY_ADDRESS "
            "to use a Ray on this machine"
        ) from error


def check_submitted(config: Config) -> None:
    """Refuse a submitted job (`ray job submit`) whose experts would be lost with its working directory.

    Raises:
        ConfigError: `store.url` is a folder below the job's working directory.
    """
    url = config.store.url
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and "://" not in url and not os.path.isabs(url):
        raise ConfigError(
            f"store.url is {url}, a folder inside this job's own copy of the working directory; other nodes and "
            "later jobs do not see it: give a bucket (--store s3://…) or an absolute path that all nodes share"
        )


def with_gpu(config: FitConfig) -> bool:
    """Whether each worker of a fit gets a GPU: as configured; with `auto`, if the cluster has any."""
    import ray

    return bool(ray.cluster_resources().get("GPU")) if config.use_gpu == "auto" else config.use_gpu


def as_fit_worker(work: Callable[..., Any], config: FitConfig) -> Any:
    """A function as a Ray remote function that reserves the resources of one fit worker."""
    import ray

    return ray.remote(work).options(num_cpus=config.cpus_per_worker, num_gpus=int(with_gpu(config)), max_retries=2)


def result_of(pending: Any) -> Any:
    """Wait for a remote result. A SeeError that the remote function raised is raised as such, not as Ray's wrapper."""
    import ray

    try:
        return ray.get(pending)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, SeeError):
            raise error.cause from error
        raise
