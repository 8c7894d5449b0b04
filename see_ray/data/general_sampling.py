"""General queries for a task: from the configured file, from the cache, or sampled on the cluster.

Sampling runs as a Ray task with the resources of one fit worker, once for each base model and seed; how and what is
sampled is in `see_ray.data.general_queries`.
"""

from __future__ import annotations

from typing import Any

from see_ray.cluster import as_fit_worker, result_of
from see_ray.config import Config
from see_ray.cpus import available_cpus
from see_ray.data.general_queries import (
    Chat,
    general_cache,
    needed_general,
    read_general_file,
    sample_general,
    write_cache,
)
from see_ray.models.base_model import BaseModel, find
from see_ray.progress import Listener


def load_or_sample_general(base: BaseModel, config: Config, listener: Listener) -> list[Chat]:
    """The general queries to fit on and to hold out.

    A file given by the user may hold too few; then the listener gets a note. Needs a connection to Ray if they have to
    be sampled.

    Raises:
        ConfigError: the file cannot be read, or the base model does not write such queries.
    """
    needed = needed_general(config.reconstruct)
    if needed == 0:
        return []
    file = config.reconstruct.general_negatives_file
    if file is not None:
        chats = read_general_file(file)
        if len(chats) < needed:
            listener.note(
                f"{file} holds {len(chats)} general queries of the {needed} needed "
                "(reconstruct.general_negatives and half as many more, held out to calibrate)"
            )
        return chats
    cache = general_cache(base, config.base_model, config.fit.seed)
    if cache.is_file() and len(cached := read_general_file(cache)) >= needed:
        return cached[:needed]
    listener.step(f"Sampling {needed} general queries from the base model (once; kept in the cache)")
    chats = _sample_on_cluster(config, needed, listener)
    if not cache.is_file():  # sampled on another node
        write_cache(cache, chats)
    return chats


def _sample_on_cluster(config: Config, count: int, listener: Listener) -> list[Chat]:
    import ray

    progress = ray.remote(_ProgressActor).options(num_cpus=0).remote()
    pending = as_fit_worker(_sample_in_worker, config.fit).remote(config, count, progress)
    while not ray.wait([pending], timeout=1)[0]:
        listener.progress("sampling", *ray.get(progress.read.remote(), timeout=30))
    chats: list[Chat] = result_of(pending)
    return chats


def _sample_in_worker(config: Config, count: int, progress: Any) -> list[Chat]:
    import torch

    torch.set_num_threads(config.fit.threads_per_worker or available_cpus())
    base = find(config.base_model)
    return sample_general(base, config.base_model, count, config.fit.seed, lambda *now: progress.write.remote(now))


class _ProgressActor:
    """A Ray actor that holds (done, total) of the sampling."""

    def __init__(self) -> None:
        self._now = (0, 1)

    def write(self, now: tuple[int, int]) -> None:
        self._now = now

    def read(self) -> tuple[int, int]:
        return self._now
