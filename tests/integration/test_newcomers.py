"""Joining a sequence that other experts joined since the task was prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from see_ray.admission import newcomers
from see_ray.config import Config
from see_ray.models.base_model import BaseModel
from see_ray.pipeline import Source, learn
from see_ray.progress import Listener
from see_ray.store.expert_files import kept_chats
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef

if TYPE_CHECKING:
    from tests.conftest import Fitted


def test_newcomers_are_those_not_known(experts: Fitted, config: Config) -> None:
    head = ExpertStore.open(config.store.url).head()
    known = frozenset({"tickets@1"})
    assert [ref.id for ref in newcomers.newcomers(head, known, "other")] == ["dates@1"]
    assert newcomers.newcomers(head, known | {"dates@1"}, "other") == ()


def test_the_one_that_is_replaced_is_no_newcomer(experts: Fitted, config: Config) -> None:
    head = ExpertStore.open(config.store.url).head()
    assert newcomers.newcomers(head, frozenset({"tickets@1"}), "dates") == ()


def test_queries_of_an_expert_are_its_rehearsal_and_its_held_out_rows(
    experts: Fitted, config: Config, tokenizer: Any
) -> None:
    store = ExpertStore.open(config.store.url)
    ref = ExpertRef(name="tickets", version=1)
    rehearsal, held_out = kept_chats(store, ref)
    assert len(rehearsal) == 4
    assert held_out
    assert len(newcomers.kept_queries(store, [ref], tokenizer)) == len(rehearsal) + len(held_out)


def test_the_base_model_of_the_live_experts_is_that_of_any_other_one(
    experts: Fitted, config: Config, base: BaseModel
) -> None:
    store = ExpertStore.open(config.store.url)
    assert newcomers.live_base_model(store, store.head(), "dates") == (base.name, base.fingerprint)
    assert newcomers.live_base_model(store, store.sequence(1), "tickets") is None


class Meanwhile(Listener):
    """Publishes an expert while another one is fitted."""

    def __init__(self, store: ExpertStore, ref: ExpertRef) -> None:
        self.store, self.ref = store, ref
        self.steps: list[str] = []

    def step(self, title: str) -> None:
        self.steps.append(title)
        if title.startswith("Fitting"):
            self.store.publish(self.ref)


@pytest.mark.timeout(600)
def test_the_second_of_two_that_are_fitted_at_once_is_checked_against_the_first(
    experts: Fitted, config: Config, tmp_path: Path
) -> None:
    """`upper` joins while a task is fitted that has not seen its queries."""
    words = ["lamp", "river", "stone", "cloud", "paper", "green", "table", "bread", "smile", "north", "wheel", "glass"]
    rows = [{"prompt": f"Spell {word} backwards, please.", "response": word[::-1]} for word in words]
    path = tmp_path / "late.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = ExpertStore.open(config.store.url)
    upper = experts.spare["upper"]
    listener = Meanwhile(store, upper.ref)
    try:
        learned = learn(Source(str(path)), config, listener=listener)
        assert [ref.name for ref in learned.sequence.experts] == ["tickets", "dates", "upper", "late"]
        assert f"Deciding on the queries of {upper.id}, published meanwhile" in listener.steps
        own, held_out = kept_chats(store, upper.ref)
        manifest_rows = learned.manifest.metrics["foreign_rows"]
        # tickets' and dates' held-out rows and the general ones were foreign before; all of upper's are now.
        assert manifest_rows >= len(own) + len(held_out) + 4
    finally:
        for name in ("late", "upper"):
            if name in [ref.name for ref in store.head().experts]:
                store.remove(name)
