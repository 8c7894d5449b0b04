"""How the endpoint scales: load profiles against policies, on a cluster whose nodes come and go.

    for each policy:  a cluster, an endpoint  ──►  for each profile: offer load, look once a second, summarize

Every run leaves a CSV with a row a second, a picture, and a summary: offered and served load, latency, refusals,
and the cost in replica-seconds and node-seconds.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from see_ray import admit, load, service_times, serving
from see_ray.config import Config, load_config
from see_ray.fake_cluster import FakeCluster
from see_ray.learn import Listener
from see_ray.load import Arrival
from see_ray.load_report import Run, Second, written
from see_ray.replica import GENERALIST_APP, INGRESS_APP
from see_ray.store import ExpertStore

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
                         "serve.upscale_delay_s=2", "serve.downscale_delay_s=10", "serve.look_back_s=3")),
        Policy("steady", ("serve.min_replicas=1", "serve.max_replicas=2", "serve.target_ongoing_requests=6",
                          "serve.upscale_delay_s=10", "serve.downscale_delay_s=30", "serve.look_back_s=10")),
        Policy("zero", ("serve.min_replicas=0", "serve.max_replicas=2", "serve.target_ongoing_requests=2",
                        "serve.upscale_delay_s=2", "serve.downscale_delay_s=10", "serve.look_back_s=3")),
    )
}  # fmt: skip


def draws(store: ExpertStore, hot: str | None = None) -> load.Draw:
    """Queries of the live experts, evenly or nine in ten to one of them; one in ten of all belongs to nobody.

    Each bears a number of its own, so that no replica finds it read already.
    """
    own = {
        ref.name: [chat[-1]["content"] for chats in admit.kept_chats(store, ref) for chat in chats]
        for ref in store.head().experts
    }
    own = {name: texts for name, texts in own.items() if texts}
    names = sorted(own)

    def draw(t: float, chance: random.Random) -> tuple[str, str]:
        number = chance.randrange(10**6)
        if not names or chance.random() < 0.1:
            return "general", f"Tell me something about the number {number}."
        name = hot if hot and chance.random() < 0.9 else chance.choice(names)
        return name, f"{chance.choice(own[name])} ({number})"

    return draw


def experiment(
    config: Config,
    policies: Sequence[Policy],
    profiles: Sequence[str],
    *,
    base: float,
    peak: float,
    seconds: float,
    node_cpus: float,
    max_nodes: int,
    hot: str | None,
    out: Path,
    listener: Listener | None = None,
) -> list[dict[str, Any]]:
    """Run every profile at every policy, and leave CSV, pictures, settings and `summary.json` in `out`.

    Args:
        config: store, base model and whatever else the policies do not set.
        profiles: names of `load.profile`; `spike:20` has a peak of its own.
        base, peak: requests a second between which the others move.
        seconds: length of each profile.
        node_cpus, max_nodes: size and number of worker nodes; the ingress needs room, too.
        hot: an expert that gets nine of ten queries; None: all get as many.
    """
    import ray

    listener = listener or Listener()
    out.mkdir(parents=True, exist_ok=True)
    store = ExpertStore.open(config.store.url)
    draw = draws(store, hot)
    about = {
        "topology": getattr(config.serve, "topology", "per_expert"),
        "experts": [ref.name for ref in store.head().newest_first()],
    }
    summaries = []
    for policy in policies:
        listener.step(f"Policy {policy.name}: starting a cluster and the endpoint")
        own = load_config(None, [*_as_settings(config), *policy.settings])
        (out / f"{policy.name}.yaml").write_text(own.to_yaml(), encoding="utf-8")
        with FakeCluster({"CPU": node_cpus}, max_nodes, head_cpus=1) as cluster:
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            try:
                began = time.monotonic()
                url = serving.start(own)
                listener.note(f"live after {time.monotonic() - began:.1f} s")
                if policy is policies[0] and own.serve.min_replicas > 0:
                    texts = [draw(0, random.Random(number))[1] for number in range(12)]
                    hop = service_times.hop_s(GENERALIST_APP)
                    times = service_times.measure(
                        own, texts, tokens=load.TOKENS, hop=hop, start=started_s(), node=NODE_START_S
                    )
                    listener.note(json.dumps(asdict(times)))
                    (out / "times.json").write_text(json.dumps(asdict(times), indent=2) + "\n", encoding="utf-8")
                for number, asked in enumerate(profiles):
                    listener.step(f"Policy {policy.name}, profile {asked}")
                    name, _, own_peak = asked.partition(":")
                    rate = load.profile(name, base, float(own_peak or peak), seconds)
                    coming = load.arrivals(rate, seconds, draw, seed=number)
                    run = observed(url, coming, name, policy.name, seconds)
                    summaries.append(run.summary() | about)
                    listener.note(json.dumps(summaries[-1]))
                    written(run, out / f"{policy.name}-{name}")
                    (out / "summary.json").write_text(json.dumps(summaries, indent=2) + "\n", encoding="utf-8")
                    time.sleep(SETTLE_S)
                serving.stop()
            finally:
                ray.shutdown()
    return summaries


def started_s() -> float:
    """Processor seconds that a replica here has taken to start; to be asked before there is any load."""
    import psutil

    pids = [replica["pid"] for replica in serving.about_replicas().values()]
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
        outcomes = asyncio.run(load.offer(url, coming))
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
