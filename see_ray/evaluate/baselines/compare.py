"""Compare methods: parts that run as Ray tasks, each kept in one file, and their results.

    parts/<seed>/<method>/<stage>.json     one method after one more task: answerers and scores of all test queries
    <base model>/adapters/, asked/, synthesized/
                                           fits, answers and inputs that parts share, possibly in a folder that several
                                           comparisons use. The name of each is a digest of all its inputs, so that
                                           two orders with the same first tasks share the fits of these

A part that exists is not run again, so an interrupted comparison continues where it stopped. Stage 0 is before the
first task, the same for all methods. The stages of one method and seed run one after another; methods and seeds run
concurrently, as many as Ray has CPUs for. All nodes must see the folders.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from see_ray.cluster import as_fit_worker, result_of
from see_ray.errors import ConfigError, SeeError
from see_ray.evaluate.answer_scores import QueryScores, mean_scores, scores_by_task
from see_ray.evaluate.baselines.experiment import Experiment
from see_ray.evaluate.baselines.methods import METHODS, StageResult, generalist
from see_ray.evaluate.baselines.plan import Plan, read_data, save_plan
from see_ray.evaluate.batch_inference import set_threads
from see_ray.evaluate.result_cache import write_json
from see_ray.evaluate.results import Result, Route
from see_ray.progress import Listener
from see_ray.routing.chain import GENERALIST


@dataclass(frozen=True)
class Part:
    """One method with one seed after `stage` tasks."""

    seed: int
    method: str
    stage: int

    def path(self, folder: Path) -> Path:
        """Its file in the folder of the comparison."""
        return folder / "parts" / str(self.seed) / self.method / f"{self.stage}.json"

    def is_done(self, folder: Path) -> bool:
        return self.path(folder).is_file()

    def read(self, folder: Path) -> dict[str, Any]:
        """The fields of its StageResult, and `scores` and `each` (query by query)."""
        body: dict[str, Any] = json.loads(self.path(folder).read_text(encoding="utf-8"))
        return body


def compare(
    plan: Plan,
    methods: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    listener: Listener,
    *,
    shared: Path | None = None,
    stop_after_s: float | None = None,
) -> list[Result] | None:
    """Run all parts that are missing. Needs a connection to Ray.

    Args:
        plan: what to run on; saved in `folder`, which holds the parts of one plan only.
        methods: names of METHODS; the generalist is always added.
        seeds: each method runs once with each of them.
        folder: of the comparison.
        listener: receives progress.
        shared: where fits and answers are kept for other comparisons to find; `folder` if None.
        stop_after_s: after so many seconds start no further parts, except for the first ones.

    Returns:
        A result for each method and seed; None if parts are left to run.

    Raises:
        ConfigError: an unknown method, or the folder holds another plan.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise ConfigError(f"there is no method {unknown[0]}; methods are {', '.join(METHODS)}")
    folder = folder.absolute()
    chosen = [name for name in METHODS if name in {*methods, "generalist"}]
    save_plan(plan, folder)
    for seed in seeds:
        read_data(plan, seed)  # so that errors in the data are raised before anything takes long
    runs = [[Part(seed, method, stage) for stage in _stages(plan, method)] for seed in seeds for method in chosen]
    deadline = None if stop_after_s is None else time.monotonic() + stop_after_s
    listener.step(f"{sum(map(len, runs))} parts: {len(chosen)} methods, {len(plan.tasks)} tasks, {len(seeds)} seeds")
    _run_parts(plan, folder, shared.absolute() if shared else folder, runs, listener, deadline)
    if not all(part.is_done(folder) for parts in runs for part in parts):
        listener.note(f"stopped after the given time; the same command continues with the parts left in {folder}")
        return None
    return [read_result(plan, folder, parts) for parts in runs]


def _stages(plan: Plan, method: str) -> list[int]:
    # The generalist never changes, and before the first task all methods are the generalist.
    return [0] if method == "generalist" else list(range(1, len(plan.tasks) + 1))


