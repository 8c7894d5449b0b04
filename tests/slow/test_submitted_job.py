"""A script of jobs/experiments as `ray job submit --working-dir .` runs it, in a Ray of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PROBE = """
from loadtest.report import quantile
print("quantile", quantile([3.0, 1.0, 2.0], 0.5))
"""

SUBMIT = """
import sys, time
import ray
from ray.cluster_utils import Cluster
from ray.job_submission import JobStatus, JobSubmissionClient
from see_ray import cluster as see_cluster
see_cluster.set_environment()


def submit(client, **job):
    # The job agent of the node starts after the dashboard, which answers already.
    deadline = time.monotonic() + 60
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": int(sys.argv[2])}
cluster = Cluster(initialize_head=True, head_node_args=head)
try:
    client = JobSubmissionClient(f"http://{cluster.head_node.webui_url}")
    for arguments in ("jobs/experiments/probe.py", "jobs/experiments/autoscale.py --policies quick --help"):
        command = f"{sys.executable} {arguments}"
        job = submit(client, entrypoint=command, runtime_env={"working_dir": sys.argv[1]})
        ended = (JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.STOPPED)
        while client.get_job_status(job) not in ended:
            time.sleep(0.5)
        print(client.get_job_status(job).value, client.get_job_logs(job))
finally:
    cluster.shutdown()
"""


@pytest.mark.slow
def test_the_driver_finds_the_package_beside_a_script(tmp_path: Path) -> None:
    """`loadtest` lies beside the scripts that import it. Ray's workers do not find it, and no script sends it there."""
    for folder in ("see_ray", "jobs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "jobs" / "experiments" / "probe.py").write_text(PROBE, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
    done = subprocess.run(
        [sys.executable, "-c", SUBMIT, str(tmp_path), str(port)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "SUCCEEDED" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "FAILED" not in done.stdout, done.stdout
    assert "quantile 2.0" in done.stdout
    assert "Usage: autoscale.py" in done.stdout
