"""`see eval`: measure what is live in an expert store, on tasks in the order in which they were learned.

R comes from the store's history: row i is the sequence version in which the i-th task's expert was published, and the
last row is the live version. An expert never changes, so each expert decides on each query once, and answers once the
queries that it gets in any version; the walk over every version is replayed from these decisions
(`see_ray.routing.replay`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from see_ray.config import Config
from see_ray.data.general_queries import Chat
from see_ray.data.rows import Row
from see_ray.data.sources import EVAL_SPLITS
from see_ray.data.task import SplitOptions, read_task
from see_ray.errors import ConfigError, FingerprintError, TaskError
from see_ray.evaluate.answer_scores import KINDS, kind_of, mean_scores, scores_by_task
from see_ray.evaluate.queries import GENERAL_QUESTIONS, Query, encode_queries, general_chats, read_rows
from see_ray.evaluate.remote_inference import RemoteInference
from see_ray.evaluate.report import write_report
from see_ray.evaluate.results import Result, summary
from see_ray.models.base_model import BaseModel, find, load_tokenizer
from see_ray.progress import Listener
from see_ray.routing.chain import GENERALIST, ChainEntry
from see_ray.routing.replay import answered_by, margin
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertSequence, Manifest


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate.

    Attributes:
        tasks: sources of tasks that the store has learned; see `rows_of`.
        foreign: sources whose queries belong to no learned task.
        max_rows: largest number of rows of each source.
        max_tokens: longest answer.
        metrics: (task, kind of score), for tasks whose kind should not follow from the references.
    """

    tasks: tuple[str, ...]
    foreign: tuple[str, ...] = ()
    max_rows: int = 100
    max_tokens: int = 256
    metrics: tuple[tuple[str, str], ...] = ()


def report(evaluation: EvalConfig, config: Config, folder: Path, listener: Listener) -> str:
    """Evaluate a store and write the report to a folder; returns the text of report.md. Raises as `evaluate`."""
    result = evaluate(evaluation, config, folder, listener)
    head = ExpertStore.open(config.store.url).head()
    about = {
        "expert store": config.store.url,
        "sequence version": str(head.version),
        "experts, in the order asked": ", ".join(ref.id for ref in head.newest_first()) or "none",
        "rows of each task at most": str(evaluation.max_rows),
        "longest answer": f"{evaluation.max_tokens} tokens",
    }
    return write_report(summary([result]), about, folder)


def evaluate(evaluation: EvalConfig, config: Config, folder: Path, listener: Listener) -> Result:
    """Evaluate a store. Needs a connection to Ray.

    Args:
        evaluation: tasks, foreign queries and sizes.
        config: the store, the base model and the resources of a Ray task.
        folder: decisions and answers are kept here, and read again by the next call.
        listener: receives progress.

    Raises:
        TaskError: the store never learned a task, or a source cannot be read.
        ConfigError: an unknown kind of score, or a kind of score for an unknown task.
        FingerprintError: the experts belong to another base model.
    """
    listener.step("Reading the store, the base model and the tasks")
    base = find(config.base_model)
    tokenizer = load_tokenizer(base)
    store = ExpertStore.open(config.store.url)
    tests = dict(rows_of(source, config, evaluation.max_rows) for source in evaluation.tasks)
    kinds = _kinds(tests, dict(evaluation.metrics))
    published = _published(store, tuple(tests))
    tasks = tuple(published)
    if tasks != tuple(tests):
        listener.note(f"the store learned these tasks in the order {', '.join(tasks)}")
    # Row 0 of R is the empty sequence, the last row the live one, which may have changed since the last task.
    versions = [store.sequence(0), *list(published.values())[:-1], store.head()]
    queries = encode_queries(tests, _foreign_chats(evaluation, config), tokenizer)
    manifests = {ref.id: store.manifest(ref) for version in versions for ref in version.experts}
    for manifest in manifests.values():
        _check_base_model(manifest, base)

    listener.step(f"{len(manifests)} experts decide on {len(queries)} queries")
    inference = RemoteInference(config, evaluation.max_tokens, folder / "asked", listener)
    decisions = inference.decisions(list(manifests.values()), [query.prompt for query in queries])
    by_query = [{expert: values[index] for expert, values in decisions.items()} for index in range(len(queries))]
    chains = [[ChainEntry(ref.id, manifests[ref.id].threshold) for ref in v.newest_first()] for v in versions]
    answerers = [[answered_by(chain, of_query) for of_query in by_query] for chain in chains]
    answers = _answers(inference, manifests, queries, answerers, listener)

    names = {expert: manifest.name for expert, manifest in manifests.items()} | {GENERALIST: GENERALIST}
    return Result(
        method="see",
        seed=config.fit.seed,
        tasks=tasks,
        kinds={task: kinds[task] for task in tasks},
        scores=[mean_scores(scores_by_task(answered)) for answered in answers],
        routes=[
            (query.owner or GENERALIST, query.source, names[expert])
            for query, expert in zip(queries, answerers[-1], strict=True)
        ],
        margins=[margin(chains[-1], of_query) for of_query in by_query],
        decisions={names[entry.expert]: decisions[entry.expert] for entry in chains[-1]},
        thresholds={names[entry.expert]: entry.threshold for entry in chains[-1]},
    )


