"""General queries from the configured file or the cache; sampling needs Ray and is tested with `learn`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from see_ray.config import BaseModelConfig, Config, FitConfig, ReconstructConfig
from see_ray.data.general_queries import general_cache, write_cache
from see_ray.data.general_sampling import load_or_sample_general
from see_ray.models.base_model import BaseModel
from see_ray.progress import Listener


class Notes(Listener):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, title: str) -> None:
        raise AssertionError(f"nothing is to be sampled here: {title}")


@pytest.fixture
def base(tmp_path: Path) -> Any:
    return BaseModel("base", tmp_path, "f00d" * 16)


def chats(count: Any) -> Any:
    return [[{"role": "user", "content": f"query {number}"}] for number in range(count)]


def config(tmp_path: Path, negatives: Any, file: Any = None) -> Any:
    return Config(
        base_model=BaseModelConfig(cache_dir=tmp_path / "cache"),
        reconstruct=ReconstructConfig(general_negatives=negatives, general_negatives_file=file),
        fit=FitConfig(seed=3),
    )


def written(tmp_path: Path, count: Any) -> Any:
    path = tmp_path / "general.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats(count)))
    return path


def test_none_are_needed_without_general_negatives(base: BaseModel, tmp_path: Path) -> None:
    assert load_or_sample_general(base, config(tmp_path, 0), Notes()) == []


def test_a_file_is_read_whole(base: BaseModel, tmp_path: Path) -> None:
    listener = Notes()
    assert load_or_sample_general(base, config(tmp_path, 4, written(tmp_path, 9)), listener) == chats(9)
    assert listener.notes == []


def test_a_file_with_too_few_is_read_with_a_note(base: BaseModel, tmp_path: Path) -> None:
    listener = Notes()
    assert load_or_sample_general(base, config(tmp_path, 4, written(tmp_path, 5)), listener) == chats(5)
    (note,) = listener.notes
    assert "holds 5 general queries of the 6 needed" in note


def test_the_cache_of_the_base_model_and_seed_is_taken(base: BaseModel, tmp_path: Path) -> None:
    wanted = config(tmp_path, 4)
    write_cache(general_cache(base, wanted.base_model, 3), chats(8))
    assert load_or_sample_general(base, wanted, Notes()) == chats(6)


def test_another_seed_does_not_take_that_cache(base: BaseModel, tmp_path: Path) -> None:
    wanted = config(tmp_path, 4)
    write_cache(general_cache(base, wanted.base_model, 4), chats(8))
    with pytest.raises(AssertionError, match="Sampling 6 general queries"):
        load_or_sample_general(base, wanted, Notes())