def _run_parts(
    plan: Plan, folder: Path, shared: Path, runs: list[list[Part]], listener: Listener, deadline: float | None
) -> None:
    """Run the parts that are missing: those of one run in order, as many runs at a time as Ray has CPUs for."""
    import ray

    config = plan.config(0).fit
    most_at_once = max(1, int(ray.cluster_resources().get("CPU", 1) // config.cpus_per_worker))
    remote = as_fit_worker(run_part, config)
    remaining = [[part for part in parts if not part.is_done(folder)] for parts in runs]
    total = sum(map(len, runs))
    done = total - sum(map(len, remaining))
    pending: dict[Any, int] = {}
    failed: list[Exception] = []
    is_first_round = True
    listener.progress("parts", done, total)
    try:
        while True:
            is_late = deadline is not None and time.monotonic() > deadline and not is_first_round
            for run, parts in enumerate(remaining):
                if parts and run not in pending.values() and len(pending) < most_at_once and not is_late:
                    pending[remote.remote(plan, folder, shared, parts[0])] = run
            is_first_round = False
            if not pending:
                break
            ready, _ = ray.wait(list(pending), timeout=1)
            for ref in ready:
                run = pending.pop(ref)
                part = remaining[run].pop(0)
                try:
                    result_of(ref)
                except (SeeError, ray.exceptions.RayError) as error:  # the other runs continue
                    listener.note(f"{part.method} failed after {part.stage} tasks, seed {part.seed}: {error}")
                    failed.append(error)
                    remaining[run].clear()
                    continue
                done += 1
                listener.progress("parts", done, total, f"{part.method} after {part.stage} tasks, seed {part.seed}")
    finally:
        for ref in pending:
            ray.cancel(ref)
    if failed:
        raise failed[0]


def run_part(plan: Plan, folder: Path, shared: Path, part: Part) -> None:
    """Learn one more task with a method, answer all test queries, and write the part's file."""
    if part.is_done(folder):
        return
    set_threads(plan.config(part.seed).fit)
    experiment = _experiment(plan, part.seed, shared)
    before = Part(part.seed, part.method, part.stage - 1)
    state = before.read(folder)["state"] if before.is_done(folder) else {}
    if part.stage:
        result = METHODS[part.method](experiment, part.stage - 1, state)
    else:
        result = generalist(experiment, 0, {})
    scores = _score(experiment, result)
    write_json(part.path(folder), asdict(result) | {"scores": mean_scores(scores), "each": scores})


_experiment = functools.lru_cache(maxsize=1)(Experiment)
"""The experiment of this process, kept from one part to the next."""


def _score(experiment: Experiment, result: StageResult) -> QueryScores:
    """Scores of the tasks' test queries, each answered by the fit that the method gives it to."""
    own = [index for index, query in enumerate(experiment.queries) if query.owner is not None]
    texts: dict[int, str] = {}
    for key in dict.fromkeys(result.answerers[index] for index in own):
        indices = [index for index in own if result.answerers[index] == key]
        fit = None if key is None else experiment.load_fit(key)
        prompts = [experiment.queries[index].prompt for index in indices]
        texts |= zip(indices, experiment.answers(prompts, fit), strict=True)
    return scores_by_task(
        (experiment.queries[index].source, texts[index], experiment.queries[index].reference) for index in own
    )


def read_result(plan: Plan, folder: Path, parts: Sequence[Part]) -> Result:
    """The result of one method and seed, from the files of all its parts."""
    seed, method = parts[0].seed, parts[0].method
    data = read_data(plan, seed)
    if method == "generalist":
        stages = [parts[0].read(folder)] * (len(plan.tasks) + 1)
    else:
        stages = [part.read(folder) for part in (Part(seed, "generalist", 0), *parts)]
    last = stages[-1]
    routes: list[Route] | None = None
    if last["routes"] is not None:
        own = [(name, name) for name, rows in data.tests.items() for _ in rows]
        foreign = [(GENERALIST, source) for source, chats in data.foreign.items() for _ in chats]
        routes = [
            (owner, source, answerer)
            for (owner, source), answerer in zip([*own, *foreign], last["routes"], strict=True)
        ]
    return Result(
        method=method,
        seed=seed,
        tasks=plan.tasks,
        kinds=data.kinds,
        scores=[stage["scores"] for stage in stages],
        routes=routes,
        margins=last["margins"],
        decisions=last["decisions"],
        thresholds=last["thresholds"],
        query_scores=last["each"],
        set_aside={task: reasons for task, reasons in last["state"].get("failed", {}).items() if reasons},
        rows=[stage["rows"] for stage in stages[1:]],
        seconds=[stage["seconds"] for stage in stages[1:]],
    )