def rows_of(source: str, config: Config, max_rows: int) -> tuple[str, list[Row]]:
    """A task's name and its test rows.

    These are its eval split, as `see learn` reads or draws it with the same settings; of a file whose name says
    eval, validation, dev or test, they are all rows. More than `max_rows` are sampled.
    """
    share, seed = config.reconstruct.eval_share, config.fit.seed
    task = read_task(source, split=SplitOptions(eval_share=share, seed=seed))
    rows = list(task.eval)
    if Path(source).is_file() and re.split(r"[._-]", Path(source).stem.lower())[-1] in EVAL_SPLITS:
        rows = read_rows(Path(source))
    if len(rows) > max_rows:
        rows = random.Random(f"eval {seed}").sample(rows, max_rows)
    return task.name, rows


def _kinds(tests: Mapping[str, list[Row]], chosen: Mapping[str, str]) -> dict[str, str]:
    for task, kind in chosen.items():
        if task not in tests or kind not in KINDS:
            raise ConfigError(
                f"cannot score {task} by {kind}; tasks are {', '.join(tests)}, kinds of score {', '.join(KINDS)}"
            )
    return {task: chosen.get(task) or kind_of([row.response for row in rows]) for task, rows in tests.items()}


def _published(store: ExpertStore, tasks: Sequence[str]) -> dict[str, ExpertSequence]:
    """The sequence version in which each task's expert was first live, oldest version first."""
    first: dict[str, ExpertSequence] = {}
    for version in store.history():
        for ref in version.experts:
            first.setdefault(ref.name, version)
    for task in tasks:
        if task not in first:
            raise TaskError(
                f"{store.url} never learned {task}; it learned {', '.join(first) or 'nothing yet'}: "
                "teach it with `see learn`, or name it with --foreign if its queries belong to no task"
            )
    return {task: first[task] for task in sorted(tasks, key=lambda task: first[task].version)}


def _foreign_chats(evaluation: EvalConfig, config: Config) -> list[tuple[str, list[Chat]]]:
    """(source, chats) of the foreign queries, the general questions last."""
    sources = [rows_of(source, config, evaluation.max_rows) for source in evaluation.foreign]
    foreign = [(name, [row.messages for row in rows]) for name, rows in sources]
    return [*foreign, (GENERAL_QUESTIONS, general_chats(evaluation.max_rows))]


def _answers(
    inference: RemoteInference,
    manifests: Mapping[str, Manifest],
    queries: Sequence[Query],
    answerers: Sequence[Sequence[str]],
    listener: Listener,
) -> list[list[tuple[str, str, str]]]:
    """Per version (task, answer, reference) of the tasks' own queries, as the expert that gets each answers it.

    Args:
        inference: computes answers.
        manifests: by expert id.
        queries: all test queries.
        answerers: per version the expert id, or `generalist`, that answers each query.
        listener: receives progress.
    """
    own = [index for index, query in enumerate(queries) if query.owner is not None]
    queries_of: dict[str, list[int]] = {}
    for expert, index in dict.fromkeys((version[index], index) for version in answerers for index in own):
        queries_of.setdefault(expert, []).append(index)
    listener.step(f"{sum(map(len, queries_of.values()))} answers, over all {len(answerers)} versions")
    texts = inference.answers(
        [(manifests.get(expert), [queries[i].prompt for i in indices]) for expert, indices in queries_of.items()]
    )
    text_of = {
        (expert, index): text
        for (expert, indices), answers in zip(queries_of.items(), texts, strict=True)
        for index, text in zip(indices, answers, strict=True)
    }
    return [
        [(queries[index].source, text_of[version[index], index], queries[index].reference) for index in own]
        for version in answerers
    ]


def _check_base_model(manifest: Manifest, base: BaseModel) -> None:
    if manifest.fingerprint != base.fingerprint:
        raise FingerprintError(
            f"{manifest.id} was fitted on the base model {manifest.base_model} ({manifest.fingerprint[:12]}), "
            f"not on {base.name} ({base.fingerprint[:12]}); set base_model.name to that one"
        )
