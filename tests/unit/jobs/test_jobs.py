"""The scripts in jobs/: how long they are, and what they are called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

JOBS = Path(__file__).parents[3] / "jobs"
SHORT = ["learn", "serve", "evaluate", "experiments/autoscale"]

IS_INSTALLED = """
import importlib.util, sys
print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name)))
"""


@pytest.mark.parametrize("job", SHORT)
def test_a_job_parses_calls_and_prints(job: Any) -> None:
    assert len((JOBS / f"{job}.py").read_text().splitlines()) <= 52


@pytest.mark.parametrize("folder", ["benchmarks", "experiments"])
def test_a_module_beside_a_script_takes_no_installed_packages_name(folder: str, tmp_path: Path) -> None:
    """Python finds what lies beside a script before installed packages: a `vllm.py` would hide vLLM."""
    names = {path.stem for path in (JOBS / folder).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    command = [sys.executable, "-I", "-c", IS_INSTALLED, *sorted(names), "pytest"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pytest"]  # which is installed: the check sees what it looks for
