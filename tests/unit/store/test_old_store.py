"""A store that version 0.1 wrote: it opens, reads, and can be published to. See tests/data/README.md."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from see_ray.config import Config, load_config
from see_ray.errors import StoreError
from see_ray.models.activation import Activation
from see_ray.store.expert_files import activation_of_manifest, kept_chats
from see_ray.store.expert_store import ExpertStore
from see_ray.store.records import ExpertRef

STORE = Path(__file__).parents[2] / "data" / "store-0.1"
IDS = ["sa@1", "qa@1", "sa@2", "pe@1"]


@pytest.fixture
def store() -> ExpertStore:
    return ExpertStore.open(STORE)


@pytest.fixture
def copy(tmp_path: Path) -> ExpertStore:
    return ExpertStore.open(shutil.copytree(STORE, tmp_path / "store"))


def ref(text: str) -> ExpertRef:
    name, _, version = text.partition("@")
    return ExpertRef(name=name, version=int(version))


def test_the_head_is_the_last_version(store: ExpertStore) -> None:
    head = store.head()
    assert (head.version, head.change, head.forced) == (5, "roll back to 2", False)
    assert [expert.id for expert in head.newest_first()] == ["qa@1", "sa@1"]


def test_the_history_reads_back(store: ExpertStore) -> None:
    assert [([expert.id for expert in past.experts], past.change, past.forced) for past in store.history()] == [
        (["sa@1"], "publish sa@1", False),
        (["sa@1", "qa@1"], "publish qa@1", True),
        (["qa@1", "sa@2"], "publish sa@2 in place of sa@1", False),
        (["sa@2"], "remove qa@1", False),
        (["sa@1", "qa@1"], "roll back to 2", False),
    ]


def test_what_was_live_at_a_time_is_found(store: ExpertStore) -> None:
    assert store.at(store.sequence(3).created_at).version == 3


def test_the_manifests_read_back(store: ExpertStore) -> None:
    assert [manifest.id for manifest in store.experts()] == IDS
    sa, qa, pe = (store.manifest(ref(text)) for text in ("sa@1", "qa@1", "pe@1"))
    assert (sa.gate, qa.gate, pe.gate) == ("passed", "forced", "set aside")
    assert (sa.task, sa.base_model, sa.fingerprint, sa.r) == ("sa.jsonl", "embedded", "f00d" * 16, 2)
    assert sa.threshold == 0.6753335112129679
    assert sa.metrics["gate_gain"] == 1.0
    assert len(pe.gate_failed) == 1


def test_the_activation_of_both_forms_reads_back(store: ExpertStore) -> None:
    assert activation_of_manifest(store.manifest(ref("sa@1"))) == Activation((1, 9690, 198), 1, accept=3, refuse=4)
    assert activation_of_manifest(store.manifest(ref("qa@1"))).tokens is None


@pytest.mark.parametrize("text", IDS)
def test_the_digests_of_all_files_hold(store: ExpertStore, tmp_path: Path, text: Any) -> None:
    folder = store.fetch(ref(text), tmp_path)
    assert (folder / "adapter_model.safetensors").stat().st_size == 136


@pytest.mark.parametrize("text", IDS)
def test_the_kept_queries_read_back(store: ExpertStore, text: Any) -> None:
    name = text.partition("@")[0]
    rehearsal, held_out = kept_chats(store, ref(text))
    assert [chat[-1]["content"] for chat in rehearsal] == [f"{name} rehearsal {i}" for i in range(2)]
    assert [chat[-1]["content"] for chat in held_out] == [f"{name} query {i}: größer?\u2028日本" for i in range(4)]


def test_the_reports_read_back(store: ExpertStore) -> None:
    assert json.loads(store.read_text(ref("pe@1"), "gate.json"))["passed"] is False
    assert json.loads(store.read_text(ref("sa@1"), "calibration.json"))["own"] == 4
    assert store.read_text(ref("sa@1"), "gate.md").startswith("# Gate: passed")


@pytest.mark.parametrize("text", IDS)
@pytest.mark.filterwarnings("ignore:the setting:FutureWarning")
def test_the_configurations_load(store: ExpertStore, tmp_path: Path, text: Any) -> None:
    config = load_config(store.fetch(ref(text), tmp_path) / "config.yaml")
    assert (config.fit.r, config.fit.target_modules) == (2, ("q_proj",))
    assert config.fit.form == store.manifest(ref(text)).form


@pytest.mark.filterwarnings("ignore:the setting:FutureWarning")
def test_settings_under_their_old_names_keep_their_values(store: ExpertStore, tmp_path: Path) -> None:
    config = load_config(store.fetch(ref("sa@2"), tmp_path) / "config.yaml")
    assert config.fit.max_tokens_per_micro_batch == 4096
    assert config.serve.max_num_batched_tokens == 256
    assert (config.serve.look_back_period_s, config.serve.trace_sample_rate) == (10, 0.5)


@pytest.mark.filterwarnings("ignore:the setting:FutureWarning")
def test_the_default_configuration_of_0_1_is_that_of_today(tmp_path: Path) -> None:
    assert load_config(STORE.parent / "config-0.1.yaml") == Config()


def test_the_default_configuration_of_0_1_warns_of_every_renamed_setting() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_config(STORE.parent / "config-0.1.yaml")
    renamed = sorted(str(warning.message).split()[2] for warning in caught)
    assert renamed == ["look_back_s", "pass_tokens", "pass_tokens", "traced_share"]


def test_an_old_store_is_published_to(copy: ExpertStore, tmp_path: Path) -> None:
    """On a copy: a new version of an old expert, and the next sequence version."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    old = copy.manifest(ref("sa@2"))
    fields = old.model_dump(exclude={"format", "version", "created_at", "files", "name"})
    new = copy.save(folder, name="sa", **fields)
    assert new.id == "sa@3"
    assert [expert.id for expert in copy.publish(new.ref, replace=True).experts] == ["qa@1", "sa@3"]
    reopened = ExpertStore.open(copy.url)
    assert [past.version for past in reopened.history()] == [1, 2, 3, 4, 5, 6]
    assert reopened.manifest(ref("sa@2")) == old
    assert [expert.id for expert in reopened.roll_back(3).experts] == ["qa@1", "sa@2"]


def test_an_edited_file_of_an_old_store_is_noticed(copy: ExpertStore, tmp_path: Path) -> None:
    (Path(copy.url) / "experts/sa/1/config.yaml").write_text("fit: {r: 3}\n")
    with pytest.raises(StoreError, match=r"config\.yaml is corrupt"):
        copy.fetch(ref("sa@1"), tmp_path)
