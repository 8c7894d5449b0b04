"""Continual-learning methods, each as one function: what it does when a task arrives.

All share base model, rank, rows, epochs and seeds, and the activated form, so that methods are compared and
not forms (`see-full` apart). Every row becomes an accept example for every method: without pass examples the
indicator says nothing, and fit and engine are the same for all.

    generalist       no adapter
    oracle           one adapter a task, and the task of each query is told
    multitask        one adapter, fitted anew on all tasks' rows at every step
    sequential       one adapter, fitted on with each task's rows
    rehearsal-1      the same, with 1 % of every earlier task's rows (at least one)
    rehearsal-10     the same with 10 %
    ssr              the same with as many rows that the models wrote themselves
    learned-router   one adapter a task behind a classifier on sentence embeddings
    nearest-router   one adapter a task behind the nearest mean of the base model's hidden state
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
from typing import Any

from see_ray.admission.calibrate import calibrate
from see_ray.admission.gate import Evidence, judge
from see_ray.data.reconstruct import reconstruct, sample_queries
from see_ray.data.rows import Row
from see_ray.data.task import Task
from see_ray.evaluate.baselines import routers
from see_ray.evaluate.baselines import ssr as synthesis
from see_ray.evaluate.baselines.experiment import Fit, Workbench
from see_ray.evaluate.batch_inference import digest, write_json
from see_ray.routing.chain import GENERALIST, ChainEntry
from see_ray.routing.replay import answered_by, margin
from see_ray.store.expert_files import MOST_KEPT

FULL_LEARNING_RATE = 3e-4
"""Of the full form: adapting every token of the prompt, it is unsteady at the activated form's rate."""


@dataclass(frozen=True)
class Step:
    """What a method is once it has learned another task.

    Attributes:
        answerers: who answers each query: a fit's key, or None for the generalist.
        routes: the class each query was given, a task's name or `generalist`; None if nothing routes.
        rows: examples fitted on for this task, those of earlier tasks included.
        seconds: that learning it took.
        state: for the next step; JSON.
        margins: of each query, above 0 if some expert accepts; None if there are no decisions.
        decisions: P(accept) of each query by expert, and
        thresholds: of each expert.
    """

    answerers: list[str | None]
    routes: list[str] | None
    rows: int
    seconds: float
    state: dict[str, Any]
    margins: list[float] | None = None
    decisions: dict[str, list[float]] = field(default_factory=dict)
    thresholds: dict[str, float] = field(default_factory=dict)


Method = Callable[[Workbench, int, dict[str, Any]], Step]
"""(what is shared, number of the arriving task, state after the one before) -> the step."""


def generalist(bench: Workbench, arriving: int, state: dict[str, Any]) -> Step:
    return Step([None] * len(bench.queries), None, 0, 0.0, {})


def oracle(bench: Workbench, arriving: int, state: dict[str, Any]) -> Step:
    fits = _one_each(bench, arriving)
    keys = {task.name: fit.key for task, fit in zip(bench.tasks, fits, strict=False)}
    answerers = [keys.get(query.owner) if query.owner else None for query in bench.queries]
    return Step(answerers, None, fits[-1].rows, fits[-1].seconds, {})


def multitask(bench: Workbench, arriving: int, state: dict[str, Any]) -> Step:
    rows = [row for task in bench.tasks[: arriving + 1] for row in task.train]
    return _single(bench, bench.fit(bench.accept(rows)))


def sequential(bench: Workbench, arriving: int, state: dict[str, Any], share: float = 0.0) -> Step:
    old = [row for task in bench.tasks[:arriving] for row in _sample(task, share, bench.seed)]
    return _fit_on(bench, arriving, state, old)


def ssr(bench: Workbench, arriving: int, state: dict[str, Any], share: float = 0.1) -> Step:
    wanted = math.ceil(share * len(bench.tasks[0].train))
    written = [_synthesized(bench, task, wanted) for task in bench.tasks[:arriving]]
    began = time.perf_counter()
    old: list[Row] = []
    for task, (prompts, _) in zip(bench.tasks, written, strict=False):
        encoded = [bench.accept([Row((("user", text),), "", "")])[0].prompt for text in prompts]
        old += synthesis.rows_of(prompts, bench.answers(encoded, bench.found(state["key"])), task)
    writing = sum(seconds for _, seconds in written[-1:])  # each task's inputs are written once
    return _fit_on(bench, arriving, state, old, writing + time.perf_counter() - began)


def learned_router(bench: Workbench, arriving: int, state: dict[str, Any]) -> Step:
    def vectors(chats: Sequence[Any]) -> Any:
        return routers.embed([chat[-1]["content"] for chat in chats])

    return _routed(bench, arriving, vectors, partial(routers.learned, seed=bench.seed))


def nearest_router(bench: Workbench, arriving: int, state: dict[str, Any]) -> Step:
    def vectors(chats: Sequence[Any]) -> Any:
        rows = [Row(tuple((turn["role"], turn["content"]) for turn in chat), "", "") for chat in chats]
        return bench.hidden_states([example.prompt for example in bench.accept(rows)])

    return _routed(bench, arriving, vectors, routers.nearest)


