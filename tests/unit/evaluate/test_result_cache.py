"""Results are computed once for each prompt, and kept in a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from see_ray.evaluate.result_cache import cached_by_prompt, digest, write_json


def test_only_missing_prompts_are_computed_each_once(tmp_path: Path) -> None:
    computed: list[list[int]] = []

    def lengths(missing: list[Sequence[int]]) -> list[int]:
        computed.extend(map(list, missing))
        return [len(prompt) for prompt in missing]

    path = tmp_path / "asked" / "lengths.json"
    assert cached_by_prompt(path, [(1, 2), (3,), (1, 2)], lengths) == [2, 1, 2]
    assert computed == [[1, 2], [3]]
    assert cached_by_prompt(path, [[3], [4, 5, 6]], lengths) == [1, 3]
    assert computed == [[1, 2], [3], [4, 5, 6]]


def test_a_failed_computation_keeps_what_was_there(tmp_path: Path) -> None:
    def fail(missing: list[Sequence[int]]) -> list[str]:
        raise RuntimeError("no")

    path = tmp_path / "results.json"
    cached_by_prompt(path, [[1]], lambda missing: ["a"])
    with pytest.raises(RuntimeError):
        cached_by_prompt(path, [[1], [2]], fail)
    assert cached_by_prompt(path, [[1]], fail) == ["a"]


def test_a_key_does_not_depend_on_the_order_of_fields() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_writing_leaves_no_other_file(tmp_path: Path) -> None:
    write_json(tmp_path / "folder" / "x.json", [1])
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["x.json"]
    assert json.loads((tmp_path / "folder" / "x.json").read_text()) == [1]
