"""Continual-learning methods, each one function: what it does when a task arrives.

All share the base model, rank, rows, epochs and seeds, and the activated form (except `see-full`), so that methods
are compared and not forms. Every row is an accept example for every method: without pass examples the indicator
carries no information, and fit and engine are the same for all.

    generalist       no adapter
    oracle           one adapter per task; the task of each query is given
    multitask        one adapter, fitted again on all tasks' rows at every stage
    sequential       one adapter, fitted further on each task's rows
    rehearsal-1      the same, with 1 % of every earlier task's rows (at least one)
    rehearsal-10     the same with 10 %
    ssr              the same with as many rows that the models wrote themselves
    learned-router   one adapter per task behind a classifier on sentence embeddings
    nearest-router   one adapter per task behind the nearest mean of the base model's hidden state
    see              this project: experts that decide for themselves
    see-full         the same in the full form
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from see_ray.admission.candidate import Candidate
from see_ray.data.general_queries import Chat
from see_ray.data.reconstruct import Reconstruction, reconstruct, sample_queries
from see_ray.data.rows import Row
from see_ray.data.task import Task
from see_ray.evaluate.baselines import routers, ssr
from see_ray.evaluate.baselines.experiment import Experiment, Fit
from see_ray.evaluate.result_cache import digest, write_json
from see_ray.routing.chain import GENERALIST, ChainEntry
from see_ray.routing.replay import answered_by, margin
from see_ray.store.expert_files import MOST_KEPT

if TYPE_CHECKING:
    import numpy

FULL_LEARNING_RATE = 3e-4
"""Of the full form, which adapts every token of the prompt and is unstable at the activated form's rate."""


@dataclass(frozen=True)
class StageResult:
    """A method after one more task. The field names are those of the files that `compare` keeps.

    Attributes:
        answerers: the key of the fit that answers each query; None for the generalist.
        routes: the class of each query, a task's name or `generalist`; None if the method routes nothing.
        rows: examples fitted on for this task, those of earlier tasks included.
        seconds: that learning the task took.
        state: what the next stage needs; JSON.
        margins: of each query, above 0 if an expert accepts it; None if the method makes no decisions.
        decisions: P(accept) of each query, by expert.
        thresholds: by expert.
    """

    answerers: list[str | None]
    routes: list[str] | None
    rows: int
    seconds: float
    state: dict[str, Any]
    margins: list[float] | None = None
    decisions: dict[str, list[float]] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)


Method = Callable[[Experiment, int, dict[str, Any]], StageResult]
"""(experiment, index of the arriving task, state after the task before) -> the result of this stage."""


# --- the generalist and methods with one adapter ---------------------------------------------


def generalist(experiment: Experiment, arriving: int, state: dict[str, Any]) -> StageResult:
    return StageResult([None] * len(experiment.queries), None, 0, 0.0, {})


def multitask(experiment: Experiment, arriving: int, state: dict[str, Any]) -> StageResult:
    rows = [row for task in experiment.tasks[: arriving + 1] for row in task.train]
    return _single_adapter(experiment, experiment.fit(experiment.accept_examples(rows)))


def sequential(experiment: Experiment, arriving: int, state: dict[str, Any], share: float = 0.0) -> StageResult:
    """Fit the adapter further on the arriving task, and on `share` of every earlier task's rows."""
    old_rows = [row for task in experiment.tasks[:arriving] for row in _rehearsal_rows(task, share, experiment.seed)]
    return _fit_further(experiment, arriving, state, old_rows)


def self_synthesized(experiment: Experiment, arriving: int, state: dict[str, Any], share: float = 0.1) -> StageResult:
    """Fit the adapter further on the arriving task, and on synthesized rows of every earlier task."""
    count = math.ceil(share * len(experiment.tasks[0].train))
    synthesized = [_synthesized_inputs(experiment, task, count) for task in experiment.tasks[:arriving]]
    started = time.perf_counter()
    old_rows: list[Row] = []
    for task, (inputs, _) in zip(experiment.tasks, synthesized, strict=False):
        prompts = [experiment.accept_examples([Row((("user", text),), "", "")])[0].prompt for text in inputs]
        answers = experiment.answers(prompts, experiment.load_fit(state["key"]))
        old_rows += ssr.as_rows(inputs, answers, task)
    writing = sum(seconds for _, seconds in synthesized[-1:])  # those of earlier tasks were counted before
    return _fit_further(experiment, arriving, state, old_rows, writing + time.perf_counter() - started)


