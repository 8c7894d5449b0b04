"""How the endpoint scales: load profiles against topologies and policies, on a cluster whose nodes come and go.

    for each topology and policy:  a cluster, an endpoint
        for each scene:            offer load, look once a second, summarize

A scene is a load profile, whose queries come, and whether a task arrives to be fitted meanwhile. Every run leaves a CSV
with a row a second, a picture, and a summary: offered and served load, latency, refusals, and the cost in
replica-seconds and node-seconds.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
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

from loadtest import generator, service_times
from loadtest.fake_cluster import FakeCluster
from loadtest.generator import Arrival
from loadtest.report import Run, Second, written
from loadtest.simulation import Design, Times
from see_ray.config import Config, load_config
from see_ray.data.demo_tasks import demo_tasks
from see_ray.errors import ConfigError
from see_ray.progress import Listener
from see_ray.serving import endpoint
from see_ray.serving.replica import INGRESS_APP
from see_ray.store.expert_files import kept_chats
from see_ray.store.expert_store import ExpertStore

NODE_START_S = 3.0
"""Seconds until a process is there as a node, about."""

SETTLE_S = 8.0
"""Seconds of quiet between two profiles at the same endpoint."""


@dataclass(frozen=True)
class Policy:
    """How the endpoint may scale: a name, and settings as `section.field=value`."""

    name: str
    settings: tuple[str, ...]


POLICIES = {
    policy.name: policy
    for policy in (
        Policy("fixed", ("serve.min_replicas=1", "serve.max_replicas=1")),
        Policy("quick", ("serve.min_replicas=1", "serve.max_replicas=2", "serve.target_ongoing_requests=2",
                         "serve.upscale_delay_s=2", "serve.downscale_delay_s=10", "serve.look_back_period_s=3")),
        Policy("steady", ("serve.min_replicas=1", "serve.max_replicas=2", "serve.target_ongoing_requests=6",
                          "serve.upscale_delay_s=10", "serve.downscale_delay_s=30", "serve.look_back_period_s=10")),
        Policy("zero", ("serve.min_replicas=0", "serve.max_replicas=2", "serve.target_ongoing_requests=2",
                        "serve.upscale_delay_s=2", "serve.downscale_delay_s=10", "serve.look_back_period_s=3")),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """One run's load.

    Attributes:
        text: as it was asked for.
        profile, peak: of `generator.profile`; None is the experiment's own peak.
        wanted: whose queries come, see :func:`draws`.
        learns: whether a task arrives and is fitted while the load lasts.
    """

    text: str
    profile: str
    peak: float | None
    wanted: str | None
    learns: bool

    @staticmethod
    def of(text: str) -> Scene:
        """Read `NAME[:PEAK][@skewed|@EXPERT][+learn]`.

        Raises:
            ConfigError: it is not of that form, or there is no such profile.
        """
        found = re.fullmatch(r"(?P<name>\w+)(:(?P<peak>[0-9.]+))?(@(?P<wanted>[\w-]+))?(?P<learns>\+learn)?", text)
        if not found:
            raise ConfigError(f"cannot read the profile {text!r}; write NAME[:PEAK][@skewed or @EXPERT][+learn]")
        generator.profile(found["name"], 0, 1, 1)
        peak = float(found["peak"]) if found["peak"] else None
        return Scene(text, found["name"], peak, found["wanted"], bool(found["learns"]))

    @property
    def file(self) -> str:
        """The same, fit for the name of a file."""
        return re.sub(r"\W", "-", self.text)


def draws(store: ExpertStore, wanted: str | None = None) -> generator.Draw:
    """Queries of the live experts; one in ten of all belongs to nobody.

    Each bears a number of its own, so that no replica finds it read already.

    Args:
        store: its head's experts are asked for.
        wanted: None, all as often; `skewed`, the k-th newest 1/k times as often as the newest (Zipf's law); or a
            name, which gets nine in ten.

    Raises:
        ConfigError: no expert of that name is live.
    """
    own = {
        ref.name: [chat[-1]["content"] for chats in kept_chats(store, ref) for chat in chats]
        for ref in store.head().experts
    }
    own = {name: texts for name, texts in own.items() if texts}
    names = [ref.name for ref in store.head().newest_first() if ref.name in own]
    weights = [1 / (place + 1) if wanted == "skewed" else 1.0 for place in range(len(names))]
    if wanted not in (None, "skewed", *names):
        raise ConfigError(f"no expert {wanted} with queries of its own is live; there are {', '.join(names)}")

    def draw(t: float, chance: random.Random) -> tuple[str, str]:
        number = chance.randrange(10**6)
        if not names or chance.random() < 0.1:
            return "general", f"Tell me something about the number {number}."
        hot = wanted in names and chance.random() < 0.9
        name = str(wanted) if hot else chance.choices(names, weights)[0]
        return name, f"{chance.choice(own[name])} ({number})"

    return draw


def experiment(
    config: Config,
    topologies: Sequence[str],
    policies: Sequence[Policy],
    scenes: Sequence[Scene],
    *,
    base: float,
    peak: float,
    seconds: float,
    node_cpus: float,
    max_nodes: int,
    out: Path,
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Run every scene at every topology and policy; leave CSV, pictures, settings and `summary.json` in `out`.

    Args:
        config: store, base model and whatever else topology and policy do not set.
        topologies: names of `serve.topology`.
        policies: how the endpoint may scale.
        scenes: what comes; those in which a task is learned had better be the last.
        base, peak: requests a second between which the profiles move.
        seconds: length of each.
        node_cpus, max_nodes: size and number of worker nodes; the ingress needs room, too.
        out: a folder; what stands in it from before is written over.

    Raises:
        ConfigError: the store is not a folder, of which a copy can be made to learn into.
    """
    listener = listener or Listener()
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
            own = load_config(None, [*_as_settings(config), f"serve.topology={topology}", *policy.settings,
                                     f"store.url={folder}/experts"])  # fmt: skip
            (out / f"{name}.yaml").write_text(own.to_yaml(), encoding="utf-8")
            for number, summary in enumerate(_runs(own, name, scenes, (base, peak, seconds), (node_cpus, max_nodes),
                                                   out, listener)):  # fmt: skip
                summaries.append({"topology": topology, **summary, "policy": policy.name})
                listener.note(json.dumps(summaries[-1]))
                (out / "summary.json").write_text(json.dumps(summaries, indent=2) + "\n", encoding="utf-8")
                if number < len(scenes) - 1:
                    time.sleep(SETTLE_S)
    return summaries


def _runs(
    config: Config, name: str, scenes: Sequence[Scene], rates: tuple[float, float, float], nodes: tuple[float, int],
    out: Path, listener: Listener,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Every scene at one endpoint; a summary of each."""
    import ray

    base, peak, seconds = rates
    with FakeCluster({"CPU": nodes[0]}, nodes[1], head_cpus=1) as cluster:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        try:
            began = time.monotonic()
            url = endpoint.start(config)
            listener.note(f"live after {time.monotonic() - began:.1f} s")
            store = ExpertStore.open(config.store.url)
            if config.serve.min_replicas > 0:
                _measure_times(config, url, out / "times.json", listener)
            for number, scene in enumerate(scenes):
                listener.step(f"{name}, {scene.text}")
                rate = generator.profile(scene.profile, base, scene.peak or peak, seconds)
                coming = generator.arrivals(rate, seconds, draws(store, scene.wanted), seed=number)
                experts = [ref.name for ref in store.head().newest_first()]
                with Learning(cluster.address, config) if scene.learns else nullcontext() as learning:
                    run = observed(url, coming, scene.text, name, seconds)
                written(run, out / f"{name}-{scene.file}")
                learned = {"learned_s": learning.seconds, "learn_exit": learning.exit} if learning else {}
                yield {**run.summary(), "file": f"{name}-{scene.file}", "experts": experts, **learned}
            endpoint.stop()
        finally:
            ray.shutdown()


def _measure_times(config: Config, url: str, path: Path, listener: Listener) -> None:
    """Put this topology's service times into a JSON file by topology, unless they are there."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if config.serve.topology in known:
        return
    store = ExpertStore.open(config.store.url)
    texts = [draws(store)(0, random.Random(number))[1] for number in range(92)]
    design = Design.of(config.serve, tuple(ref.name for ref in store.head().newest_first()))
    # What a replica computes is the same in every topology.
    computed = Times(**next(iter(known.values()))) if known else service_times.measure(
        config, texts[:80], tokens=generator.TOKENS, start=started_s(), node=NODE_START_S
    )  # fmt: skip
    times = service_times.of_endpoint(url, texts[80:], computed, design, tokens=generator.TOKENS)
    listener.note(json.dumps(asdict(times)))
    path.write_text(json.dumps({**known, config.serve.topology: asdict(times)}, indent=2) + "\n", encoding="utf-8")


class Learning:
    """A task that arrives at a cluster and is learned by `see learn`, in a process of its own; a context manager that
    waits for its end.

    Attributes:
        seconds: until it had ended; exit: its exit status.
    """

    ROWS = 24

    def __init__(self, address: str, config: Config):
        self._address, self._config = address, config
        self.seconds, self.exit = 0.0, -1

    def __enter__(self) -> Learning:
        self._folder = tempfile.TemporaryDirectory(prefix="see")
        task, settings = Path(self._folder.name) / "arrived.jsonl", Path(self._folder.name) / "see.yaml"
        rows = demo_tasks(rows=self.ROWS, test_rows=4, seed=1)[0].train
        task.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings.write_text(self._config.to_yaml(), encoding="utf-8")
        environment = {"RAY_ADDRESS": self._address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        self._began = time.monotonic()
        # By force: whether it gets in is not the question here, and it may well be a copy of a live expert's task.
        self._process = subprocess.Popen(
            [str(Path(sys.executable).parent / "see"), "learn", str(task), "--config", str(settings), "--force"],
            cwd=self._folder.name, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._watch = threading.Thread(target=self._wait)
        self._watch.start()
        return self

    def _wait(self) -> None:
        self.exit = self._process.wait()
        self.seconds = round(time.monotonic() - self._began, 1)

    def __exit__(self, *error: object) -> None:
        self._watch.join()
        self._folder.cleanup()


def started_s() -> float:
    """Processor seconds that a replica here has taken to start; to be asked before there is any load."""
    import psutil

    pids = [replica["pid"] for replica in endpoint.about_replicas().values()]
    return statistics.median(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def observed(url: str, coming: list[Arrival], profile: str, policy: str, seconds: float) -> Run:
    """Offer the load and look at the cluster once a second until the last answer."""
    looks: list[Second] = []
    stop = threading.Event()
    began = time.monotonic()

    def watch() -> None:
        while True:
            looks.append(look(time.monotonic() - began))
            if stop.wait(1):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        outcomes = asyncio.run(generator.offer(url, coming))
    finally:
        stop.set()
        thread.join()
    return Run(profile, policy, seconds, outcomes, looks)


def look(at: float) -> Second:
    """Living worker nodes, and running replicas by application."""
    import ray
    from ray import serve

    nodes = sum(node["Alive"] for node in ray.nodes()) - 1  # without the head
    replicas = {
        name: sum(d.replica_states.get("RUNNING", 0) for d in app.deployments.values())
        for name, app in serve.status().applications.items()
        if name != INGRESS_APP
    }
    return Second(round(at, 2), nodes, replicas)


def _as_settings(config: Config) -> list[str]:
    """What differs from the defaults, as settings that a policy's can follow."""
    changed = config.model_dump(mode="json", exclude_defaults=True)
    return [f"{section}.{key}={json.dumps(value)}" for section, keys in changed.items() for key, value in keys.items()]
