"""What a comparison of methods runs on: tasks in order, rows and settings.

Tasks are `NAME.train.jsonl` and `NAME.test.jsonl` in a folder, or the generated ones of the demo. A seed draws the
training rows and seeds the fits; the test rows are the same for all seeds.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from see_ray.config import Config, load_config
from see_ray.data.demo_tasks import demo_tasks, unseen_queries
from see_ray.data.general_queries import Chat
from see_ray.data.rows import Row
from see_ray.data.task import Task
from see_ray.errors import ConfigError, TaskError
from see_ray.evaluate.answer_scores import KINDS, kind_of
from see_ray.evaluate.queries import GENERAL_QUESTIONS, as_chat, general_chats, read_rows
from see_ray.evaluate.result_cache import write_json

ORDERS = {
    "order10": "qa qg sa sum trans dsg expl para pe pos",
    "order1": "qa qg sa sum trans",
    "order2": "trans sa qa sum qg",
    "order3": "sum qg trans qa sa",
}
"""Orders of SuperNI tasks that SSR (arXiv 2402.01830) uses, by name."""

DEMO_TASKS = ("contacts", "dates", "tickets")
UNSEEN = "sorting cities"
"""Source of the demo's foreign queries: a task that no method learns."""


@dataclass(frozen=True)
class Plan:
    """One comparison.

    Attributes:
        data: folder of the tasks; None for the demo's.
        tasks: names in order of arrival.
        foreign: tasks that no method learns; their test rows should reach the generalist.
        rows: training rows of each task, the same for every method.
        eval_rows: held-out rows of each task, on which experts are calibrated.
        test_rows: test rows of each task.
        max_tokens: longest answer.
        metric: the kind of score in R, or `auto`: by each task's references.
        settings: `section.field=value` of the configuration, for all methods.
    """

    data: str | None
    tasks: tuple[str, ...]
    foreign: tuple[str, ...]
    rows: int
    eval_rows: int
    test_rows: int
    max_tokens: int
    metric: str
    settings: tuple[str, ...]

    def config(self, seed: int) -> Config:
        """The configuration for one seed; reconstruction may hold out all of `eval_rows`."""
        defaults = [f"fit.seed={seed}", f"reconstruct.max_eval_rows={self.eval_rows}"]
        return load_config(None, [*defaults, *self.settings])


@dataclass(frozen=True)
class PlanData:
    """The rows of a plan for one seed.

    Attributes:
        tasks: in order of arrival, with train and eval rows.
        tests: test rows by task.
        foreign: foreign queries by source.
        kinds: the kind of score of each task.
    """

    tasks: tuple[Task, ...]
    tests: dict[str, tuple[Row, ...]]
    foreign: dict[str, tuple[Chat, ...]]
    kinds: dict[str, str]


def save_plan(plan: Plan, folder: Path) -> None:
    """Write the plan to the folder of its parts, so that the folder is not used for another plan.

    Raises:
        ConfigError: the folder holds parts of another plan.
    """
    path, body = folder / "plan.json", json.loads(json.dumps(asdict(plan)))
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        if different := [name for name in body if body[name] != saved.get(name)]:
            values = ", ".join(f"{name} {saved.get(name)!r} (now {body[name]!r})" for name in different)
            raise ConfigError(f"{folder} holds parts of a comparison with {values}; name another folder")
    else:
        write_json(path, body)


def read_data(plan: Plan, seed: int) -> PlanData:
    """Read a plan's rows for one seed.

    Raises:
        TaskError: a task is missing or too small.
        ConfigError: the metric is unknown.
    """
    if plan.metric not in (*KINDS, "auto"):
        raise ConfigError(f"the metric is {plan.metric!r}; expected auto, {', '.join(KINDS)}")
    source = _DemoTasks(plan) if plan.data is None else _TaskFolder(plan, Path(plan.data))
    tasks = tuple(_draw(name, source.train_rows(name), plan, seed) for name in plan.tasks)
    tests = {name: source.test_rows(name) for name in plan.tasks}
    foreign = source.foreign() | {GENERAL_QUESTIONS: tuple(general_chats(plan.test_rows))}
    kinds = {
        name: kind_of([row.response for row in rows]) if plan.metric == "auto" else plan.metric
        for name, rows in tests.items()
    }
    return PlanData(tasks, tests, foreign, kinds)


class _DemoTasks:
    """The generated tasks of the demo."""

    def __init__(self, plan: Plan):
        self._plan = plan
        rows = 2 * (plan.rows + plan.eval_rows)
        self._tasks = {task.name: task for task in demo_tasks(rows=rows, test_rows=plan.test_rows)}

    def train_rows(self, name: str) -> list[Row]:
        if name not in self._tasks:
            raise TaskError(f"the demo has no task {name}; it has {', '.join(self._tasks)}; or name a folder of tasks")
        return [_as_row(row, name) for row in self._tasks[name].train]

    def test_rows(self, name: str) -> tuple[Row, ...]:
        return tuple(_as_row(row, f"{name} test") for row in self._tasks[name].test)

    def foreign(self) -> dict[str, tuple[Chat, ...]]:
        return {UNSEEN: tuple(as_chat(text) for text in unseen_queries(self._plan.test_rows))}


class _TaskFolder:
    """A folder with `NAME.train.jsonl` and `NAME.test.jsonl`."""

    def __init__(self, plan: Plan, folder: Path):
        self._plan, self._folder = plan, folder

    def train_rows(self, name: str) -> list[Row]:
        return read_rows(self._folder / f"{name}.train.jsonl")

    def test_rows(self, name: str) -> tuple[Row, ...]:
        return tuple(read_rows(self._folder / f"{name}.test.jsonl")[: self._plan.test_rows])

    def foreign(self) -> dict[str, tuple[Chat, ...]]:
        return {name: tuple(row.messages for row in self.test_rows(name)) for name in self._plan.foreign}


def _draw(name: str, rows: list[Row], plan: Plan, seed: int) -> Task:
    """Draw train and eval rows with different prompts, so that no eval row is fitted on."""
    different = list({row.prompt: row for row in rows}.values())
    count = plan.rows + plan.eval_rows
    if len(different) < count:
        raise TaskError(f"{name} has {len(different)} different training rows; {count} are wanted, so take fewer rows")
    drawn = random.Random(f"{name} {seed}").sample(different, count)
    return Task(name, tuple(drawn[: plan.rows]), tuple(drawn[plan.rows :]), ())


def _as_row(row: dict[str, str], where: str) -> Row:
    return Row((("user", row["prompt"]),), row["response"], where)
