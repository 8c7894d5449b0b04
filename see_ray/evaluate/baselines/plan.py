"""What a comparison runs on: tasks in order, rows, settings; and reading them.

Tasks are `NAME.train.jsonl` and `NAME.test.jsonl` in a folder, or the demo's, which are generated. A seed
draws the training rows, and it seeds the fits; the test rows are the same for all seeds.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from see_ray.config import Config, load_config
from see_ray.data.demo_tasks import demo_tasks, general_questions, unseen_queries
from see_ray.data.general_queries import Chat
from see_ray.data.rows import Row
from see_ray.data.task import Task, read_task
from see_ray.errors import ConfigError, TaskError
from see_ray.evaluate.answer_scores import KINDS, kind_of
from see_ray.evaluate.batch_inference import write_json

ORDERS = {
    "order10": "qa qg sa sum trans dsg expl para pe pos",
    "order1": "qa qg sa sum trans",
    "order2": "trans sa qa sum qg",
    "order3": "sum qg trans qa sa",
}
"""Orders of SuperNI tasks that SSR (arXiv 2402.01830) uses, by name."""

DEMO_TASKS = ("contacts", "dates", "tickets")
GENERAL_QUESTIONS = "general questions"
UNSEEN = "sorting cities"


@dataclass(frozen=True)
class Plan:
    """One comparison.

    Attributes:
        data: folder of the tasks; None for the demo's.
        tasks: names in order of arrival.
        foreign: tasks that nobody learns; their test rows should reach the generalist.
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
        """The configuration of one seed; reconstruction may hold out all of `eval_rows`."""
        own = [f"fit.seed={seed}", f"reconstruct.max_eval_rows={self.eval_rows}"]
        return load_config(None, [*own, *self.settings])


@dataclass(frozen=True)
class Data:
    """What a plan's tasks hold for one seed.

    Attributes:
        tasks: in order; train and eval rows.
        tests: test rows by task.
        foreign: queries of nobody's task, by where they come from.
        kinds: the kind of score of each task.
    """

    tasks: tuple[Task, ...]
    tests: dict[str, tuple[Row, ...]]
    foreign: dict[str, tuple[Chat, ...]]
    kinds: dict[str, str]


def keep(plan: Plan, folder: Path) -> None:
    """Write the plan beside its parts, so that nobody goes on with another one there.

    Raises:
        ConfigError: the folder holds parts of another plan.
    """
    path, body = folder / "plan.json", json.loads(json.dumps(asdict(plan)))
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if different := [name for name in body if body[name] != found.get(name)]:
            values = ", ".join(f"{name} {found.get(name)!r} (now {body[name]!r})" for name in different)
            raise ConfigError(f"{folder} holds parts of a comparison with {values}; name another folder")
    else:
        write_json(path, body)


def read(plan: Plan, seed: int) -> Data:
    """Read a plan's rows for one seed.

    Raises:
        TaskError, ConfigError: a task is missing or too small; an unknown metric.
    """
    if plan.metric not in (*KINDS, "auto"):
        raise ConfigError(f"the metric is {plan.metric!r}; expected auto, {', '.join(KINDS)}")
    general = {GENERAL_QUESTIONS: tuple(_as_chat(text) for text in general_questions()[: plan.test_rows])}
    wanted = plan.rows + plan.eval_rows
    tasks, tests, foreign = [], {}, {}
    if plan.data is None:
        made = {task.name: task for task in demo_tasks(rows=2 * wanted, test_rows=plan.test_rows)}
        for name in plan.tasks:
            if name not in made:
                raise TaskError(f"the demo has no task {name}; it has {', '.join(made)}; or name a folder of tasks")
            tasks.append(_drawn(name, [_as_row(row, name) for row in made[name].train], plan, seed))
            tests[name] = tuple(_as_row(row, f"{name} test") for row in made[name].test)
        foreign = {UNSEEN: tuple(_as_chat(text) for text in unseen_queries(plan.test_rows))}
    else:
        for name in plan.tasks:
            tasks.append(_drawn(name, read_rows(Path(plan.data) / f"{name}.train.jsonl"), plan, seed))
            tests[name] = tuple(read_rows(Path(plan.data) / f"{name}.test.jsonl")[: plan.test_rows])
        for name in plan.foreign:
            rows = read_rows(Path(plan.data) / f"{name}.test.jsonl")[: plan.test_rows]
            foreign[name] = tuple(row.messages for row in rows)
    kinds = {
        name: kind_of([row.response for row in rows]) if plan.metric == "auto" else plan.metric
        for name, rows in tests.items()
    }
    return Data(tuple(tasks), tests, foreign | general, kinds)


def read_rows(path: Path) -> list[Row]:
    """All rows of a file, in its order."""
    task = read_task(path)
    rows = [*task.train, *task.eval]
    return sorted(rows, key=lambda row: int(row.where.rpartition(":")[2].rpartition(" ")[2]))


def _drawn(name: str, rows: list[Row], plan: Plan, seed: int) -> Task:
    """Train and eval rows of one seed: different prompts, so that no eval row was fitted on."""
    different = list({row.prompt: row for row in rows}.values())
    wanted = plan.rows + plan.eval_rows
    if len(different) < wanted:
        raise TaskError(f"{name} has {len(different)} different training rows; {wanted} are wanted, so take fewer rows")
    drawn = random.Random(f"{name} {seed}").sample(different, wanted)
    return Task(name, tuple(drawn[: plan.rows]), tuple(drawn[plan.rows :]), ())


def _as_row(row: dict[str, str], where: str) -> Row:
    return Row((("user", row["prompt"]),), row["response"], where)


def _as_chat(text: str) -> Chat:
    return [{"role": "user", "content": text}]
