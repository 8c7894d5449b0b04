"""The public Python API: what `import see_ray` offers, and how little it takes."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import see_ray

PUBLIC = {"Client", "Config", "Endpoint", "ExpertStore", "errors", "learn", "load_config", "serve"}


def in_a_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_all_lists_the_public_names() -> None:
    assert set(see_ray.__all__) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_public_name_is_there_and_says_what_it_is(name: str) -> None:
    assert inspect.getdoc(getattr(see_ray, name))


def test_a_name_that_is_not_public_is_an_attribute_error_that_names_those_that_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'router'; it has .*ExpertStore"):
        _ = see_ray.router


def test_serve_stays_a_function_after_its_package_is_imported() -> None:
    """A package `see_ray/serve/` would take the function's place as soon as a module of it is imported."""
    code = "import see_ray, see_ray.serving.api_keys, see_ray.fit.report; print(callable(see_ray.serve))"
    assert in_a_new_process(code) == "True"


def test_importing_see_ray_imports_nothing_that_takes_long() -> None:
    slow = "{'ray', 'torch', 'transformers', 'pydantic', 'httpx', 'yaml', 'click', 'asyncio'}"
    assert in_a_new_process(f"import sys, see_ray; print(*({slow} & set(sys.modules)))") == ""


def test_importing_see_ray_takes_under_50_ms() -> None:
    code = "import time; t = time.perf_counter(); import see_ray; print(1000 * (time.perf_counter() - t))"
    assert min(float(in_a_new_process(code)) for _ in range(5)) < 50


def test_the_package_is_typed() -> None:
    assert (Path(see_ray.__file__).parent / "py.typed").is_file()