def _single_adapter(experiment: Experiment, fit: Fit, extra_seconds: float = 0.0) -> StageResult:
    answerers: list[str | None] = [fit.key] * len(experiment.queries)
    return StageResult(answerers, None, fit.rows, fit.seconds + extra_seconds, {"key": fit.key})


def _fit_further(
    experiment: Experiment, arriving: int, state: dict[str, Any], old_rows: Sequence[Row], extra_seconds: float = 0.0
) -> StageResult:
    """Continue the one adapter on the arriving task's rows and some old ones."""
    start = experiment.load_fit(state["key"]) if arriving else None
    examples = experiment.accept_examples([*experiment.tasks[arriving].train, *old_rows])
    return _single_adapter(experiment, experiment.fit(examples, start=start), extra_seconds)


def _rehearsal_rows(task: Task, share: float, seed: int) -> list[Row]:
    count = math.ceil(share * len(task.train))
    return random.Random(f"rehearsal {task.name} {seed}").sample(list(task.train), count)


def _synthesized_inputs(experiment: Experiment, task: Task, count: int) -> tuple[list[str], float]:
    """User turns like a task's, and the seconds that generating them took; generated once and kept."""
    demonstrations = [row.prompt for row in task.train[: ssr.DEMONSTRATIONS]]
    key = digest([experiment.base.fingerprint, demonstrations, count])
    path = experiment.folder / "synthesized" / f"{task.name}-{experiment.seed}-{key}.json"
    if not path.is_file():
        started = time.perf_counter()

        def generate(contexts: list[str], seed: int) -> list[str]:
            encoded = experiment.tokenizer(contexts, add_special_tokens=False)["input_ids"]
            return experiment.inference.sample(encoded, ssr.TEMPERATURE, seed, ssr.MAX_INPUT_TOKENS)

        inputs = ssr.synthesize_inputs(task, count, generate, experiment.seed)
        write_json(path, {"prompts": inputs, "seconds": time.perf_counter() - started})
    saved = json.loads(path.read_text(encoding="utf-8"))
    return saved["prompts"], saved["seconds"]


# --- one adapter per task --------------------------------------------------------------------


def oracle(experiment: Experiment, arriving: int, state: dict[str, Any]) -> StageResult:
    fits = _fit_each(experiment, arriving)
    keys = {task.name: fit.key for task, fit in zip(experiment.tasks, fits, strict=False)}
    answerers = [keys.get(query.owner) if query.owner else None for query in experiment.queries]
    return StageResult(answerers, None, fits[-1].rows, fits[-1].seconds, {})


def learned_router(experiment: Experiment, arriving: int, state: dict[str, Any]) -> StageResult:
    def vectors(chats: Sequence[Chat]) -> numpy.ndarray:
        return routers.embed([chat[-1]["content"] for chat in chats])

    return _routed(experiment, arriving, vectors, partial(routers.fit_logistic_regression, seed=experiment.seed))


def nearest_router(experiment: Experiment, arriving: int, state: dict[str, Any]) -> StageResult:
    def vectors(chats: Sequence[Chat]) -> numpy.ndarray:
        rows = [Row(tuple((turn["role"], turn["content"]) for turn in chat), "", "") for chat in chats]
        return experiment.hidden_states([example.prompt for example in experiment.accept_examples(rows)])

    return _routed(experiment, arriving, vectors, routers.fit_nearest_mean)


def _fit_each(experiment: Experiment, arriving: int) -> list[Fit]:
    """One adapter for each task so far."""
    return [experiment.fit(experiment.accept_examples(task.train)) for task in experiment.tasks[: arriving + 1]]


