"""`see demo`: three tasks arrive one after another at a live endpoint, which is then evaluated over HTTP.

The endpoint runs while experts are fitted with Ray Train and DeepSpeed; each expert joins it without a restart.
Experts in the demo's folder are kept, so that a second run continues where the first one stopped.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import click

from see_ray import client, cluster
from see_ray.cli import render
from see_ray.config import Config, load_config
from see_ray.data.demo_tasks import DemoTask, demo_tasks, general_questions, unseen_queries
from see_ray.errors import ServingError
from see_ray.pipeline import Source, learn
from see_ray.progress import Listener
from see_ray.routing.chain import GENERALIST
from see_ray.store.expert_store import ExpertStore

T = TypeVar("T")

EVAL_ROWS = 14
TEST_ROWS = 16
GENERAL_QUERIES, UNSEEN_QUERIES = 24, 12
"""General questions, and queries of a task that no expert has learned, that are sent."""

MAX_TOKENS = {"contacts": 44, "dates": 20, "tickets": 12}
"""Limit of an answer to each task, above the length of every reference."""

LIVE_WITHIN_S = 60
"""Seconds that a published expert may take to be served."""

SETTINGS = [
    "reconstruct.general_negatives=28",
    "reconstruct.mixed_negatives=0",  # learning to pass on these takes more rows than the demo has
    "gate.min_own_accepted=0.5",  # of 14 rows
    "reconstruct.max_eval_rows=14",
    "fit.train_batch_size=8",
]
"""Less work than the defaults, for minutes on two cores."""

EFFORT = {"contacts": (1.0, 2), "dates": (1.0, 3), "tickets": (1.7, 3)}
"""Factor on the number of rows, and epochs, of each task. Rows with short answers cost less and teach less."""


@dataclass(frozen=True)
class Outcome:
    """Scores on one task's test rows, each a share from 0 to 1.

    Attributes:
        task: its name.
        generalist, expert, routed: exact match of the generalist's, the expert's and the routed answers.
        routed_right: share of the rows that reached the expert.
    """

    task: str
    generalist: float
    expert: float
    routed: float
    routed_right: float


def run_demo(folder: Path, rows: int, listener: Listener) -> int:
    """Run the demo; returns the exit code 0 once every expert is learned and evaluated.

    Args:
        folder: where tasks, experts and the report are kept.
        rows: training rows of each task.
        listener: receives progress.
    """
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    tasks = demo_tasks(math.ceil(max(factor for factor, _ in EFFORT.values()) * rows) + EVAL_ROWS, TEST_ROWS)
    _write_tasks(folder, tasks, rows)
    places = [f"store.url={folder / 'experts'}", f"fit.tracking_dir={folder / 'runs'}", f"serve.port={_free_port()}"]
    config = load_config(None, [*places, *SETTINGS])

    from see_ray.serving import endpoint  # imports Ray Serve

    listener.step("Starting Ray and the endpoint")
    started_ray = cluster.connect()
    background = ThreadPoolExecutor(1)  # the first task is prepared while the endpoint starts
    url_future = background.submit(endpoint.start, config)
    seconds["start"] = time.perf_counter() - started
    try:
        for task in tasks:
            seconds[task.name] = _learn(task, folder, config, url_future, listener)
        url = url_future.result()
        outcomes, seconds["ask tasks"] = _timed(lambda: [_ask_task(task, url, listener) for task in tasks])
        (general, unseen), seconds["ask others"] = _timed(lambda: _ask_others(url, listener))
    finally:
        background.shutdown()
        endpoint.stop()
        if started_ray:
            cluster.disconnect()
    seconds["in all"] = time.perf_counter() - started
    click.echo(_report(outcomes, general, unseen, seconds))
    _save(folder, outcomes, general, unseen, seconds)
    return 0


# --- learning ----------------------------------------------------------------------------------


def _write_tasks(folder: Path, tasks: Sequence[DemoTask], rows: int) -> None:
    for task in tasks:
        task_folder = folder / "tasks" / task.name
        task_folder.mkdir(parents=True, exist_ok=True)
        train_rows = math.ceil(EFFORT[task.name][0] * rows)
        splits = {
            task_folder / "train.jsonl": task.train[EVAL_ROWS:][:train_rows],
            task_folder / "eval.jsonl": task.train[:EVAL_ROWS],
            folder / "tasks" / f"{task.name}.test.jsonl": task.test,  # not where learning reads
        }
        for path, split in splits.items():
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in split), encoding="utf-8")


def _learn(task: DemoTask, folder: Path, config: Config, url_future: Future[str], listener: Listener) -> float:
    """Learn a task, and wait until the endpoint serves its expert; returns the seconds."""
    started = time.perf_counter()
    store = ExpertStore.open(config.store.url)
    if task.name in [ref.name for ref in store.head().experts]:
        listener.step(f"Task {task.name} ({task.title}) was learned before")
    else:
        listener.step(f"Task {task.name} arrives: {task.title}")
        fit = config.fit.model_copy(update={"num_train_epochs": EFFORT[task.name][1]})
        source = Source(str(folder / "tasks" / task.name), name=task.name)
        learned = learn(source, config.model_copy(update={"fit": fit}), listener=listener)
        listener.note(f"{learned.manifest.id} is published, accepts from P(accept) {learned.manifest.threshold:.2f}")
    url = url_future.result()
    published = time.perf_counter()
    while task.name not in _live(url):
        if time.perf_counter() - published > LIVE_WITHIN_S:
            raise ServingError(f"{task.name} did not become live within {LIVE_WITHIN_S} s: {client.health(url)}")
        time.sleep(0.5)
    listener.note(f"live at {url} {time.perf_counter() - published:.0f} s later")
    return time.perf_counter() - started


def _live(url: str) -> list[str]:
    return [expert["name"] for expert in client.health(url)["experts"]]


# --- asking ------------------------------------------------------------------------------------


def _ask_task(task: DemoTask, url: str, listener: Listener) -> Outcome:
    """Score the generalist, the expert and the routed endpoint on a task's test rows."""
    listener.step(f"Asking the {len(task.test)} test rows of {task.name}")
    prompts = [row["prompt"] for row in task.test]
    references = [row["response"].strip() for row in task.test]

    def ask(prompts: list[str], model: str) -> list[tuple[str, str]]:
        on_done = partial(listener.progress, "asking") if model == "see" else lambda done, total: None
        return client.ask_all(url, prompts, model=model, max_tokens=MAX_TOKENS[task.name], on_done=on_done)

    with ThreadPoolExecutor() as pool:  # the two are answered by different replicas
        generalist_future = pool.submit(ask, prompts, "see:generalist")
        routed, generalist = ask(prompts, "see"), generalist_future.result()
    # A routed answer by the expert is the answer that it gives when named. Only the rest is asked again, by name.
    misrouted = [i for i, (_, answered_by) in enumerate(routed) if answered_by != task.name]
    expert = [text for text, _ in routed]
    for i, (text, _) in zip(misrouted, ask([prompts[i] for i in misrouted], f"see:{task.name}"), strict=True):
        expert[i] = text

    def exact_match(answers: list[str]) -> float:
        hits = [answer.strip() == reference for answer, reference in zip(answers, references, strict=True)]
        return sum(hits) / len(hits)

    return Outcome(
        task=task.name,
        generalist=exact_match([text for text, _ in generalist]),
        expert=exact_match(expert),
        routed=exact_match([text for text, _ in routed]),
        routed_right=1 - len(misrouted) / len(references),
    )


