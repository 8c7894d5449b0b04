"""The reference pages say what the code has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from see_ray.cli import reference
from see_ray.cli.run import run
from see_ray.config import Config, Section


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `python -m see_ray.cli.reference`; gives exit code and stderr."""

    def check(*args: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            run(reference.main, list(args))
        return int(ended.value.code or 0), capsys.readouterr().err

    return check


@pytest.mark.parametrize("name", reference.pages())
def test_a_page_is_current(name: Any, root: Path) -> None:
    path = root / "docs" / "reference" / name
    assert path.read_text(encoding="utf-8") == reference.pages()[name], f"run: {reference.COMMAND}"


def test_what_was_written_is_current(check: Any, tmp_path: Path) -> None:
    assert check("--dir", str(tmp_path)) == (0, "")
    assert check("--dir", str(tmp_path), "--check") == (0, "")


@pytest.mark.parametrize("name", ["cli.md", "settings.md"])
def test_a_page_that_is_out_of_date_is_named_with_the_command(check: Any, tmp_path: Path, name: str) -> None:
    check("--dir", str(tmp_path))
    (tmp_path / name).write_text("old")
    code, err = check("--dir", str(tmp_path), "--check")
    assert code == 1
    assert f"{tmp_path / name} is out of date; run: python -m see_ray.cli.reference" in err
    assert (tmp_path / name).read_text() == "old"  # a check writes nothing


def test_every_command_is_on_its_page() -> None:
    page = reference.cli_page()
    for command in ("see", "see learn", "see eval", "see serve", "see ask", "see experts", "see experts rollback"):
        assert f"## `{command}`\n" in page
        assert f"Usage: {command} " in page


def test_every_setting_is_on_its_page() -> None:
    page = reference.settings_page()
    for section, field in Config.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, Section)
        assert all(f"| `{section}.{name}` |" in page for name in field.annotation.model_fields)


@pytest.mark.parametrize(
    "row",
    [
        "| `fit.r` | `int` ≥ 1, ≤ 512 | `16` | LoRA rank. |",
        "| `fit.lora_dropout` | `float` ≥ 0, < 1 | `0.0` |",
        '| `fit.activation_tokens` | `int \\| "all"` ≥ 1 | `1` |',
        "| `fit.num_workers` | `int \\| tuple[int, int]` | `1` |",
        '| `fit.target_modules` | `str \\| tuple[str, ...]` | `"all-linear"` |',
        "| `fit.deepspeed` | `dict[str, Any]` | `{}` |",
        "| `fit.zero_stage` | `0 \\| 1 \\| 2 \\| 3` | `2` |",
        "| `base_model.max_length` | `int \\| None` ≥ 16 | `None` |",
        "| `serve.max_body_bytes` | `int` ≥ 1000 | `1000000` |",
    ],
)
def test_a_setting_has_type_bounds_and_default(row: str) -> None:
    assert row in reference.settings_page()
