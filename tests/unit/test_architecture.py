"""Guards: which modules import Ray and torch, the size of modules, and the pins."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "see_ray"

IMPORTS_RAY = {
    "cli.demo",
    "cluster",
    "data.general_sampling",
    "evaluate.baselines.compare",
    "fit.launch",
    "fit.status",
    "fit.trainer",
    "observability.metrics",
    "observability.tracing",
    "pipeline",
    "serving.deployer",
    "serving.endpoint",
    "serving.ensemble",
    "serving.http_errors",
    "serving.ingress",
    "serving.replica",
    "serving.topology",
}  # fmt: skip
IMPORTS_TORCH_AT_ONCE = {
    "engine.attention", "engine.engine", "engine.forward_batch", "engine.kernels", "engine.kv_cache", "engine.lora",
    "engine.model_runner", "engine.prefix_cache", "engine.requests", "engine.sampling", "engine.scheduler",
    "engine.vllm.engine", "fit.deepspeed_config", "fit.held_out", "fit.loss", "fit.memory", "fit.optimizer_state",
    "fit.prefix_cache", "fit.rank_batches", "fit.rank_model", "fit.trainer", "models.attention_override",
    "models.prefix_kv",
}  # fmt: skip

LEFTOVERS = {"utils", "util", "common", "helpers", "helper", "manager", "types", "misc"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def statements(node: ast.AST, at_once: bool) -> Iterator[ast.AST]:
    """The nodes of a module; `at_once`: those that run when it is imported."""
    for child in ast.iter_child_nodes(node):
        if at_once and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_once and isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from statements(child, at_once)


def imported(source: str, package: str = "see_ray", at_once: bool = False) -> set[str]:
    """Dotted names that a module's source imports; `from a import b` counts as `a` and as `a.b`."""
    names: set[str] = set()
    for node in statements(ast.parse(source), at_once):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            names |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return names


def imports_of(name: str, at_once: bool = False) -> set[str]:
    path = MODULES[name]
    package = ".".join(("see_ray", *path.relative_to(PACKAGE).parent.parts))
    return imported(path.read_text(encoding="utf-8"), package, at_once)


def own(names: set[str]) -> set[str]:
    """Those of some imported names that are modules of see_ray, named as in ORDER."""
    found = {name.removeprefix("see_ray.") for name in names if name.startswith("see_ray.")}
    return found & set(MODULES)


def outside(names: set[str]) -> set[str]:
    """Top-level packages among imported names."""
    return {name.split(".")[0] for name in names}


# --- packages: `lint-imports` holds their order ------------------------------------------------


@pytest.mark.parametrize("name", [name for name in MODULES if name and MODULES[name].name == "__init__.py"])
def test_a_package_imports_nothing_by_itself(name: Any) -> None:
    assert imports_of(name) == set()


# --- Ray and torch -------------------------------------------------------------------------


def test_ray_is_imported_only_where_it_is_used() -> None:
    assert {name for name in MODULES if "ray" in outside(imports_of(name))} <= IMPORTS_RAY


def test_torch_is_imported_at_once_only_where_it_computes() -> None:
    found = {name for name in MODULES if {"torch", "deepspeed", "peft"} & outside(imports_of(name, at_once=True))}
    assert found <= IMPORTS_TORCH_AT_ONCE


def test_nothing_imports_torch_at_once_through_another_module() -> None:
    reached = {
        (name, other)
        for name in set(MODULES) - IMPORTS_TORCH_AT_ONCE
        for other in own(imports_of(name, at_once=True)) & IMPORTS_TORCH_AT_ONCE
    }
    assert reached == set()


def test_the_command_line_starts_without_what_takes_long_to_import() -> None:
    slow = "{'ray', 'torch', 'transformers', 'deepspeed', 'peft', 'datasets', 'fastapi', 'obstore', 'pydantic'}"
    code = f"import sys, see_ray.cli.main; print(*sorted({slow} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# --- modules -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_at_most_500_lines(name: Any) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= 500


def test_no_module_is_a_drawer_of_leftovers() -> None:
    assert [name for name in MODULES if LEFTOVERS & set(re.split(r"[._]", name))] == []


@pytest.mark.parametrize("name", [name for name in MODULES if MODULES[name].name != "__init__.py"])
def test_a_module_opens_with_what_it_is(name: Any) -> None:
    assert ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8")))


# --- pins ----------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = [line for line in constraint_lines() if "==" in line]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def constraint_lines() -> list[str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return [line for line in lines if line]


def requirements() -> list[Requirement]:
    """What `make setup` installs: the dependencies and the dev extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]


def ray_versions(text: str) -> list[str]:
    """Versions of Ray that a file under cluster/ names: image tags and KubeRay's rayVersion."""
    tags = re.findall(r"rayproject/ray[\w-]*:([\w.${}-]+)", text)
    return [tag.partition("-")[0] for tag in tags] + re.findall(r"rayVersion:\s*[\"']?([\w.]+)", text)


def test_ray_has_one_version_in_the_pin_and_in_every_image() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), version)
        for path in sorted((ROOT / "cluster").rglob("*"))
        if path.is_file()
        for version in ray_versions(path.read_text(encoding="utf-8", errors="replace"))
    }
    assert {(path, version) for path, version in found if version != pins()["ray"]} == set()


def test_versions_of_ray_are_found_in_the_forms_that_files_have() -> None:
    text = """
    image: rayproject/ray:2.59.0
    image: "rayproject/ray-ml:2.58.1-py311-cpu"
    FROM docker.io/rayproject/ray:2.57.0-py311
    image: rayproject/ray:latest
    rayVersion: '2.56.0'
    """
    assert ray_versions(text) == ["2.59.0", "2.58.1", "2.57.0", "latest", "2.56.0"]


@pytest.mark.parametrize("requirement", requirements(), ids=lambda requirement: requirement.name)
def test_every_dependency_has_a_pin_that_satisfies_it(requirement: Any) -> None:
    assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)])


def test_torch_is_pinned_to_the_version_without_a_build_tag() -> None:
    assert "torch==2.13.0" in constraint_lines()


def test_constraints_are_exact_pins_that_name_no_host_and_no_build() -> None:
    exact = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*==[0-9][0-9a-z.]*")
    assert [line for line in constraint_lines() if not exact.fullmatch(line)] == []


def test_no_package_is_pinned_twice() -> None:
    assert len(pins()) == len(constraint_lines())


# --- the guards themselves -----------------------------------------------------------------


def test_all_forms_of_import_are_seen() -> None:
    source = """
import a.b
from see_ray import config, errors
from . import client
from .engine import lora
if TYPE_CHECKING:
    import c
class C:
    import d
    def f(self):
        import e
try:
    from f import g
except ImportError:
    pass
"""
    found = imported(source)
    assert {"a.b", "c", "d", "e", "f", "see_ray.config", "see_ray.errors", "see_ray.client"} <= found
    assert "see_ray.engine.lora" in found
    assert outside(found) - outside(imported(source, at_once=True)) == {"c", "e"}


def test_relative_imports_in_a_package_below_are_seen() -> None:
    assert "see_ray.models.prefix_kv" in imported("from ..models.prefix_kv import forward", package="see_ray.engine")
    assert "see_ray.engine.lora" in imported("from .lora import AdapterBank", package="see_ray.engine")
