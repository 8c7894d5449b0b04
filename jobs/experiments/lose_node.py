"""Three nodes on this machine: learn and serve by `ray job submit`, then kill a node that holds experts.

Starts a Ray cluster of its own (a head and two workers), submits `jobs/learn.py` and `jobs/serve.py` as a user does,
sends requests all the time, kills a worker node with SIGKILL, adds a new one, and measures how many requests fail and
how long it takes until every replica is back. Prints a table; --out writes JSON.

    python jobs/experiments/lose_node.py --dir WORK --out lose_node.json
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from see_ray import cluster as see_cluster
from see_ray.cli.render import table
from see_ray.cli.run import run
from see_ray.data.demo_tasks import demo_tasks

ROOT = Path(__file__).parents[2]
SETTINGS = [
    "reconstruct.general_negatives=16",
    "reconstruct.max_eval_rows=8",
    "fit.r=8",
    "fit.learning_rate=2.0e-3",
    "fit.num_train_epochs=2",
    "fit.train_batch_size=4",
    "serve.replica_cpus=0.5",
    "serve.replica_threads=1",
    "serve.spare=false",
    "serve.ingress_replicas=2",
]
WORKER_CPUS, HEAD_CPUS = 2, 2

LIMIT_S = 240.0
"""Seconds after which a replica that is not back counts as lost."""


@click.command()
@click.option("--rows", default=24, show_default=True, help="Training rows of each task.")
@click.option("--port", default=8765, show_default=True, help="The endpoint's port.")
@click.option("--away", default=15.0, show_default=True, help="Seconds until a new node replaces the lost one.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), required=True, help="Where experts are kept.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(rows: int, port: int, away: float, folder: Path, out: Path | None) -> None:
    """Learn and serve by `ray job submit`, then lose a node."""
    see_cluster.set_environment()
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": HEAD_CPUS, "include_dashboard": True, "dashboard_port": port + 1},
    )
    try:
        with tempfile.TemporaryDirectory(prefix="see") as node_folders:
            nodes = [add_node(cluster, Path(node_folders)) for _ in range(2)]
            folder.mkdir(parents=True, exist_ok=True)
            report = learn_and_serve(cluster, folder.absolute(), rows, port)
            report |= lose_node(cluster, nodes, Path(node_folders), f"http://127.0.0.1:{port}", away)
    finally:
        cluster.shutdown()
    click.echo(table(["what", "measured"], [[name, str(value)] for name, value in report.items()]))
    if out:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def add_node(cluster: Any, node_folders: Path) -> Any:
    """Start a worker node with a folder of its own: nodes that share one overwrite each other's job files."""
    return cluster.add_node(num_cpus=WORKER_CPUS, temp_dir=tempfile.mkdtemp(prefix="n", dir=node_folders))


def learn_and_serve(cluster: Any, folder: Path, rows: int, port: int) -> dict[str, Any]:
    """Learn three tasks and start the endpoint; tasks that the folder's store has already are skipped."""
    sources = []
    for task in demo_tasks(rows=rows, test_rows=4):
        sources.append(folder / f"{task.name}.jsonl")
        sources[-1].write_text("".join(json.dumps(row) + "\n" for row in task.train), encoding="utf-8")
    settings = [*SETTINGS, f"store.url={folder / 'experts'}", f"fit.storage_path={folder / 'fits'}"]
    settings += [f"fit.tracking_dir={folder / 'tracking'}", f"serve.port={port}"]
    return {
        "learn_s": submit(cluster, "learn", [str(source) for source in sources], settings),
        "serve_s": submit(cluster, "serve", [], settings),
    }


