"""A comparison of methods: parts that run as Ray tasks side by side, each one file, and what they add up to.

    parts/<seed>/<method>/<step>.json      one method after one more task: who answers what, and the scores
    <base model>/adapters/, asked/, synthesized/
                                           what parts share; found again by whoever needs the same. It may lie in
                                           a folder for several comparisons: everything is named by all that makes
                                           it, and orders that begin alike have fits in common

Step 0 is the system before the first task, the same for all. A part that is there is not run again, so an
interrupted comparison goes on where it was. The steps of one method follow each other; methods and seeds run
beside each other, as many as Ray has room for. All nodes must see the folder.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from see_ray.cluster import as_fit_worker, result_of
from see_ray.errors import ConfigError, SeeError
from see_ray.evaluate.answer_scores import each_score, mean_scores
from see_ray.evaluate.baselines.experiment import Workbench, set_threads
from see_ray.evaluate.baselines.methods import METHODS, Step, generalist
from see_ray.evaluate.baselines.plan import Plan, keep, read
from see_ray.evaluate.batch_inference import write_json
from see_ray.evaluate.results import EachScore, Result
from see_ray.progress import Listener
from see_ray.routing.chain import GENERALIST


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
        plan: what to run on; kept in `folder`, which takes no other.
        methods: names of METHODS; the generalist is always among them.
        seeds: one run of each method for each.
        folder: of the comparison.
        listener: hears how far the whole is.
        shared: where fits and answers are kept, if not in `folder`, for other comparisons to find.
        stop_after_s: start no part after so many seconds, save the first ones, to go on later.

    Returns:
        A result for each method and seed; None if parts are left.

    Raises:
        ConfigError: an unknown method, or the folder holds another plan.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise ConfigError(f"there is no method {unknown[0]}; methods are {', '.join(METHODS)}")
    folder = folder.absolute()
    shared = shared.absolute() if shared else folder
    chosen = [name for name in METHODS if name in {*methods, "generalist"}]
    keep(plan, folder)
    for seed in seeds:
        read(plan, seed)  # what is wrong with the data is said before anything long begins
    chains = [(seed, method, _steps(plan, method)) for seed in seeds for method in chosen]
    total = sum(len(steps) for *_, steps in chains)
    left = [[(seed, method, step) for step in steps if not _path(folder, seed, method, step).is_file()]
            for seed, method, steps in chains]  # fmt: skip
    began = time.monotonic()
    listener.step(f"{total} parts: {len(chosen)} methods, {len(plan.tasks)} tasks, {len(seeds)} seeds")
    _run(plan, folder, shared, left, total, listener, None if stop_after_s is None else began + stop_after_s)
    if any(not _path(folder, seed, method, step).is_file() for seed, method, steps in chains for step in steps):
        listener.note(f"out of time; the same command goes on with what is left in {folder}")
        return None
    return [collected(plan, folder, seed, method) for seed, method, _ in chains]


def _run(
    plan: Plan, folder: Path, shared: Path, left: list[list[tuple[int, str, int]]], total: int,
    listener: Listener, until: float | None,
) -> None:  # fmt: skip
    """Run chains of parts: within one, one after another; else as many at once as Ray has CPUs for."""
    import ray

    config = plan.config(0).fit
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1) // config.cpus_per_worker))
    work = as_fit_worker(run_part, config)
    done = total - sum(map(len, left))
    pending: dict[Any, int] = {}
    failed: list[Exception] = []
    first_round = True
    listener.progress("parts", done, total)
    try:
        while True:
            for number, chain in enumerate(left):
                late = until is not None and time.monotonic() > until and not first_round
                if chain and number not in pending.values() and len(pending) < at_once and not late:
                    pending[work.remote(plan, folder, shared, *chain[0])] = number
            first_round = False
            if not pending:
                break
            ready, _ = ray.wait(list(pending), timeout=1)
            for ref in ready:
                number = pending.pop(ref)
                seed, method, step = left[number].pop(0)
                try:
                    result_of(ref)
                except (SeeError, ray.exceptions.RayError) as error:  # the other methods go on
                    listener.note(f"{method} failed after {step} tasks, seed {seed}: {error}")
                    failed.append(error)
                    left[number].clear()
                    continue
                done += 1
                listener.progress("parts", done, total, f"{method} after {step} tasks, seed {seed}")
    finally:
        for ref in pending:
            ray.cancel(ref)
    if failed:
        raise failed[0]


def _steps(plan: Plan, method: str) -> list[int]:
    # The generalist stays as it is; and nobody has learned anything before the first task.
    return [0] if method == "generalist" else list(range(1, len(plan.tasks) + 1))


def _path(folder: Path, seed: int, method: str, step: int) -> Path:
    return folder / "parts" / str(seed) / method / f"{step}.json"


def run_part(plan: Plan, folder: Path, shared: Path, seed: int, method: str, step: int) -> None:
    """One method after one more task: learn it, ask all test queries, and keep the scores."""
    path = _path(folder, seed, method, step)
    if path.is_file():
        return
    set_threads(plan.config(seed).fit)
    bench = _bench(plan, seed, shared)
    before = _path(folder, seed, method, step - 1)
    state = json.loads(before.read_text(encoding="utf-8"))["state"] if before.is_file() else {}
    made = METHODS[method](bench, step - 1, state) if step else generalist(bench, 0, {})
    each = _scores(bench, made)
    write_json(path, asdict(made) | {"scores": mean_scores(each), "each": each})


_bench = functools.lru_cache(maxsize=1)(Workbench)
"""What a process keeps from one part to the next."""


def _scores(bench: Workbench, made: Step) -> EachScore:
    """Scores of each task's test queries, as this step's answerers answer them."""
    own = [number for number, query in enumerate(bench.queries) if query.owner is not None]
    texts: dict[int, str] = {}
    for key in dict.fromkeys(made.answerers[number] for number in own):
        mine = [number for number in own if made.answerers[number] == key]
        fit = None if key is None else bench.found(key)
        texts |= zip(mine, bench.answers([bench.queries[number].prompt for number in mine], fit), strict=True)
    return each_score((bench.queries[n].source, texts[n], bench.queries[n].reference) for n in own)


def collected(plan: Plan, folder: Path, seed: int, method: str) -> Result:
    """The parts of one method and seed as one result."""
    data = read(plan, seed)
    parts = [
        json.loads(_path(folder, seed, *where).read_text(encoding="utf-8"))
        for where in [("generalist", 0), *((method, step) for step in _steps(plan, method) if step)]
    ]
    if method == "generalist":
        parts *= len(plan.tasks) + 1
    last = parts[-1]
    routes = None
    if last["routes"] is not None:
        own = [(name, name) for name, rows in data.tests.items() for _ in rows]
        foreign = [(GENERALIST, source) for source, chats in data.foreign.items() for _ in chats]
        routes = [(*side, who) for side, who in zip([*own, *foreign], last["routes"], strict=True)]
    return Result(
        method=method,
        seed=seed,
        tasks=plan.tasks,
        kinds=data.kinds,
        scores=[part["scores"] for part in parts],
        routes=routes,
        margins=last["margins"],
        decisions=last["decisions"],
        thresholds=last["thresholds"],
        set_aside={task: why for task, why in last["state"].get("failed", {}).items() if why},
        each=last["each"],
        rows=[part["rows"] for part in parts[1:]],
        seconds=[part["seconds"] for part in parts[1:]],
    )