def _routed(
    experiment: Experiment,
    arriving: int,
    vectors: Callable[[Sequence[Chat]], numpy.ndarray],
    fit_classifier: Callable[[numpy.ndarray, Sequence[str]], routers.Classifier],
) -> StageResult:
    """One adapter per task behind a classifier that is fitted again on all rows so far.

    Args:
        experiment: the experiment.
        arriving: index of the arriving task.
        vectors: the classifier's features of some chats [chats, size].
        fit_classifier: gets vectors [rows, size] and their class names.
    """
    import numpy

    fits = _fit_each(experiment, arriving)
    *earlier, task = experiment.tasks[: arriving + 1]
    known = vectors([row.messages for old in earlier for row in old.train] + experiment.general)
    names = [old.name for old in earlier for _ in old.train] + [GENERALIST] * len(experiment.general)
    started = time.perf_counter()
    arrived = vectors([row.messages for row in task.train])
    names += [task.name] * len(arrived)
    classify = fit_classifier(numpy.concatenate([known, arrived]), names)
    seconds = fits[-1].seconds + time.perf_counter() - started
    routes = classify(vectors([query.messages for query in experiment.queries]))
    keys = {learned.name: fit.key for learned, fit in zip((*earlier, task), fits, strict=True)}
    return StageResult([keys.get(name) for name in routes], routes, fits[-1].rows, seconds, {})


# --- SEE -------------------------------------------------------------------------------------


def see(experiment: Experiment, arriving: int, state: dict[str, Any], form: str = "activated") -> StageResult:
    """Reconstruct, fit, calibrate and judge as `see_ray.pipeline` does, then walk the chain of experts so far.

    An expert that the gate sets aside does not join, and the queries of its task stay with the generalist.
    """
    task, config = experiment.tasks[arriving], experiment.config
    reconstruction = _reconstruct(experiment, arriving, form, {expert["name"] for expert in state.get("experts", [])})
    rate = FULL_LEARNING_RATE if form == "full" else None
    fit = experiment.fit(reconstruction.train, form=form, held_out=reconstruction.held_out, learning_rate=rate)
    candidate = Candidate.from_fit(
        reconstruction, fit.decisions, fit.comparison, experiment.base, config.calibrate.false_accept_rate
    )
    verdict = candidate.judge(config.gate)
    experts = list(state.get("experts", []))
    if verdict.passed:
        experts.append({"name": task.name, "key": fit.key, "threshold": candidate.calibration.threshold})

    keys = {expert["name"]: expert["key"] for expert in experts}
    chain = [ChainEntry(expert["name"], expert["threshold"]) for expert in reversed(experts)]  # newest first
    decisions = {name: experiment.decisions(experiment.load_fit(key)) for name, key in keys.items()}
    by_query = [{name: p[index] for name, p in decisions.items()} for index in range(len(experiment.queries))]
    routes = [answered_by(chain, of_query) for of_query in by_query]
    return StageResult(
        answerers=[keys.get(name) for name in routes],
        routes=routes,
        rows=fit.rows,
        seconds=fit.seconds,
        state={"experts": experts, "failed": {**state.get("failed", {}), task.name: list(verdict.failed)}},
        margins=[margin(chain, of_query) for of_query in by_query],
        decisions=decisions,
        thresholds={entry.expert: entry.threshold for entry in chain},
    )


def _reconstruct(experiment: Experiment, arriving: int, form: str, live: set[str]) -> Reconstruction:
    """The arriving task's examples; each live expert keeps the queries for it that `see learn` would store."""
    config = experiment.config.reconstruct
    earlier = {
        old.name: (
            sample_queries(old.train, config.rehearsal_share, experiment.seed),
            [row.messages for row in old.eval[:MOST_KEPT]],
        )
        for old in experiment.tasks[:arriving]
        if old.name in live
    }
    return reconstruct(
        experiment.tasks[arriving],
        experiment.tokenizer,
        experiment.activation(form),
        config,
        earlier=earlier,
        general=experiment.general,
        seed=experiment.seed,
    )


METHODS: dict[str, Method] = {
    "generalist": generalist,
    "oracle": oracle,
    "see": see,
    "multitask": multitask,
    "sequential": sequential,
    "rehearsal-1": partial(sequential, share=0.01),
    "rehearsal-10": partial(sequential, share=0.1),
    "ssr": self_synthesized,
    "learned-router": learned_router,
    "nearest-router": nearest_router,
    "see-full": partial(see, form="full"),
}
"""Methods by name, in the order in which they run: the routers then find the oracle's adapters."""
