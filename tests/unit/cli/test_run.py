"""Running commands: how fast they start, and what is shown of errors and warnings."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from see_ray.cli.main import main
from see_ray.errors import BadRowsError, StoreError
from see_ray.store.expert_store import ExpertStore

if TYPE_CHECKING:
    from tests.conftest import See, SeeProcess


def test_help_answers_at_once(see_process: SeeProcess) -> None:
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        done = see_process("--help")
        times.append(time.perf_counter() - begun)
        assert done.returncode == 0
        assert done.stdout.startswith("Usage: see ")
    assert statistics.median(times) < 1.0  # 0.2 s where nothing else runs


def test_help_imports_nothing_heavy(root: Path) -> None:
    code = (
        "import sys; from see_ray.cli.main import see; see.main(['learn', '--help'], standalone_mode=False); "
        "print([m for m in ('torch', 'ray', 'transformers', 'pydantic', 'rich', 'httpx', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\n[]\n")


@pytest.mark.parametrize("words", ["", "learn", "eval", "serve", "ask", "route", "demo", "experts", "experts list"])
def test_every_command_has_help(see: See, words: str) -> None:
    code, out, _ = see(*words.split(), "--help")
    assert code == 0
    assert out.startswith(f"Usage: see {words}".rstrip())
    assert "..." not in out.replace("[ARGS]...", "")  # no summary is cut short


# --- errors -------------------------------------------------------------------------------------


def test_an_error_is_one_line_and_exit_code_1(see_process: SeeProcess) -> None:
    done = see_process("experts", "list", "--store", "ftp://somewhere")
    assert done.returncode == 1
    assert done.stderr.startswith("error: cannot open the expert store ftp://somewhere")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEE_DEBUG", "1")
    with pytest.raises(StoreError):
        main(["experts", "list", "--store", "ftp://somewhere"])


def test_a_misspelt_setting_is_named(see: See) -> None:
    code, _, err = see("experts", "list", "--set", "store.ulr=/tmp/x")
    assert (code, err) == (1, "error: the configuration is not valid: store.ulr: no such setting\n")


def test_a_misspelt_key_of_the_file_is_named(see: See, tmp_path: Path) -> None:
    (tmp_path / "see.yaml").write_text("serve:\n  prot: 80\n")
    code, _, err = see("experts", "list", "--config", str(tmp_path / "see.yaml"))
    assert code == 1
    assert "serve.prot: no such setting" in err


def test_an_option_wins_over_the_file(see: See, tmp_path: Path) -> None:
    (tmp_path / "see.yaml").write_text("store:\n  url: ftp://from-file\n")
    config = ["--config", str(tmp_path / "see.yaml")]
    assert "ftp://from-file" in see("experts", "list", *config)[2]
    assert "ftp://from-set" in see("experts", "list", *config, "--set", "store.url=ftp://from-set")[2]
    assert "ftp://from-option" in see("experts", "list", *config, "--store", "ftp://from-option")[2]


def test_a_name_that_yaml_takes_for_a_number_stays_a_name(
    see: See, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no experts in" in see("experts", "list", "--store", "2024")[1]
    assert (tmp_path / "2024").is_dir()


def test_a_bound_of_a_setting_holds_for_its_option(see: See) -> None:
    code, _, err = see("serve", "--port", "70000")
    assert code == 1
    assert "serve.port" in err


def test_wrong_usage_is_exit_code_2(see: See) -> None:
    code, _, err = see("learn")
    assert code == 2
    assert "Missing argument 'SOURCE'" in err


def test_bad_rows_keep_their_lines(see: See, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> None:
        raise BadRowsError("2 bad rows:\n  a.jsonl:1: blank\n  a.jsonl:2: blank", (("a", "b"),))

    monkeypatch.setattr(ExpertStore, "open", refuse)
    assert see("experts", "list")[2] == "error: 2 bad rows:\n  a.jsonl:1: blank\n  a.jsonl:2: blank\n"


# --- warnings ------------------------------------------------------------------------------------


def test_a_renamed_setting_is_one_line_on_stderr(see_process: SeeProcess, tmp_path: Path) -> None:
    done = see_process("experts", "list", "--store", str(tmp_path), "--set", "serve.pass_tokens=64")
    assert done.returncode == 0
    assert done.stderr == (
        "warning: the setting pass_tokens is now called max_num_batched_tokens; pass_tokens is read until version 0.3\n"
    )


def test_a_warning_of_another_library_is_shown_as_python_does(root: Path) -> None:
    code = (
        "import click, warnings; from see_ray.cli.run import run; "
        "run(click.Command('c', callback=lambda: warnings.warn('of others', FutureWarning)), [])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "FutureWarning: of others" in done.stderr
