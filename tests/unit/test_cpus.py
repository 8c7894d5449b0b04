"""The number of CPUs that unset thread counts follow."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import Any

import pytest

from see_ray.cpus import available_cpus


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend a machine of 8 CPUs, all of them allowed, in a cgroup with the given `cpu.max`."""
    from joblib.externals.loky.backend import context

    def pretend(cpu_max: str) -> None:
        path = "/sys/fs/cgroup/cpu.max"
        there = os.path.exists
        monkeypatch.delenv("LOKY_MAX_CPU_COUNT", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
        monkeypatch.setattr(os.path, "exists", lambda name: name == path or there(name))
        monkeypatch.setattr(context, "open", lambda name: {path: io.StringIO(cpu_max)}[name], raising=False)

    return pretend


def test_a_container_limit_counts(machine: Any) -> None:
    machine("200000 100000\n")
    assert available_cpus() == 2


def test_a_limit_below_one_cpu_is_one(machine: Any) -> None:
    machine("20000 100000\n")
    assert available_cpus() == 1


def test_without_a_container_limit_all_allowed_cpus_count(machine: Any) -> None:
    machine("max 100000\n")
    assert available_cpus() == 8


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the platform has no CPU affinity")
def test_the_affinity_of_the_process_counts() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); "
        "from see_ray.cpus import available_cpus; print(available_cpus())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1"]
