"""Command line options and JSON reports that the benchmarks share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

settings_option = click.option(
    "--set", "settings", multiple=True, metavar="SECTION.FIELD=VALUE", help="Change one setting. Repeatable."
)
out_option = click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")


def data_option(*, required: bool = True) -> Callable[[F], F]:
    folder = click.Path(exists=True, path_type=Path)
    return click.option("--data", type=folder, required=required, help="Folder of NAME.train.jsonl, NAME.test.jsonl.")


class Names(click.ParamType):  # type: ignore[type-arg]
    """Strings, separated by commas; an empty text is no string."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        return value if isinstance(value, list) else [item for item in value.split(",") if item]


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers, separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(item) for item in value.split(",") if item]
        except ValueError:
            self.fail(f"{value!r} is not a list of whole numbers such as 1,5,10", param, ctx)


def write_json(report: Any, path: Path | None) -> None:
    """Write a report, if a path is given; benchmarks call it after every cell, so that an interruption loses little."""
    if path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
