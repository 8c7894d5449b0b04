"""Jobs as processes: their help, how they fail, and what is uploaded with them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path.relative_to(ROOT / "jobs").with_suffix("").as_posix()
    for path in (ROOT / "jobs").rglob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


def run(job: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"jobs/{job}.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local", **environment}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_there_are_scripts_to_check() -> None:
    assert {"learn", "serve", "evaluate", "benchmarks/routing", "experiments/autoscale"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_says_what_it_does(script: Any) -> None:
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize("script", ["experiments/autoscale", "benchmarks/routing"])
def test_a_wrong_setting_is_one_line(script: str) -> None:
    done = run(script, "--set", "fit.rank=3")
    assert done.returncode == 1
    assert done.stderr == "error: the configuration is not valid: fit.rank: no such setting\n"


def test_a_renamed_setting_is_one_line_of_a_job(tmp_path: Path) -> None:
    done = run("experiments/autoscale", "--set", "serve.pass_tokens=64", "--store", str(tmp_path / "none"))
    assert done.returncode == 1  # no such store: nothing is started
    warning, error = done.stderr.splitlines()
    assert warning.startswith("warning: the setting pass_tokens is now called max_num_batched_tokens")
    assert error.startswith("error: the expert store")


@pytest.mark.parametrize(("job", "arguments"), [("learn", ["tickets.jsonl"]), ("serve", [])])
def test_a_submitted_job_refuses_a_store_that_would_be_lost(job: str, arguments: Any) -> None:
    done = run(job, *arguments, RAY_JOB_CONFIG_JSON_ENV_VAR="{}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: store.url is ./experts")
    assert len(done.stderr.splitlines()) == 1


def test_a_cluster_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    """Ray itself looks for five minutes; `run` waits for two."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    task = tmp_path / "tickets.jsonl"
    task.write_text("".join(json.dumps({"prompt": f"{n}?", "response": "yes"}) + "\n" for n in range(40)))
    done = run("learn", str(task), "--store", str(tmp_path / "experts"), RAY_ADDRESS=address)
    assert done.returncode == 1
    assert f"cannot connect to Ray on {address}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the tracked files."""
    tree = tmp_path / "tree"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    return tree


def test_only_what_jobs_need_is_uploaded(tree: Path, tmp_path: Path) -> None:
    """With Ray's own packaging, from a working tree in which people have worked."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    for left in (".venv/lib/torch.so", "experts/a/1/adapter.safetensors", "runs/a/events", "see-demo/x", ".git/pack"):
        (tree / left).parent.mkdir(parents=True, exist_ok=True)
        (tree / left).write_bytes(os.urandom(1000))
    create_package(
        str(tree), tmp_path / "package.zip", include_gitignore=True, excludes=get_runtime_env_default_excludes()
    )
    names = zipfile.ZipFile(tmp_path / "package.zip").namelist()
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {"see_ray", "jobs"}
    assert (tmp_path / "package.zip").stat().st_size < 1_000_000
