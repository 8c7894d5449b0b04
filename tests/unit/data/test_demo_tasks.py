"""The demo's data: deterministic, disjoint, balanced, and in the promised formats."""

import json
import re
from collections import Counter
from datetime import date

import pytest

from see_ray.data.demo_tasks import DemoTask, demo_tasks, general_questions, unseen_queries

QUEUES = {"billing", "shipping", "returns", "account", "technical"}


@pytest.fixture(scope="module")
def tasks() -> dict[str, DemoTask]:
    return {task.name: task for task in demo_tasks()}


def _input(row: dict[str, str]) -> str:
    return row["prompt"].split("\n", 1)[1]  # without the instruction


def test_tasks_arrive_in_order(tasks: dict[str, DemoTask]) -> None:
    assert list(tasks) == ["contacts", "dates", "tickets"]


def test_same_seed_same_rows() -> None:
    assert demo_tasks(20, 5, seed=3) == demo_tasks(20, 5, seed=3)
    assert unseen_queries(5, seed=3) == unseen_queries(5, seed=3)


def test_another_seed_gives_other_rows() -> None:
    for one, other in zip(demo_tasks(20, 5, seed=0), demo_tasks(20, 5, seed=1), strict=True):
        assert one.train != other.train
    assert unseen_queries(5, seed=0) != unseen_queries(5, seed=1)


def test_sizes_are_as_asked() -> None:
    for task in demo_tasks(rows=33, test_rows=7):
        assert (len(task.train), len(task.test)) == (33, 7)
    assert len(unseen_queries(12)) == 12


def test_asking_for_more_rows_than_there_are_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("see_ray.data.demo_tasks._TICKETS", {"account": ("I forgot my password.",)})
    for name in ("_OPENINGS", "_CLOSINGS"):
        monkeypatch.setattr(f"see_ray.data.demo_tasks.{name}", ("",))
    with pytest.raises(ValueError, match="1 different rows; 10 were asked for"):
        demo_tasks(rows=8, test_rows=2)


def test_no_test_input_occurs_in_training(tasks: dict[str, DemoTask]) -> None:
    for task in tasks.values():
        inputs = [_input(row) for row in task.train + task.test]
        assert len(set(inputs)) == len(inputs)


def test_rows_are_short(tasks: dict[str, DemoTask]) -> None:
    for task in tasks.values():
        for row in task.train + task.test:
            assert set(row) == {"prompt", "response"}
            assert len(row["prompt"]) <= 250
            assert 0 < len(row["response"]) <= 110
            assert row["response"] == row["response"].strip()
    assert all(len(query) <= 250 for query in unseen_queries(50))


def test_every_task_is_asked_for_in_several_ways(tasks: dict[str, DemoTask]) -> None:
    for task in tasks.values():
        assert len({row["prompt"].split("\n", 1)[0] for row in task.train}) == 3


def test_contacts_are_compact_json_of_what_the_text_says(tasks: dict[str, DemoTask]) -> None:
    for row in tasks["contacts"].train + tasks["contacts"].test:
        contact = json.loads(row["response"])
        assert list(contact) == ["name", "phone", "email"]
        assert all(value in row["prompt"] for value in contact.values())
        assert row["response"] == json.dumps(contact, separators=(",", ":"))


def test_contacts_belong_to_nobody(tasks: dict[str, DemoTask]) -> None:
    for row in tasks["contacts"].train + tasks["contacts"].test:
        contact = json.loads(row["response"])
        assert re.fullmatch(r"\d{3}-555-01\d\d", contact["phone"])
        assert re.fullmatch(r"[a-z.0-9]+@example\.(com|org|net)", contact["email"])


def test_dates_are_iso_dates_and_amounts(tasks: dict[str, DemoTask]) -> None:
    for split in (tasks["dates"].train, tasks["dates"].test):
        amounts = [row for row in split if re.fullmatch(r"[A-Z]{3} \d+\.\d\d", row["response"])]
        dates = [row for row in split if row not in amounts]
        assert len(amounts) == len(dates)
        for row in dates:
            day = date.fromisoformat(row["response"])
            assert str(day.year) in row["prompt"]
            assert str(day.day) in row["prompt"]


def test_amounts_keep_their_digits(tasks: dict[str, DemoTask]) -> None:
    for row in tasks["dates"].train + tasks["dates"].test:
        if row["response"][0].isalpha():
            assert re.sub(r"\D", "", _input(row)) == re.sub(r"\D", "", row["response"])


def test_dates_hold_plain_spaces_only(tasks: dict[str, DemoTask]) -> None:
    for row in tasks["dates"].train + tasks["dates"].test:
        assert not re.search(r"[^\S \n]|[\u00a0\u202f]", row["prompt"])


def test_queues_are_balanced_in_both_splits(tasks: dict[str, DemoTask]) -> None:
    for split in (tasks["tickets"].train, tasks["tickets"].test):
        counts = Counter(row["response"] for row in split)
        assert set(counts) == QUEUES
        assert max(counts.values()) - min(counts.values()) <= 1


def test_tickets_have_no_open_slot(tasks: dict[str, DemoTask]) -> None:
    assert not [row for row in tasks["tickets"].train + tasks["tickets"].test if re.search(r"[{}]", row["prompt"])]


def test_general_questions_are_forty_different_ones(tasks: dict[str, DemoTask]) -> None:
    questions = general_questions()
    assert len(questions) == len(set(questions)) == 40
    instructions = {row["prompt"].split("\n", 1)[0] for task in tasks.values() for row in task.train}
    assert not instructions & set(questions)
