"""`see demo`: three tasks arrive one after another at a live endpoint, and are asked over HTTP.

Everything is real: the endpoint runs while experts are fitted with Ray Train and DeepSpeed, each
one joins it without a restart, and all answers come through HTTP. What is there already (experts
in the demo's folder) is kept, so a second run goes on where the first one stopped.
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
from typing import Any

from see_ray import client, cluster
from see_ray.cli import render
from see_ray.config import Config, load_config
from see_ray.data.demo_tasks import DemoTask, demo_tasks, general_questions, unseen_queries
from see_ray.errors import ServingError
from see_ray.pipeline import Source, learn
from see_ray.progress import Listener
from see_ray.routing.chain import GENERALIST
from see_ray.store.expert_store import ExpertStore

EVAL_ROWS = 14
TEST_ROWS = 16
OTHERS = 24
"""General questions, and half as many queries of an unseen task, that are asked."""

LONGEST_ANSWER = {"contacts": 44, "dates": 20, "tickets": 12}
"""Tokens of an answer to each task; the right ones are shorter, and a longer one cannot be right."""

LIVE_WITHIN_S = 60

SETTINGS = [
    "reconstruct.general_negatives=28",
    "reconstruct.mixed_negatives=0",  # to tell these apart takes more rows than there are
    "gate.min_own_accepted=0.5",  # of 14 rows
    "reconstruct.max_eval_rows=14",
    "fit.train_batch_size=8",
]
"""Less than by default, to be done within minutes on two cores."""

EFFORT = {"contacts": (1.0, 2), "dates": (1.0, 3), "tickets": (1.7, 3)}
"""Times the rows asked for, and epochs, of each task: the shorter its answers, the less each row
costs and the less it teaches."""


@dataclass(frozen=True)
class Outcome:
    """One task's test rows, as a share from 0 to 1 each."""

    task: str
    generalist: float
    expert: float
    routed: float
    routed_right: float


def run_demo(folder: Path, rows: int, listener: Listener) -> int:
    """Run the demo; returns the exit code: 0 if every expert was learned and asked.

    Args:
        folder: where tasks, experts and the report are kept.
        rows: training rows of each task.
        listener: is told of every step.
    """
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    tasks = demo_tasks(math.ceil(max(times for times, _ in EFFORT.values()) * rows) + EVAL_ROWS, TEST_ROWS)
    _write_tasks(folder, tasks, rows)
    own = [f"store.url={folder / 'experts'}", f"fit.tracking_dir={folder / 'runs'}", f"serve.port={_free_port()}"]
    settings = [*own, *SETTINGS]
    config = load_config(None, settings)

    from see_ray.serving import endpoint  # imports Ray Serve

    listener.step("Starting Ray and the endpoint")
    own_ray = cluster.connect()
    starting = ThreadPoolExecutor(1)  # while the endpoint starts, the first task is prepared
    url_soon = starting.submit(endpoint.start, config)
    seconds["start"] = time.perf_counter() - began
    try:
        for task in tasks:
            seconds[task.name] = _learn(task, folder, config, url_soon, listener)
        url = url_soon.result()
        outcomes, seconds["ask tasks"] = _timed(lambda: [_ask_task(task, url, listener) for task in tasks])
        (general, unseen), seconds["ask others"] = _timed(lambda: _ask_others(url, listener))
    finally:
        starting.shutdown()
        endpoint.stop()
        if own_ray:
            cluster.disconnect()
    seconds["in all"] = time.perf_counter() - began
    print(_report(outcomes, general, unseen, seconds))
    _save(folder, outcomes, general, unseen, seconds)
    return 0


# --- arriving ----------------------------------------------------------------------------------


def _write_tasks(folder: Path, tasks: Sequence[DemoTask], rows: int) -> None:
    for task in tasks:
        home = folder / "tasks" / task.name
        home.mkdir(parents=True, exist_ok=True)
        wanted = math.ceil(EFFORT[task.name][0] * rows)
        train, held_out = task.train[EVAL_ROWS:][:wanted], task.train[:EVAL_ROWS]
        for split, lines in (("train", train), ("eval", held_out), ("test", task.test)):
            # The test rows lie apart from the splits that learning reads.
            path = home / f"{split}.jsonl" if split != "test" else folder / "tasks" / f"{task.name}.test.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in lines), encoding="utf-8")


