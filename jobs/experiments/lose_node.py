"""Three nodes on this machine: learn and serve by `ray job submit`, then kill a node that holds experts.

Starts a Ray cluster of its own (head and two workers), submits `jobs/learn.py` and `jobs/serve.py` as a user
does, asks the endpoint all the time, kills a worker node with SIGKILL, adds a new one, and counts what failed
and how long it took until every replica was back. Prints a table; --out writes JSON.

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

from see_ray import cluster as ray_session
from see_ray.cli.render import table
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


@click.command()
@click.option("--rows", default=24, show_default=True, help="Training rows of each task.")
@click.option("--port", default=8765, show_default=True, help="The endpoint's port.")
@click.option("--away", default=15.0, show_default=True, help="Seconds until a new node takes the lost one's place.")
@click.option("--dir", "folder", type=click.Path(path_type=Path), required=True, help="Where experts are kept.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
def main(rows: int, port: int, away: float, folder: Path, out: Path | None) -> None:
    ray_session.set_environment()
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": HEAD_CPUS, "include_dashboard": True, "dashboard_port": port + 1},
    )
    try:
        with tempfile.TemporaryDirectory(prefix="see") as files:
            nodes = [added(cluster, Path(files)) for _ in range(2)]
            folder.mkdir(parents=True, exist_ok=True)
            report = learned_and_served(cluster, folder.absolute(), rows, port)
            report |= lost(cluster, nodes, Path(files), f"http://127.0.0.1:{port}", away)
    finally:
        cluster.shutdown()
    print(table(["what", "measured"], [[name, str(value)] for name, value in report.items()]))
    if out:
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def added(cluster: Any, files: Path) -> Any:
    """A worker node with files of its own: nodes that share a folder unpack a job's files over each other's."""
    return cluster.add_node(num_cpus=WORKER_CPUS, temp_dir=tempfile.mkdtemp(prefix="n", dir=files))


def learned_and_served(cluster: Any, folder: Path, rows: int, port: int) -> dict[str, Any]:
    """Three tasks learned, and the endpoint up; tasks that the folder's store has already are passed over."""
    sources = []
    for task in demo_tasks(rows=rows, test_rows=4):
        sources.append(folder / f"{task.name}.jsonl")
        sources[-1].write_text("".join(json.dumps(row) + "\n" for row in task.train), encoding="utf-8")
    settings = [*SETTINGS, f"store.url={folder / 'experts'}", f"fit.storage_path={folder / 'fits'}"]
    settings += [f"fit.tracking_dir={folder / 'tracking'}", f"serve.port={port}"]
    report: dict[str, Any] = {}
    report["learn_s"] = submitted(cluster, "learn", [*map(str, sources)], settings)
    report["serve_s"] = submitted(cluster, "serve", [], settings)
    return report


def submitted(cluster: Any, job: str, arguments: list[str], settings: list[str]) -> float:
    """Seconds of a job that was submitted as a user does it, from the repository."""
    began = time.monotonic()
    address = f"http://{cluster.head_node.webui_url}"
    command = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", address]
    command += ["--working-dir", str(ROOT), "--entrypoint-num-cpus", "0.5", "--"]
    command += [sys.executable, f"jobs/{job}.py", *arguments, *(word for s in settings for word in ("--set", s))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout[-3000:], flush=True)
    if done.returncode != 0:
        sys.exit(f"the job {job} ended with {done.returncode}: {done.stderr[-3000:]}")
    return round(time.monotonic() - began, 1)


def lost(cluster: Any, nodes: list[Any], files: Path, url: str, away: float) -> dict[str, Any]:
    """Kill the worker node with most experts, and see what the endpoint does."""
    import ray

    ray.init(address=cluster.address, log_to_driver=False)
    asking = Asking(url)
    try:
        before = replicas()
        victim = max(nodes, key=lambda node: (holds(before, node, "Expert"), not holds(before, node, "Ingress")))
        time.sleep(5)
        killed = time.monotonic()
        cluster.remove_node(victim, allow_graceful=False)
        noticed, back, full = None, False, 0.0
        while (full := time.monotonic() - killed) < 240:
            total = replicas().total()
            if noticed is None and total < before.total():
                noticed = full
            if noticed is not None and total >= before.total():
                break
            if not back and full > away:
                back = added(cluster, files) is not None
            time.sleep(0.5)
        time.sleep(5)
    finally:
        asking.stop()
        ray.shutdown()
    after = [(ms, status) for at, ms, status in asking.answers if at > killed]
    return {
        "experts_on_lost_node": holds(before, victim, "Expert"),
        "ingress_on_lost_node": holds(before, victim, "Ingress"),
        "requests": len(asking.answers),
        "requests_after_the_kill": len(after),
        "statuses": dict(Counter(str(status) for _, _, status in asking.answers)),
        "failed": sum(status != 200 for _, _, status in asking.answers),
        "slowest_ms": round(max(ms for ms, _ in after)),
        "seconds_until_noticed": noticed and round(noticed, 1),
        "seconds_until_full": round(full, 1),
        "new_node_after_s": away,
    }


def replicas() -> Counter[tuple[str, str]]:
    """Running replicas by node id and deployment."""
    from ray import serve

    found: Counter[tuple[str, str]] = Counter()
    for app in serve.status().applications:
        details = serve.context._get_global_client().get_serve_details()["applications"][app]["deployments"]
        for name, deployment in details.items():
            for replica in deployment["replicas"]:
                if replica["state"] == "RUNNING":
                    found[replica["node_id"], name] += 1
    return found


def holds(found: Counter[tuple[str, str]], node: Any, deployment: str) -> int:
    return found[node.node_id, deployment]


class Asking:
    """Asks for a decision four times a second, each in a thread of its own, until stopped."""

    def __init__(self, url: str):
        import httpx

        self.answers: list[tuple[float, float, int | str]] = []
        self._stop = threading.Event()
        self._client = httpx.Client(base_url=url, timeout=120, trust_env=False)
        self._threads: list[threading.Thread] = []
        self._main = threading.Thread(target=self._ask)
        self._main.start()

    def _ask(self) -> None:
        while not self._stop.wait(0.25):
            self._threads.append(threading.Thread(target=self._one))
            self._threads[-1].start()

    def _one(self) -> None:
        import httpx

        began = time.monotonic()
        status: int | str
        try:
            status = self._client.post(
                "/v1/route", json={"messages": [{"role": "user", "content": "Hello"}]}
            ).status_code
        except httpx.HTTPError as error:
            status = type(error).__name__
        self.answers.append((began, (time.monotonic() - began) * 1000, status))

    def stop(self) -> None:
        self._stop.set()
        for thread in [self._main, *self._threads]:
            thread.join()


if __name__ == "__main__":
    main()
