"""Joining the sequence beside others that joined meanwhile."""

from __future__ import annotations

import json

import pytest

from see_ray.admission import newcomers
from see_ray.admission.calibrate import calibrate
from see_ray.data.reconstruct import Example, Reconstruction
from see_ray.pipeline import Source, learn
from see_ray.progress import Listener
from see_ray.store.expert_files import kept_chats
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef

OWN = [0.9, 0.95, 0.97, 0.99]
FOREIGN = [("general", 0.01), ("general", 0.02)]
RATE = 0.01


def test_newcomers_are_those_not_known(experts, config):
    head = ExpertStore.open(config.store.url).head()
    known = frozenset({"tickets@1"})
    assert [ref.id for ref in newcomers.newcomers(head, known, "other")] == ["dates@1"]
    assert newcomers.newcomers(head, known | {"dates@1"}, "other") == ()


def test_the_one_that_is_replaced_is_no_newcomer(experts, config):
    head = ExpertStore.open(config.store.url).head()
    assert newcomers.newcomers(head, frozenset({"tickets@1"}), "dates") == ()


def test_newcomers_far_from_its_own_queries_change_little():
    before = calibrate(OWN, FOREIGN, RATE)
    after = newcomers.recalibrated(before, OWN, [*FOREIGN, ("new", 0.05)], RATE)
    assert after.own_accepted == 1.0
    assert after.threshold > 0.05


def test_newcomers_nearer_raise_the_threshold():
    before = calibrate(OWN, FOREIGN, RATE)
    after = newcomers.recalibrated(before, OWN, [*FOREIGN, ("new", 0.85)], RATE)
    assert after.threshold > max(0.85, before.threshold)


def test_it_is_fitted_again_if_it_takes_newcomers_for_its_own():
    before = calibrate(OWN, FOREIGN, RATE)
    assert newcomers.recalibrated(before, OWN, [*FOREIGN, ("new", 0.96)], RATE) is None


def test_queries_of_an_expert_are_its_rehearsal_and_its_held_out_rows(experts, config, tokenizer):
    store = ExpertStore.open(config.store.url)
    ref = ExpertRef(name="tickets", version=1)
    rehearsal, held_out = kept_chats(store, ref)
    assert len(rehearsal) == 4
    assert held_out
    assert len(newcomers.queries_of(store, [ref], tokenizer)) == len(rehearsal) + len(held_out)


def test_newcomers_queries_that_are_rows_of_the_task_are_counted_and_left_out():
    own, passed = Example((1, 2), (8, 5), "accept"), Example((3, 4), (9,), "general")
    made = Reconstruction(train=[own, passed], own=[], foreign=[], claimed={}, held_out=[], rehearsal=[])
    queries = [("new", [1, 2]), ("new", [3, 4]), ("newer", [5, 6])]
    left, claimed = newcomers.not_own(queries, made)
    assert left == queries[1:]
    assert claimed == {"new": 1, "newer": 0}


def test_the_base_model_of_the_live_experts_is_that_of_any_other_one(experts, config, base):
    store = ExpertStore.open(config.store.url)
    assert newcomers.base_model_of(store, store.head(), "dates") == (base.name, base.fingerprint)
    assert newcomers.base_model_of(store, store.sequence(1), "tickets") is None


class Meanwhile(Listener):
    """Publishes an expert while another one is fitted."""

    def __init__(self, store: ExpertStore, ref: ExpertRef):
        self.store, self.ref, self.steps = store, ref, []

    def step(self, title: str) -> None:
        self.steps.append(title)
        if title.startswith("Fitting"):
            self.store.publish(self.ref)


@pytest.mark.timeout(600)
def test_the_second_of_two_that_are_fitted_at_once_is_checked_against_the_first(experts, config, tmp_path):
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
        assert f"Reading the queries of {upper.id}, which joined meanwhile" in listener.steps
        own, held_out = kept_chats(store, upper.ref)
        manifest_rows = learned.manifest.metrics["foreign_rows"]
        # tickets' and dates' held-out rows and the general ones were foreign before; all of upper's are now.
        assert manifest_rows >= len(own) + len(held_out) + 4
    finally:
        for name in ("late", "upper"):
            if name in [ref.name for ref in store.head().experts]:
                store.remove(name)