def see(bench: Workbench, arriving: int, state: dict[str, Any], form: str = "activated") -> Step:
    """reconstruct ─► fit ─► calibrate ─► gate ─► the walk over all experts so far, as `learn` and `chain` have it.

    An expert that the gate sets aside does not join, and its task stays with the generalist.
    """
    task, config = bench.tasks[arriving], bench.config
    activation = bench.activation(form)
    earlier = {
        old.name: (
            sample_queries(old.train, config.reconstruct.rehearsal_share, bench.seed),
            [row.messages for row in old.eval[:MOST_KEPT]],
        )
        for old in bench.tasks[:arriving]
        if old.name in {expert["name"] for expert in state.get("experts", [])}
    }
    made = reconstruct(
        task, bench.tokenizer, activation, config.reconstruct, earlier=earlier, general=bench.general, seed=bench.seed
    )
    rate = FULL_LEARNING_RATE if form == "full" else None
    fit = bench.fit(made.train, form=form, held_out=made.held_out, learning_rate=rate)
    own, decisions = fit.decisions[: len(made.own)], fit.decisions[len(made.own) :]
    foreign = [(kind, p) for (kind, _), p in zip(made.foreign, decisions, strict=True)]
    calibration = calibrate(own, foreign, config.calibrate.false_accept_rate)
    model = (bench.base.name, bench.base.fingerprint)
    evidence = Evidence(calibration, own, foreign, made.claimed, fit.comparison, model)
    verdict = judge(evidence, config.gate)
    experts = list(state.get("experts", []))
    if verdict.passed:
        experts.append({"name": task.name, "key": fit.key, "threshold": calibration.threshold})

    keys = {expert["name"]: expert["key"] for expert in experts}
    links = [ChainEntry(expert["name"], expert["threshold"]) for expert in reversed(experts)]  # newest first
    by_expert = {name: bench.decisions(bench.found(key)) for name, key in keys.items()}
    by_query = [{name: every[n] for name, every in by_expert.items()} for n in range(len(bench.queries))]
    routes = [answered_by(links, decisions) for decisions in by_query]
    return Step(
        answerers=[keys.get(name) for name in routes],
        routes=routes,
        rows=fit.rows,
        seconds=fit.seconds,
        state={"experts": experts, "failed": {**state.get("failed", {}), task.name: list(verdict.failed)}},
        margins=[margin(links, decisions) for decisions in by_query],
        decisions=by_expert,
        thresholds={link.expert: link.threshold for link in links},
    )


METHODS: dict[str, Method] = {
    "generalist": generalist,
    "oracle": oracle,
    "see": see,
    "multitask": multitask,
    "sequential": sequential,
    "rehearsal-1": partial(sequential, share=0.01),
    "rehearsal-10": partial(sequential, share=0.1),
    "ssr": ssr,
    "learned-router": learned_router,
    "nearest-router": nearest_router,
    "see-full": partial(see, form="full"),
}
"""In the order in which they run: the routers find the oracle's adapters."""


# --- what several of them do -----------------------------------------------------------------


def _one_each(bench: Workbench, arriving: int) -> list[Fit]:
    """One adapter for each task so far."""
    return [bench.fit(bench.accept(task.train)) for task in bench.tasks[: arriving + 1]]


def _single(bench: Workbench, fit: Fit, more_seconds: float = 0.0) -> Step:
    return Step([fit.key] * len(bench.queries), None, fit.rows, fit.seconds + more_seconds, {"key": fit.key})


def _fit_on(
    bench: Workbench, arriving: int, state: dict[str, Any], old: Sequence[Row], more_seconds: float = 0.0
) -> Step:
    """Go on with the one adapter, on the arriving task's rows and some old ones."""
    start = bench.found(state["key"]) if arriving else None
    return _single(bench, bench.fit(bench.accept([*bench.tasks[arriving].train, *old]), start=start), more_seconds)


def _sample(task: Task, share: float, seed: int) -> list[Row]:
    count = math.ceil(share * len(task.train))
    return random.Random(f"rehearsal {task.name} {seed}").sample(list(task.train), count)


def _synthesized(bench: Workbench, task: Task, wanted: int) -> tuple[list[str], float]:
    """User turns like a task's, written once, and the seconds that took."""
    made_of = [bench.base.fingerprint, [row.prompt for row in task.train[: synthesis.DEMONSTRATIONS]], wanted]
    path = bench.folder / "synthesized" / f"{task.name}-{bench.seed}-{digest(made_of)}.json"
    if not path.is_file():
        began = time.perf_counter()

        def write(contexts: list[str], seed: int) -> list[str]:
            encoded = bench.tokenizer(contexts, add_special_tokens=False)["input_ids"]
            return bench.asker.sample(encoded, synthesis.HOT, seed, synthesis.LONGEST)

        prompts = synthesis.inputs(task, wanted, write, bench.seed)
        write_json(path, {"prompts": prompts, "seconds": time.perf_counter() - began})
    made = json.loads(path.read_text(encoding="utf-8"))
    return made["prompts"], made["seconds"]


def _routed(
    bench: Workbench,
    arriving: int,
    vectors: Callable[[Sequence[Any]], Any],
    classifier: Callable[[Any, Sequence[str]], routers.Classifier],
) -> Step:
    """One adapter a task behind a classifier that is made anew, of all rows so far."""
    import numpy

    fits = _one_each(bench, arriving)
    tasks = bench.tasks[: arriving + 1]
    old = [row.messages for task in tasks[:-1] for row in task.train]
    seen = vectors([*old, *bench.general])
    began = time.perf_counter()
    new = vectors([row.messages for row in tasks[-1].train])
    names = [task.name for task in tasks[:-1] for _ in task.train] + [GENERALIST] * len(bench.general)
    names += [tasks[-1].name] * len(new)
    classify = classifier(numpy.concatenate([seen, new]), names)
    seconds = fits[-1].seconds + time.perf_counter() - began
    routes = classify(vectors([query.messages for query in bench.queries]))
    keys = {task.name: fit.key for task, fit in zip(tasks, fits, strict=True)}
    return Step([keys.get(name) for name in routes], routes, fits[-1].rows, seconds, {})
