"""The notebook example of the README, as it stands there, in a process and on a Ray of its own."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from see_ray.data.demo_tasks import DemoTask

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = re.search(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def with_settings(code: str, more: Sequence[str]) -> str:
    """The code with `more` settings behind those that it names, so that its fit is small and its port is free."""
    changed, count = re.subn(r"load_config\(None, \[(.*?)\]\)", rf"load_config(None, [\1, *{list(more)!r}])", code)
    assert count == 1
    return changed


@pytest.mark.timeout(600)
def test_the_notebook_example_learns_a_task_and_asks_the_endpoint(
    tmp_path: Path, tasks: dict[str, DemoTask], general_file: Path, fast_settings: list[str]
) -> None:
    assert EXAMPLE is not None
    rows = "".join(json.dumps(row) + "\n" for row in tasks["tickets"].train[:24])
    (tmp_path / "tickets.jsonl").write_text(rows, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    own = [f"serve.port={port}", f"reconstruct.general_negatives_file={general_file}", "fit.num_train_epochs=1"]
    code = with_settings(EXAMPLE[1], [*fast_settings, "serve.trace_sample_rate=0", "serve.spare=false", *own])
    # A small fit need not be good: it is published whatever the gate says.
    code = code.replace('learn("tickets.jsonl", config)', 'learn("tickets.jsonl", config, force=True)')
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=500,
        env=os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("tickets@1 ")], lines
    assert [line for line in lines if "'expert': 'tickets'" in line], lines