def _learn(task: DemoTask, folder: Path, config: Config, url_soon: Future[str], listener: Listener) -> float:
    began = time.perf_counter()
    store = ExpertStore.open(config.store.url)
    if task.name in [ref.name for ref in store.head().experts]:
        listener.step(f"Task {task.name} ({task.title}) was learned before")
    else:
        listener.step(f"Task {task.name} arrives: {task.title}")
        fit = config.fit.model_copy(update={"num_train_epochs": EFFORT[task.name][1]})
        source = Source(str(folder / "tasks" / task.name), name=task.name)
        learned = learn(source, config.model_copy(update={"fit": fit}), listener=listener)
        listener.note(f"{learned.manifest.id} is published, accepts from P(accept) {learned.manifest.threshold:.2f}")
    url = url_soon.result()
    published = time.perf_counter()
    while task.name not in _live(url):
        if time.perf_counter() - published > LIVE_WITHIN_S:
            raise ServingError(f"{task.name} did not become live within {LIVE_WITHIN_S} s: {client.health(url)}")
        time.sleep(0.5)
    listener.note(f"live at {url} {time.perf_counter() - published:.0f} s later")
    return time.perf_counter() - began


def _live(url: str) -> list[str]:
    return [expert["name"] for expert in client.health(url)["experts"]]


# --- asking ------------------------------------------------------------------------------------


def _ask_task(task: DemoTask, url: str, listener: Listener) -> Outcome:
    listener.step(f"Asking the {len(task.test)} test rows of {task.name}")
    prompts = [row["prompt"] for row in task.test]
    right = [row["response"].strip() for row in task.test]

    def ask(prompts: list[str], model: str) -> list[tuple[str, str]]:
        told = partial(listener.progress, "asking") if model == "see" else lambda done, total: None
        return client.ask_all(url, prompts, model=model, max_tokens=LONGEST_ANSWER[task.name], on_done=told)

    with ThreadPoolExecutor() as pool:  # each keeps another replica busy
        generalist_asked = pool.submit(ask, prompts, "see:generalist")
        routed, generalist = ask(prompts, "see"), generalist_asked.result()
    # An answer that the expert gave on its own account is what it gives when it is named; the
    # few that went elsewhere are asked for by name.
    astray = [i for i, (_, who) in enumerate(routed) if who != task.name]
    expert = [text for text, _ in routed]
    for i, (text, _) in zip(astray, ask([prompts[i] for i in astray], f"see:{task.name}"), strict=True):
        expert[i] = text

    def score(answers: list[str]) -> float:
        return sum(answer.strip() == wanted for answer, wanted in zip(answers, right, strict=True)) / len(right)

    return Outcome(
        task=task.name,
        generalist=score([text for text, _ in generalist]),
        expert=score(expert),
        routed=score([text for text, _ in routed]),
        routed_right=1 - len(astray) / len(right),
    )


def _ask_others(url: str, listener: Listener) -> tuple[float, float]:
    """Shares of general questions, and of an unseen task's queries, that reach the generalist."""
    listener.step("Asking general questions and queries of a task that nobody learned")

    def to_generalist(prompts: list[str], title: str) -> float:
        told = partial(listener.progress, title)
        return client.route_all(url, prompts, on_done=told).count(GENERALIST) / len(prompts)

    return (
        to_generalist(general_questions()[:OTHERS], "general questions"),
        to_generalist(unseen_queries()[: OTHERS // 2], "unseen task"),
    )


# --- the end -----------------------------------------------------------------------------------


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


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def _free_port() -> int:
    """The default port if nobody has it, else any free one."""
    for port in (8000, 0):
        try:
            with socket.create_server(("127.0.0.1", port)) as server:
                return int(server.getsockname()[1])
        except OSError:
            continue
    raise ServingError("no free TCP port on 127.0.0.1")
