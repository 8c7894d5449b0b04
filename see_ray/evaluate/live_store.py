"""`see eval`: what is live in an expert store, measured on tasks in the order they were learned.

R comes from the store's history: row i is the sequence version in which the i-th task's expert first was live,
the last row what is live now. An expert never changes, so each one decides on each query once, and answers the
queries that reach it in some version once; walks over all versions follow from that (`routes`). Deciding and
answering are Ray tasks, side by side where there is room; what came back is kept in the folder.
"""

from __future__ import annotations

import functools
import random
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from see_ray.cluster import as_fit_worker, result_of
from see_ray.config import BaseModelConfig, Config
from see_ray.data.demo_tasks import general_questions
from see_ray.data.rows import Row
from see_ray.data.sources import EVAL_SPLITS
from see_ray.data.task import SplitOptions, read_task
from see_ray.errors import ConfigError, FingerprintError, TaskError
from see_ray.evaluate.answer_scores import KINDS, each_score, kind_of, mean_scores
from see_ray.evaluate.baselines.experiment import Query, set_threads
from see_ray.evaluate.baselines.plan import GENERAL_QUESTIONS, read_rows
from see_ray.evaluate.batch_inference import Asker, cached_by_prompt, digest
from see_ray.evaluate.report import write_report
from see_ray.evaluate.results import Result, summary
from see_ray.models.activation import Activation, encode_prompt
from see_ray.models.base_model import BaseModel, find, load_tokenizer
from see_ray.models.cache import cache_dir
from see_ray.progress import Listener
from see_ray.routing.chain import GENERALIST, ChainEntry
from see_ray.routing.replay import answered_by, margin
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, ExpertSequence, Manifest

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate.

    Attributes:
        tasks: sources of tasks that the store has learned; see `rows_of`.
        foreign: sources whose queries belong to nobody.
        max_rows: at most so many rows of each.
        max_tokens: longest answer.
        metrics: kind of score by task, where it should not follow from the references.
    """

    tasks: tuple[str, ...]
    foreign: tuple[str, ...] = ()
    max_rows: int = 100
    max_tokens: int = 256
    metrics: tuple[tuple[str, str], ...] = ()


def report(wish: EvalConfig, config: Config, folder: Path, listener: Listener) -> str:
    """Evaluate a store and write the report into a folder; returns the text of report.md. Raises as `evaluate`."""
    result = evaluate(wish, config, folder, listener)
    head = ExpertStore.open(config.store.url).head()
    about = {
        "expert store": config.store.url,
        "sequence version": str(head.version),
        "experts, in the order asked": ", ".join(ref.id for ref in head.newest_first()) or "none",
        "rows of each task at most": str(wish.max_rows),
        "longest answer": f"{wish.max_tokens} tokens",
    }
    return write_report(summary([result]), about, folder)


def evaluate(wish: EvalConfig, config: Config, folder: Path, listener: Listener) -> Result:
    """Evaluate a store. Needs a connection to Ray.

    Raises:
        TaskError: a task that the store never learned, or that cannot be read.
        ConfigError: an unknown kind of score, or one for no task.
        FingerprintError: the experts belong to another base model.
    """
    listener.step("Reading the store, the base model and the tasks")
    base = find(config.base_model)
    tokenizer = load_tokenizer(base)
    store = ExpertStore.open(config.store.url)
    tests = dict(rows_of(source, config, wish.max_rows) for source in wish.tasks)
    kinds = _kinds(tests, dict(wish.metrics))
    versions = _versions(store, tuple(tests))
    tasks = tuple(versions)
    if tasks != tuple(tests):
        listener.note(f"the store learned these tasks in the order {', '.join(tasks)}")
    # Row 0 is the empty sequence; the last row what is live now, whatever happened since the last task.
    walked = [store.sequence(0), *list(versions.values())[:-1], store.head()]
    queries = _queries(tests, wish, config, tokenizer)
    manifests = {ref.id: store.manifest(ref) for version in walked for ref in version.experts}
    for manifest in manifests.values():
        _check(manifest, base)

    listener.step(f"{len(manifests)} experts decide on {len(queries)} queries")
    asked = _Asked(config, wish.max_tokens, folder / "asked", listener)
    prompts = [query.prompt for query in queries]
    decided = asked.decisions(list(manifests.values()), prompts)
    by_query = [{ref: every[n] for ref, every in decided.items()} for n in range(len(queries))]
    links = [[ChainEntry(ref.id, manifests[ref.id].threshold) for ref in version.newest_first()] for version in walked]
    answerers = [[answered_by(row, decisions) for decisions in by_query] for row in links]

    own = [number for number, query in enumerate(queries) if query.owner is not None]
    wanted: dict[str, list[int]] = {}
    for who, number in dict.fromkeys((row[number], number) for row in answerers for number in own):
        wanted.setdefault(who, []).append(number)
    listener.step(f"{sum(map(len, wanted.values()))} answers, over all {len(walked)} versions")
    texts = asked.answers([(manifests.get(who), [prompts[n] for n in ns]) for who, ns in wanted.items()])
    text_of = {
        (who, n): text
        for (who, ns), answers in zip(wanted.items(), texts, strict=True)
        for n, text in zip(ns, answers, strict=True)
    }
    names = {ref: manifest.name for ref, manifest in manifests.items()} | {GENERALIST: GENERALIST}
    live = {link.expert: link.threshold for link in links[-1]}
    return Result(
        method="see",
        seed=config.fit.seed,
        tasks=tasks,
        kinds={task: kinds[task] for task in tasks},
        scores=[
            mean_scores(each_score((queries[n].source, text_of[row[n], n], queries[n].reference) for n in own))
            for row in answerers
        ],
        routes=[
            (query.owner or GENERALIST, query.source, names[who])
            for query, who in zip(queries, answerers[-1], strict=True)
        ],
        margins=[margin(links[-1], decisions) for decisions in by_query],
        decisions={names[ref]: decided[ref] for ref in live},
        thresholds={names[ref]: threshold for ref, threshold in live.items()},
    )


def rows_of(source: str, config: Config, max_rows: int) -> tuple[str, list[Row]]:
    """A task's name and the rows to ask: its eval split, as `see learn` reads or draws it with the same
    settings; all rows of a file whose own name says eval, validation, dev or test."""
    share, seed = config.reconstruct.eval_share, config.fit.seed
    task = read_task(source, split=SplitOptions(eval_share=share, seed=seed))
    rows = list(task.eval)
    if Path(source).is_file() and re.split(r"[._-]", Path(source).stem.lower())[-1] in EVAL_SPLITS:
        rows = read_rows(Path(source))
    if len(rows) > max_rows:
        rows = random.Random(f"eval {seed}").sample(rows, max_rows)
    return task.name, rows


def _kinds(tests: dict[str, list[Row]], named: dict[str, str]) -> dict[str, str]:
    for task, kind in named.items():
        if task not in tests or kind not in KINDS:
            raise ConfigError(
                f"cannot score {task} by {kind}; tasks are {', '.join(tests)}, kinds of score {', '.join(KINDS)}"
            )
    return {task: named.get(task) or kind_of([row.response for row in rows]) for task, rows in tests.items()}


def _versions(store: ExpertStore, tasks: Sequence[str]) -> dict[str, ExpertSequence]:
    """The version in which each task's expert first was live, in the order of these versions."""
    first: dict[str, ExpertSequence] = {}
    for version in store.history():
        for ref in version.experts:
            first.setdefault(ref.name, version)
    for task in tasks:
        if task not in first:
            raise TaskError(
                f"{store.url} never learned {task}; it learned {', '.join(first) or 'nothing yet'}: "
                "teach it with `see learn`, or name it with --foreign if its queries belong to nobody"
            )
    return {task: first[task] for task in sorted(tasks, key=lambda task: first[task].version)}


