"""What an expert keeps beside its adapter: written, stored and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from see_ray.config import Config, load_config
from see_ray.data.rows import Row
from see_ray.errors import NotFoundError
from see_ray.models.activation import Activation
from see_ray.store.expert_files import MOST_KEPT, activation_of_manifest, kept_chats, write_expert_files
from see_ray.store.expert_store import ExpertStore

FIELDS: dict[str, Any] = {
    "name": "sa", "task": "sa.jsonl", "base_model": "embedded", "fingerprint": "f00d", "form": "activated",
    "activation_tokens": 2, "generation_prompt": (1, 2, 3), "indicator_tokens": (17, 18), "threshold": 0.5,
    "metrics": {}, "r": 16,
}  # fmt: skip
REHEARSAL = [[{"role": "user", "content": "eine Zeile\nund noch eine \u2028 日本"}]]
CALIBRATION = {"threshold": 0.5, "own_accepted": 1.0}


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    folder = tmp_path / "adapter"
    folder.mkdir()
    return folder


def rows(count: Any) -> Any:
    return [Row((("system", "S"), ("user", f"query {n}")), f"answer {n}", "made up") for n in range(count)]


def write(folder: Any, held_out: Any = (), config: Config | None = None) -> None:
    write_expert_files(
        folder, config=config or Config(), calibration=CALIBRATION, rehearsal=REHEARSAL, held_out=list(held_out)
    )


def saved(folder: Any, tmp_path: Path, **fields: Any) -> Any:
    store = ExpertStore.open(tmp_path / "store")
    return store, store.save(folder, **(FIELDS | fields))


def test_kept_queries_are_read_back_as_written(folder: Any, tmp_path: Path) -> None:
    write(folder, rows(3))
    store, manifest = saved(folder, tmp_path)
    rehearsal, held_out = kept_chats(store, manifest.ref)
    assert rehearsal == REHEARSAL
    assert held_out == [row.messages for row in rows(3)]


def test_held_out_rows_keep_their_responses(folder: Any) -> None:
    write(folder, rows(2))
    lines = (folder / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["response"] for line in lines] == ["answer 0", "answer 1"]


def test_only_the_first_held_out_rows_are_kept(folder: Any, tmp_path: Path) -> None:
    write(folder, rows(MOST_KEPT + 3))
    store, manifest = saved(folder, tmp_path)
    assert kept_chats(store, manifest.ref)[1] == [row.messages for row in rows(MOST_KEPT)]


def test_the_configuration_that_made_it_reads_back(folder: Any) -> None:
    config = load_config(None, ["fit.r=7"])
    write(folder, config=config)
    assert load_config(folder / "config.yaml") == config


def test_the_calibration_is_json(folder: Any) -> None:
    write(folder)
    assert json.loads((folder / "calibration.json").read_text(encoding="utf-8")) == CALIBRATION


def test_an_expert_without_kept_queries_is_named(folder: Any, tmp_path: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    store, manifest = saved(folder, tmp_path)
    with pytest.raises(NotFoundError, match=r"sa@1 has no file rehearsal\.jsonl"):
        kept_chats(store, manifest.ref)


@pytest.mark.parametrize(("form", "tokens"), [("activated", 2), ("full", None)])
def test_the_activation_is_that_of_the_manifest(folder: Any, tmp_path: Path, form: str, tokens: int | None) -> None:
    write(folder)
    _, manifest = saved(folder, tmp_path, form=form, activation_tokens=tokens)
    assert activation_of_manifest(manifest) == Activation((1, 2, 3), tokens, accept=17, refuse=18)