def submit(cluster: Any, job: str, arguments: list[str], settings: list[str]) -> float:
    """Submit a job as a user does, from the repository, and wait for its end; returns the seconds."""
    started = time.monotonic()
    address = f"http://{cluster.head_node.webui_url}"
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", address]
    command += ["--working-dir", str(ROOT), "--entrypoint-num-cpus", "0.5", "--"]
    command += [sys.executable, f"jobs/{job}.py", *arguments, *(word for s in settings for word in ("--set", s))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    click.echo(done.stdout[-3000:])
    if done.returncode != 0:
        sys.exit(f"the job {job} ended with {done.returncode}: {done.stderr[-3000:]}")
    return round(time.monotonic() - started, 1)


def lose_node(cluster: Any, nodes: list[Any], node_folders: Path, url: str, away: float) -> dict[str, Any]:
    """Kill the worker node with most experts under a steady load, and measure what clients notice."""
    import ray

    ray.init(address=cluster.address, log_to_driver=False)
    load = SteadyLoad(url)
    try:
        before = running_replicas()
        victim = max(nodes, key=lambda node: (before[node.node_id, "Expert"], not before[node.node_id, "Ingress"]))
        time.sleep(5)
        killed_at = time.monotonic()
        cluster.remove_node(victim, allow_graceful=False)
        noticed_s, full_s = wait_until_full(cluster, before.total(), node_folders, killed_at, away)
        time.sleep(5)
    finally:
        load.stop()
        ray.shutdown()
    latencies = [ms for at, ms, _ in load.responses if at > killed_at]
    statuses = Counter(str(status) for _, _, status in load.responses)
    return {
        "experts_on_lost_node": before[victim.node_id, "Expert"],
        "ingress_on_lost_node": before[victim.node_id, "Ingress"],
        "requests": len(load.responses),
        "requests_after_the_kill": len(latencies),
        "statuses": dict(statuses),
        "failed": len(load.responses) - statuses["200"],
        "slowest_ms": round(max(latencies)),
        "seconds_until_noticed": noticed_s and round(noticed_s, 1),
        "seconds_until_full": round(full_s, 1),
        "new_node_after_s": away,
    }


def wait_until_full(
    cluster: Any, replicas: int, node_folders: Path, killed_at: float, away: float
) -> tuple[float | None, float]:
    """Wait until as many replicas run as before, after adding a node; gives up after LIMIT_S.

    Returns:
        Seconds after the kill until replicas were missing, and until all were back.
    """
    noticed_s, has_new_node = None, False
    while (elapsed := time.monotonic() - killed_at) < LIMIT_S:
        running = running_replicas().total()
        if noticed_s is None and running < replicas:
            noticed_s = elapsed
        if noticed_s is not None and running >= replicas:
            break
        if not has_new_node and elapsed > away:
            add_node(cluster, node_folders)
            has_new_node = True
        time.sleep(0.5)
    return noticed_s, elapsed


def running_replicas() -> Counter[tuple[str, str]]:
    """Running replicas by (node id, deployment)."""
    from ray import serve

    replicas: Counter[tuple[str, str]] = Counter()
    for app in serve.status().applications:
        details = serve.context._get_global_client().get_serve_details()["applications"][app]["deployments"]
        for name, deployment in details.items():
            for replica in deployment["replicas"]:
                if replica["state"] == "RUNNING":
                    replicas[replica["node_id"], name] += 1
    return replicas


class SteadyLoad:
    """Asks for a decision four times a second, each in a thread of its own, until stopped.

    Attributes:
        responses: (time of sending, milliseconds, HTTP status or name of the error) of each request.
    """

    def __init__(self, url: str):
        import httpx

        self.responses: list[tuple[float, float, int | str]] = []
        self._stop = threading.Event()
        self._client = httpx.Client(base_url=url, timeout=120, trust_env=False)
        self._requests: list[threading.Thread] = []
        self._sender = threading.Thread(target=self._send_until_stopped)
        self._sender.start()

    def _send_until_stopped(self) -> None:
        while not self._stop.wait(0.25):
            self._requests.append(threading.Thread(target=self._send))
            self._requests[-1].start()

    def _send(self) -> None:
        import httpx

        sent = time.monotonic()
        body = {"messages": [{"role": "user", "content": "Hello"}]}
        status: int | str
        try:
            status = self._client.post("/v1/route", json=body).status_code
        except httpx.HTTPError as error:
            status = type(error).__name__
        self.responses.append((sent, (time.monotonic() - sent) * 1000, status))

    def stop(self) -> None:
        self._stop.set()
        for thread in [self._sender, *self._requests]:
            thread.join()


if __name__ == "__main__":
    run(main)