def _queries(tests: dict[str, list[Row]], wish: EvalConfig, config: Config, tokenizer: Any) -> list[Query]:
    own = [(name, name, row.messages, row.response) for name, rows in tests.items() for row in rows]
    foreign: list[tuple[None, str, list[dict[str, str]], str]] = []
    for source in wish.foreign:
        name, rows = rows_of(source, config, wish.max_rows)
        foreign += [(None, name, row.messages, "") for row in rows]
    for text in general_questions()[: wish.max_rows]:
        foreign.append((None, GENERAL_QUESTIONS, [{"role": "user", "content": text}], ""))
    return [
        Query(owner, source, tuple(encode_prompt(tokenizer, messages)), messages, reference)
        for owner, source, messages, reference in (*own, *foreign)
    ]


def _check(manifest: Manifest, base: BaseModel) -> None:
    if manifest.fingerprint != base.fingerprint:
        raise FingerprintError(
            f"{manifest.id} was fitted on the base model {manifest.base_model} ({manifest.fingerprint[:12]}), "
            f"not on {base.name} ({base.fingerprint[:12]}); set base_model.name to that one"
        )


class _Asked:
    """Decisions and answers of stored experts, from Ray tasks; kept in a folder on this machine."""

    def __init__(self, config: Config, max_tokens: int, folder: Path, listener: Listener):
        self._config, self._max_tokens, self._folder, self._listener = config, max_tokens, folder, listener

    def decisions(self, manifests: Sequence[Manifest], prompts: Sequence[Sequence[int]]) -> dict[str, list[float]]:
        """P(accept) for each prompt, by expert id."""
        work = as_fit_worker(_decide, self._config.fit)

        def ask(manifest: Manifest) -> Callable[[list[Sequence[int]]], list[float]]:
            return lambda missing: result_of(work.remote(self._config, manifest.ref, missing))

        jobs = [(f"decisions-{_key(m)}.json", prompts, ask(m)) for m in manifests]
        found = self._side_by_side("deciding", jobs)
        return {manifest.id: decisions for manifest, decisions in zip(manifests, found, strict=True)}

    def answers(self, wanted: Sequence[tuple[Manifest | None, list[Sequence[int]]]]) -> list[list[str]]:
        """Texts, for each answerer (None is the generalist) and its prompts, in order."""
        work = as_fit_worker(_answer, self._config.fit)

        def ask(manifest: Manifest | None) -> Callable[[list[Sequence[int]]], list[str]]:
            ref = manifest.ref if manifest else None
            return lambda missing: result_of(work.remote(self._config, ref, missing, self._max_tokens))

        jobs = [
            (f"answers-{_key(m) if m else GENERALIST}-{self._max_tokens}.json", prompts, ask(m))
            for m, prompts in wanted
        ]
        return self._side_by_side("answering", jobs)

    def _side_by_side(self, title: str, jobs: Sequence[tuple[str, Sequence[Sequence[int]], Any]]) -> list[list[Any]]:
        total = sum(len(prompts) for _, prompts, _ in jobs)
        done, lock = 0, threading.Lock()

        def one(job: tuple[str, Sequence[Sequence[int]], Any]) -> list[Any]:
            nonlocal done
            name, prompts, ask = job
            found = cached_by_prompt(self._folder / name, prompts, ask)
            with lock:
                done += len(prompts)
                self._listener.progress(title, done, total)
            return found

        with ThreadPoolExecutor(max(1, len(jobs))) as pool:  # each waits for Ray, which runs what it has room for
            return list(pool.map(one, jobs))