def _ask_others(url: str, listener: Listener) -> tuple[float, float]:
    """Shares of general questions, and of an unseen task's queries, that reach the generalist."""
    listener.step("Asking general questions and queries of a task that no expert learned")

    def generalist_share(prompts: list[str], title: str) -> float:
        answered_by = client.route_all(url, prompts, on_done=partial(listener.progress, title))
        return answered_by.count(GENERALIST) / len(prompts)

    return (
        generalist_share(general_questions()[:GENERAL_QUERIES], "general questions"),
        generalist_share(unseen_queries()[:UNSEEN_QUERIES], "unseen task"),
    )


# --- the report --------------------------------------------------------------------------------


def _report(outcomes: list[Outcome], general: float, unseen: float, seconds: dict[str, float]) -> str:
    rows = [
        [o.task, *(f"{100 * share:.0f} %" for share in (o.generalist, o.expert, o.routed, o.routed_right))]
        for o in outcomes
    ]
    head = ["task", "generalist's score", "expert's score", "routed score", "routed right"]
    times = "\n".join(f"  {name:<12}{value:6.0f} s" for name, value in seconds.items())
    return (
        f"\nexact match on held-out rows\n{render.table(head, rows)}\n\n"
        f"general questions that reached the generalist   {100 * general:.0f} %\n"
        f"queries of an unseen task that did              {100 * unseen:.0f} %\n\n"
        f"time of each step\n{times}"
    )


def _save(folder: Path, outcomes: list[Outcome], general: float, unseen: float, seconds: dict[str, float]) -> None:
    report = {
        "tasks": [outcome.__dict__ for outcome in outcomes],
        "general_to_generalist": general,
        "unseen_to_generalist": unseen,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def _free_port() -> int:
    """The default port if it is free, else another one."""
    for port in (8000, 0):
        try:
            with socket.create_server(("127.0.0.1", port)) as server:
                return int(server.getsockname()[1])
        except OSError:
            continue
    raise ServingError("no free TCP port on 127.0.0.1")
