"""How the endpoint scales: load profiles against topologies and policies, on a cluster whose nodes come and go.

    for each topology and policy:  a cluster, an endpoint
        for each scenario:         offer load, sample the cluster once a second, summarize

Every run leaves a CSV with a row a second, a plot, and a summary: offered and served load, latency, refusals, and the
cost in replica-seconds and node-seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loadtest.fake_cluster import FakeCluster
from loadtest.generator import MAX_TOKENS, Arrival, load_profile, offer_load, poisson_arrivals
from loadtest.report import ClusterSample, Run, write_run
from loadtest.scenario import Policy, Scenario, query_mix
from loadtest.service_times import add_overhead, measure_service_times
from loadtest.simulation import EndpointDesign, ServiceTimes
from see_ray.config import Config, load_config
from see_ray.data.demo_tasks import demo_tasks
from see_ray.errors import ConfigError
from see_ray.progress import Listener
from see_ray.serving import endpoint
from see_ray.serving.replica import INGRESS_APP
from see_ray.store.expert_store import ExpertStore

NODE_START_S = 3.0
"""Seconds until a process has become a node, about."""

SETTLE_S = 8.0
"""Seconds without load between two scenarios at the same endpoint."""

TIMED_TEXTS = 80
"""Queries with which a replica's computing is timed."""

OVERHEAD_TEXTS = 12
"""Queries with which the endpoint's overhead is timed."""


@dataclass(frozen=True)
class Experiment:
    """Size of an experiment.

    Attributes:
        base, peak: requests a second between which the profiles move.
        seconds: length of each scenario.
        node_cpus: CPUs of a worker node.
        max_nodes: most worker nodes; the ingress needs room, too.
        out: folder of the results; files from an earlier experiment are overwritten.
    """

    base: float
    peak: float
    seconds: float
    node_cpus: float
    max_nodes: int
    out: Path