def _key(manifest: Manifest) -> str:
    """Names what an expert computes: versions that differ in their threshold alone have the same."""
    files = [manifest.files[name] for name in ADAPTER_FILES]
    return digest([files, manifest.activation_tokens, manifest.indicator_tokens, manifest.fingerprint])


def _decide(config: Config, ref: ExpertRef, prompts: list[Sequence[int]]) -> list[float]:
    asker, expert = _loaded(config, ref)
    return asker.decisions(prompts, expert)


def _answer(config: Config, ref: ExpertRef | None, prompts: list[Sequence[int]], max_tokens: int) -> list[str]:
    asker, expert = _loaded(config, ref)
    return asker.answers(prompts, expert, max_tokens)


def _loaded(config: Config, ref: ExpertRef | None) -> tuple[Asker, Any]:
    from see_ray.engine.interface import Expert

    set_threads(config.fit)
    asker = _asker(config.base_model)
    if ref is None:
        return asker, None
    store = ExpertStore.open(config.store.url)
    manifest = store.manifest(ref)
    folder = store.fetch(ref, cache_dir(config.base_model) / "experts")
    activation = Activation(manifest.generation_prompt, manifest.activation_tokens, *manifest.indicator_tokens)
    return asker, Expert(ref.id, folder, activation)


@functools.lru_cache(maxsize=1)
def _asker(config: BaseModelConfig) -> Asker:
    """What a process keeps from one Ray task to the next."""
    from see_ray.engine.engine import EmbeddedEngine

    base = find(config)
    return Asker(EmbeddedEngine(base, config), load_tokenizer(base))
