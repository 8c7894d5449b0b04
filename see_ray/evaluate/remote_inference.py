"""Decisions and answers of stored experts, computed in Ray tasks and kept in files."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from see_ray.admission.newcomers import ADAPTER_FILES
from see_ray.cluster import as_fit_worker, result_of
from see_ray.config import BaseModelConfig, Config
from see_ray.evaluate.batch_inference import BatchInference, set_threads
from see_ray.evaluate.result_cache import Prompt, cached_by_prompt, digest
from see_ray.models.activation import Activation
from see_ray.models.base_model import find, load_tokenizer
from see_ray.models.cache import cache_dir
from see_ray.progress import Listener
from see_ray.routing.chain import GENERALIST
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, Manifest

if TYPE_CHECKING:
    from see_ray.engine.interface import Expert

T = TypeVar("T")


@dataclass(frozen=True)
class _Job(Generic[T]):
    """One expert's results for some prompts: the file that keeps them, and how missing ones are computed."""

    file: str
    prompts: Sequence[Prompt]
    compute: Callable[[list[Prompt]], list[T]]


class RemoteInference:
    """Runs stored experts, and the generalist, on lists of prompts.

    Each expert is one Ray task with the resources of a fit worker; tasks run concurrently where Ray has room.

    Args:
        config: the store, the base model and the resources.
        max_tokens: longest answer.
        folder: where results are kept, on this machine.
        listener: receives progress.
    """

    def __init__(self, config: Config, max_tokens: int, folder: Path, listener: Listener):
        self._config, self._max_tokens, self._folder, self._listener = config, max_tokens, folder, listener

    def decisions(self, manifests: Sequence[Manifest], prompts: Sequence[Prompt]) -> dict[str, list[float]]:
        """P(accept) for each prompt, by expert id."""
        remote = as_fit_worker(_decide, self._config.fit)

        def job(manifest: Manifest) -> _Job[float]:
            def compute(missing: list[Prompt]) -> list[float]:
                decisions: list[float] = result_of(remote.remote(self._config, manifest.ref, missing))
                return decisions

            return _Job(f"decisions-{_key(manifest)}.json", prompts, compute)

        decisions = self._run("deciding", [job(manifest) for manifest in manifests])
        return {manifest.id: values for manifest, values in zip(manifests, decisions, strict=True)}

    def answers(self, prompts: Sequence[tuple[Manifest | None, Sequence[Prompt]]]) -> list[list[str]]:
        """Answers of each expert (None: the generalist) to its prompts, in the order given."""
        remote = as_fit_worker(_answer, self._config.fit)

        def job(manifest: Manifest | None, prompts: Sequence[Prompt]) -> _Job[str]:
            ref = manifest.ref if manifest else None

            def compute(missing: list[Prompt]) -> list[str]:
                texts: list[str] = result_of(remote.remote(self._config, ref, missing, self._max_tokens))
                return texts

            key = _key(manifest) if manifest else GENERALIST
            return _Job(f"answers-{key}-{self._max_tokens}.json", prompts, compute)

        return self._run("answering", [job(manifest, of_expert) for manifest, of_expert in prompts])

    def _run(self, title: str, jobs: Sequence[_Job[T]]) -> list[list[T]]:
        total = sum(len(job.prompts) for job in jobs)
        done, lock = 0, threading.Lock()

        def run(job: _Job[T]) -> list[T]:
            nonlocal done
            results = cached_by_prompt(self._folder / job.file, job.prompts, job.compute)
            with lock:
                done += len(job.prompts)
                self._listener.progress(title, done, total)
            return results

        with ThreadPoolExecutor(max(1, len(jobs))) as pool:  # threads only wait for Ray
            return list(pool.map(run, jobs))


def _key(manifest: Manifest) -> str:
    """Identifies what an expert computes: the same for versions that differ in their threshold alone."""
    files = [manifest.files[name] for name in ADAPTER_FILES]
    return digest([files, manifest.activation_tokens, manifest.indicator_tokens, manifest.fingerprint])


def _decide(config: Config, ref: ExpertRef, prompts: list[Prompt]) -> list[float]:
    set_threads(config.fit)
    return _inference(config.base_model).decisions(prompts, _fetch(config, ref))


def _answer(config: Config, ref: ExpertRef | None, prompts: list[Prompt], max_tokens: int) -> list[str]:
    set_threads(config.fit)
    expert = _fetch(config, ref) if ref else None
    return _inference(config.base_model).answers(prompts, expert, max_tokens)


@functools.lru_cache(maxsize=1)
def _inference(config: BaseModelConfig) -> BatchInference:
    """The engine of this process, kept from one Ray task to the next."""
    from see_ray.engine.engine import EmbeddedEngine

    base = find(config)
    return BatchInference(EmbeddedEngine(base, config), load_tokenizer(base))


def _fetch(config: Config, ref: ExpertRef) -> Expert:
    from see_ray.engine.interface import Expert

    store = ExpertStore.open(config.store.url)
    manifest = store.manifest(ref)
    folder = store.fetch(ref, cache_dir(config.base_model) / "experts")
    activation = Activation(manifest.generation_prompt, manifest.activation_tokens, *manifest.indicator_tokens)
    return Expert(ref.id, folder, activation)
