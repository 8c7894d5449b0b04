"""Results kept in files, so that an interrupted evaluation continues where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from see_ray.models.cache import write_atomically

Prompt = Sequence[int]
T = TypeVar("T")


def cached_by_prompt(path: Path, prompts: Sequence[Prompt], compute: Callable[[list[Prompt]], list[T]]) -> list[T]:
    """One result for each prompt: read from a file if it is there, else computed and added to the file.

    Args:
        path: a JSON file for one expert and one kind of result. Processes that share it wait for each other.
        prompts: token ids.
        compute: gets the prompts that are missing, without duplicates.
    """
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    keys = [digest(list(prompt)) for prompt in prompts]
    with FileLock(f"{path}.lock"):
        results: dict[str, T] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in results}
        if missing:
            results |= zip(missing, compute(list(missing.values())), strict=True)
            write_json(path, results)
    return [results[key] for key in keys]


def digest(value: Any) -> str:
    """16 hexadecimal digits that identify a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path: Path, body: Any) -> None:
    """Write a JSON file atomically: readers find all of it or nothing."""
    write_atomically(path, json.dumps(body, indent=1) + "\n")
