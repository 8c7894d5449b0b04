"""A candidate on its way into the sequence, with a real store and made-up decisions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from see_ray.admission import newcomers
from see_ray.admission.candidate import Candidate
from see_ray.admission.publication import Publication
from see_ray.config import Config
from see_ray.data.prepared import Prepared
from see_ray.data.reconstruct import Reconstruction
from see_ray.data.task import Task
from see_ray.errors import GateError
from see_ray.fit.report import Comparison
from see_ray.models.activation import Activation
from see_ray.models.base_model import BaseModel
from see_ray.progress import Listener
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef, Manifest

BETTER = Comparison(rows=4, expert_loss=0.5, generalist_loss=2.0, change=9.0, seconds=1.0)


@pytest.fixture
def base(tmp_path: Path) -> BaseModel:
    return BaseModel("tiny", tmp_path, "f" * 64)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config.model_validate({"store": {"url": str(tmp_path / "store")}, "gate": {"max_taken": 0.0}})


@pytest.fixture
def publication(tmp_path: Path, base: BaseModel, config: Config) -> Publication:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    reconstruction = Reconstruction(train=[], own=[], foreign=[], claimed={}, held_out=[], rehearsal=[])
    prepared = Prepared(Task("sa", (), (), ()), base, None, Activation((7,), 1, 8, 9), reconstruction, frozenset())
    return Publication(prepared, folder, config, "sa.jsonl", replace=False, force=False)


@pytest.fixture
def candidate(base: BaseModel) -> Candidate:
    return Candidate([0.9] * 8, [("general", 0.1)] * 8, {}, BETTER, (base.name, base.fingerprint), 0.01)


def joins_once(
    publication: Publication, store: ExpertStore, monkeypatch: pytest.MonkeyPatch, decisions: list[float]
) -> None:
    """Another expert that is published while the candidate is stored; it keeps queries with these decisions."""
    other = replace(publication, prepared=replace(publication.prepared, task=Task("qa", (), (), ())))
    saved = ExpertStore.save

    def save(self: ExpertStore, folder: Path, *, name: str, **fields: Any) -> Manifest:
        manifest = saved(self, folder, name=name, **fields)
        if name == "sa" and not store.head().experts:
            store.publish(saved(self, other.folder, name="qa", **fields).ref)
        return manifest

    monkeypatch.setattr(ExpertStore, "save", save)
    monkeypatch.setattr(newcomers, "kept_queries", lambda store, refs, tokenizer: [("qa", [1])] * len(decisions))
    monkeypatch.setattr(newcomers, "decide", lambda *arguments: [("qa", p) for p in decisions])


def test_an_expert_that_passes_is_live_with_its_report(
    publication: Publication, candidate: Candidate, config: Config
) -> None:
    published = publication.publish(candidate, Listener())
    assert published is not None
    store = ExpertStore.open(config.store.url)
    assert store.head() == published.sequence
    assert [ref.id for ref in published.sequence.experts] == ["sa@1"]
    assert published.manifest.gate == "passed"
    assert published.manifest.threshold == candidate.calibration.threshold == published.calibration.threshold
    assert json.loads(store.read_text(published.manifest.ref, "gate.json"))["passed"]


def test_one_that_fails_is_stored_and_not_live(publication: Publication, candidate: Candidate, config: Config) -> None:
    weak = replace(candidate, comparison=replace(BETTER, expert_loss=3.0))
    with pytest.raises(GateError, match=r"sa@1 is set aside, not live: its loss"):
        publication.publish(weak, Listener())
    store = ExpertStore.open(config.store.url)
    assert store.head().experts == ()
    assert [manifest.gate for manifest in store.experts()] == ["set aside"]


def test_one_that_fails_is_live_by_force(publication: Publication, candidate: Candidate) -> None:
    weak = replace(candidate, comparison=replace(BETTER, expert_loss=3.0))
    published = replace(publication, force=True).publish(weak, Listener())
    assert published is not None
    assert published.manifest.gate == "forced"
    assert published.sequence.forced


def test_an_expert_published_meanwhile_is_decided_on_first(
    publication: Publication, candidate: Candidate, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ExpertStore.open(config.store.url)
    joins_once(publication, store, monkeypatch, [0.3] * 4)
    published = publication.publish(candidate, Listener())
    assert published is not None
    assert [ref.id for ref in published.sequence.experts] == ["qa@1", "sa@2"]  # sa@1 was stored, and never live
    assert published.calibration.foreign == len(candidate.foreign) + 4


def test_an_expert_that_takes_newcomers_for_its_own_is_to_be_fitted_again(
    publication: Publication, candidate: Candidate, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ExpertStore.open(config.store.url)
    joins_once(publication, store, monkeypatch, [0.95] * 4)
    assert publication.publish(candidate, Listener()) is None
    assert [ref.id for ref in store.head().experts] == ["qa@1"]


def test_known_experts_are_not_decided_on(
    publication: Publication, candidate: Candidate, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ExpertStore.open(config.store.url)
    joins_once(publication, store, monkeypatch, [0.95] * 4)
    known = replace(publication.prepared, known=frozenset({ExpertRef(name="qa", version=1).id}))
    assert replace(publication, prepared=known).publish(candidate, Listener()) is not None
