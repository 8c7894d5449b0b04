"""The documents say what is: commands, targets, links, settings and modules that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from see_ray.cli.main import see
from see_ray.config import Config

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].strip() for line in re.findall(r"^    (see .*)$", README, re.MULTILINE)]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_in_the_readme_is_one_that_see_understands(command: Any) -> None:
    words = shlex.split(command)[1:]
    group: click.Command = see
    while isinstance(group, click.Group) and words:
        found = group.get_command(click.Context(group), words[0])
        assert found is not None, f"see has no command {words[0]}"
        group, words = found, words[1:]
    group.make_context(group.name, words)  # raises for an unknown option or a missing argument


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\bmake ([a-z-]+)", README))))
def test_a_make_target_in_the_readme_exists(target: Any) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Any) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_the_settings_in_the_readme_are_valid() -> None:
    shown = re.findall(r"^    ((?:base_model|fit|store|serve|reconstruct|calibrate): \{.*\})$", README, re.MULTILINE)
    assert len(shown) >= 3
    Config.model_validate(yaml.safe_load("\n".join(shown)))


def test_the_architecture_page_names_every_module() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "see_ray").rglob("*.py"):
        if path.stem != "__init__":
            assert f"`{path.stem}`" in page, path.stem
