"""The real autoscaler, with processes as nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "jobs" / "experiments")])}
"""`loadtest` is found beside a script in jobs/experiments, but not from `python -c`."""

SCRIPT = """
import pathlib, sys, time, ray, psutil
from loadtest.fake_cluster import FakeCluster

def nodes():
    return sum(node["Alive"] for node in ray.nodes()) - 1

def waited(count):
    until = time.monotonic() + 60
    while nodes() != count and time.monotonic() < until:
        time.sleep(0.5)
    return nodes()

with FakeCluster({"CPU": 1}, 2, idle_s=3) as cluster:
    ray.init(address=cluster.address, log_to_driver=False)
    counts = [nodes()]
    go = pathlib.Path(sys.argv[1])

    def work():
        while not go.exists():
            time.sleep(0.1)

    pending = [ray.remote(num_cpus=1)(work).remote() for _ in range(2)]
    counts.append(waited(2))
    go.touch()
    ray.get(pending)
    counts.append(waited(0))
    folder = str(cluster._folder)
    ray.shutdown()
left = [p.pid for p in psutil.process_iter(["cmdline"]) if folder in " ".join(p.info["cmdline"] or [])]
print(counts, left)
"""


@pytest.mark.slow
def test_nodes_come_with_demand_go_when_idle_and_leave_nothing_behind(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "go"],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.splitlines()[-1:] == ["[0, 2, 0] []"], done.stdout + done.stderr[-2000:]


@pytest.mark.slow
def test_a_process_that_is_told_to_end_takes_its_cluster_with_it() -> None:
    script = """
import time
from loadtest.fake_cluster import FakeCluster
with FakeCluster({"CPU": 1}, 1) as cluster:
    print(cluster._folder, flush=True)
    time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        folder = process.stdout.readline().strip()
        assert folder
        assert Path(folder).is_dir()
        process.terminate()
        assert process.wait(timeout=60) != 0
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if folder in " ".join(p.info["cmdline"] or [])]
    assert not left
    assert not Path(folder).exists()