def run_experiment(
    config: Config,
    experiment: Experiment,
    topologies: Sequence[str],
    policies: Sequence[Policy],
    scenarios: Sequence[Scenario],
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Run every scenario at every topology and policy; write CSV, plots, settings and `summary.json`.

    Args:
        config: store, base model and all that topology and policy do not set.
        experiment: size of load and cluster.
        topologies: values of `serve.topology`.
        policies: how the endpoint may scale.
        scenarios: the load; those in which a task is learned should come last.
        listener: receives progress.

    Returns:
        A summary of each run.

    Raises:
        ConfigError: the store is not a folder. Experiments learn into a copy of it.
    """
    listener = listener or Listener()
    out = experiment.out
    out.mkdir(parents=True, exist_ok=True)
    if not Path(config.store.url).is_dir():
        raise ConfigError(f"the expert store {config.store.url} is not a folder; experiments work on a copy of one")
    (out / "times.json").unlink(missing_ok=True)  # of an earlier experiment
    summaries: list[dict[str, Any]] = []
    for topology, policy in itertools.product(topologies, policies):
        name = f"{topology}-{policy.name}"
        listener.step(f"{name}: starting a cluster and the endpoint")
        with tempfile.TemporaryDirectory(prefix="see") as folder:
            shutil.copytree(config.store.url, f"{folder}/experts")
            settings = [f"serve.topology={topology}", *policy.settings, f"store.url={folder}/experts"]
            run_config = load_config(None, [*_overrides(config), *settings])
            (out / f"{name}.yaml").write_text(run_config.to_yaml(), encoding="utf-8")
            for summary in _run_scenarios(run_config, experiment, name, scenarios, listener):
                summaries.append({"topology": topology, **summary, "policy": policy.name})
                listener.note(json.dumps(summaries[-1]))
                (out / "summary.json").write_text(json.dumps(summaries, indent=2) + "\n", encoding="utf-8")
    return summaries


def _run_scenarios(
    config: Config, experiment: Experiment, name: str, scenarios: Sequence[Scenario], listener: Listener
) -> Iterator[dict[str, Any]]:
    """Run every scenario at one endpoint; yields a summary of each."""
    import ray

    with FakeCluster({"CPU": experiment.node_cpus}, experiment.max_nodes, head_cpus=1) as cluster:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        try:
            started = time.monotonic()
            url = endpoint.start(config)
            listener.note(f"live after {time.monotonic() - started:.1f} s")
            store = ExpertStore.open(config.store.url)
            if config.serve.min_replicas > 0:
                _write_service_times(config, url, experiment.out / "times.json", listener)
            for number, scenario in enumerate(scenarios):
                if number > 0:
                    time.sleep(SETTLE_S)
                listener.step(f"{name}, {scenario.text}")
                seconds = experiment.seconds
                rate = load_profile(scenario.profile, experiment.base, scenario.peak or experiment.peak, seconds)
                arrivals = poisson_arrivals(rate, seconds, query_mix(store, scenario.mix), seed=number)
                experts = [ref.name for ref in store.head().newest_first()]
                with TaskArrival(cluster.address, config) if scenario.learns else nullcontext() as arrival:
                    run = run_load(url, arrivals, scenario.text, name, seconds)
                file_name = f"{name}-{scenario.file_name}"
                write_run(run, experiment.out / file_name)
                learned = {"learned_s": arrival.seconds, "learn_exit": arrival.exit_status} if arrival else {}
                yield {**run.summary(), "file": file_name, "experts": experts, **learned}
            endpoint.stop()
        finally:
            ray.shutdown()


def _write_service_times(config: Config, url: str, path: Path, listener: Listener) -> None:
    """Add this topology's service times to a JSON file, topology -> times, unless it has them."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if config.serve.topology in known:
        return
    store = ExpertStore.open(config.store.url)
    draw = query_mix(store)
    texts = [draw(0, random.Random(seed))[1] for seed in range(TIMED_TEXTS + OVERHEAD_TEXTS)]
    design = EndpointDesign.from_config(config.serve, tuple(ref.name for ref in store.head().newest_first()))
    if known:  # what a replica computes is the same in every topology
        computed = ServiceTimes(**next(iter(known.values())))
    else:
        computed = measure_service_times(
            config, texts[:TIMED_TEXTS], tokens=MAX_TOKENS, start=replica_start_s(), node=NODE_START_S
        )
    times = add_overhead(url, texts[TIMED_TEXTS:], computed, design, tokens=MAX_TOKENS)
    listener.note(json.dumps(asdict(times)))
    path.write_text(json.dumps({**known, config.serve.topology: asdict(times)}, indent=2) + "\n", encoding="utf-8")


class TaskArrival:
    """A task that arrives during a load: `see learn` in a process of its own; the `with` block waits for its end.

    Attributes:
        seconds: until the process ended.
        exit_status: of the process.
    """

    ROWS = 24

    def __init__(self, address: str, config: Config):
        self._address, self._config = address, config
        self.seconds, self.exit_status = 0.0, -1

    def __enter__(self) -> TaskArrival:
        self._folder = tempfile.TemporaryDirectory(prefix="see")
        task, settings = Path(self._folder.name) / "arrived.jsonl", Path(self._folder.name) / "see.yaml"
        rows = demo_tasks(rows=self.ROWS, test_rows=4, seed=1)[0].train
        task.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings.write_text(self._config.to_yaml(), encoding="utf-8")
        # --force: the gate may well find a copy of a live expert's task, which does not matter here.
        see = str(Path(sys.executable).parent / "see")
        command = [see, "learn", str(task), "--config", str(settings), "--force"]
        environment = os.environ | {"RAY_ADDRESS": self._address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            command, cwd=self._folder.name, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._waiter = threading.Thread(target=self._wait)
        self._waiter.start()
        return self

    def _wait(self) -> None:
        self.exit_status = self._process.wait()
        self.seconds = round(time.monotonic() - self._started, 1)

    def __exit__(self, *error: object) -> None:
        self._waiter.join()
        self._folder.cleanup()


def replica_start_s() -> float:
    """Processor seconds that a replica has taken to start; only meaningful before there is any load."""
    import psutil

    pids = [replica["pid"] for replica in endpoint.about_replicas().values()]
    return statistics.median(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def run_load(url: str, arrivals: list[Arrival], profile: str, policy: str, seconds: float) -> Run:
    """Offer the load, and sample the cluster once a second until the last answer."""
    samples: list[ClusterSample] = []
    stop = threading.Event()
    started = time.monotonic()

    def sample() -> None:
        while True:
            samples.append(sample_cluster(time.monotonic() - started))
            if stop.wait(1):
                return

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        outcomes = asyncio.run(offer_load(url, arrivals))
    finally:
        stop.set()
        sampler.join()
    return Run(profile, policy, seconds, outcomes, samples)


def sample_cluster(at: float) -> ClusterSample:
    """Living worker nodes, and running replicas by application."""
    import ray
    from ray import serve

    nodes = sum(node["Alive"] for node in ray.nodes()) - 1  # without the head
    replicas = {
        name: sum(d.replica_states.get("RUNNING", 0) for d in app.deployments.values())
        for name, app in serve.status().applications.items()
        if name != INGRESS_APP
    }
    return ClusterSample(round(at, 2), nodes, replicas)


def _overrides(config: Config) -> list[str]:
    """What differs from the defaults, as `section.field=value`."""
    changed = config.model_dump(mode="json", exclude_defaults=True)
    return [f"{section}.{key}={json.dumps(value)}" for section, keys in changed.items() for key, value in keys.items()]
