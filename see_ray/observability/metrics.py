"""Metrics: the table `METRICS` of all names, functions to report them, and a scrape of the whole cluster.

    count("see_answers_total", answered_by="tickets", reason="accepted")
    scrape() -> the whole cluster's metrics as Prometheus text

They are exported by Ray (`ray.util.metrics`), about every 10 seconds: each node has those of its processes on its
metrics port, with the prefix `ray_`, and Prometheus finds the nodes by Ray's service discovery. `scrape` reads all
nodes, so that the endpoint's `/metrics` shows the cluster at one address.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger("ray.serve")

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
SHARES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)

SCRAPE_TIMEOUT_S = 5.0
"""Timeout of the request to a node, in seconds."""

PREFIXES = ("ray_see_", "ray_serve_")
"""Prefixes of the metrics that `scrape` keeps: ours, and Ray Serve's (queues, replicas, errors)."""


@dataclass(frozen=True)
class Metric:
    """Description of a metric.

    Attributes:
        boundaries: of a histogram's buckets.
    """

    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


METRICS = {
    # requests, in the ingress
    "see_requests_total": Metric("counter", "HTTP requests, by path and status.", ("path", "status")),
    "see_request_duration_seconds": Metric("histogram", "Until the end of the answer.", ("path",), SECONDS),
    "see_time_to_first_token_seconds": Metric("histogram", "Until the first chunk.", ("answered_by",), SECONDS),
    "see_prompt_tokens_total": Metric("counter", "Prompt tokens of answered requests.", ("answered_by",)),
    "see_completion_tokens_total": Metric("counter", "Tokens of answers.", ("answered_by",)),
    "see_waiting_requests": Metric("gauge", "Requests without a first token or decision yet."),
    "see_expected_wait_seconds": Metric("gauge", "Until all waiting requests are served."),
    # the chain, in the ingress
    "see_answers_total": Metric("counter", "Routed queries, by who answers and why.", ("answered_by", "reason")),
    "see_decisions_total": Metric("counter", "Decisions: accept, pass, unavailable.", ("expert", "decision")),
    "see_p_accept": Metric("histogram", "P(accept) of an expert.", ("expert",), SHARES),
    "see_sequence_version": Metric("gauge", "Sequence version that is live."),
    "see_live_experts": Metric("gauge", "Experts that are live."),
    "see_failed_experts": Metric("gauge", "Experts of the live version that could not start."),
    # the engine, in a replica
    "see_prefix_tokens_total": Metric("counter", "Prompt tokens, cached (hit) or not (miss).", ("expert", "result")),
    "see_batch_rows": Metric("histogram", "Answers decoded in one step of the scheduler.", ("expert",), ROWS),
    # a fit, in the process that started it
    "see_fit_progress_ratio": Metric("gauge", "Share of the fit's steps that are done.", ("task",)),
    "see_fit_loss": Metric("gauge", "Loss of the last step.", ("task",)),
    "see_fit_tokens_per_second": Metric("gauge", "Tokens per second of the fit.", ("task",)),
}


def count(name: str, value: float = 1, **labels: str) -> None:
    """Add to a counter."""
    if value > 0:  # Ray's counters raise at 0
        _metric(name).inc(value, tags=labels)


def set_gauge(name: str, value: float, **labels: str) -> None:
    """Set a gauge."""
    _metric(name).set(value, tags=labels)


def observe(name: str, value: float, **labels: str) -> None:
    """Add a value to a histogram."""
    # Ray's histograms raise at 0; it belongs to the lowest bucket, as this does.
    _metric(name).observe(max(value, 1e-9), tags=labels)


@functools.cache
def _metric(name: str) -> Any:
    from ray.util import metrics

    metric = METRICS[name]
    if metric.kind == "histogram":
        return metrics.Histogram(name, metric.description, list(metric.boundaries), metric.labels)
    return {"counter": metrics.Counter, "gauge": metrics.Gauge}[metric.kind](name, metric.description, metric.labels)


def targets() -> list[str]:
    """`host:port` of the metrics of each node that is alive."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"] and node["MetricsExportPort"]]
    return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]


async def scrape() -> str:
    """Our metrics and Serve's from all nodes, as one Prometheus text. A node that does not answer is left out."""
    import httpx

    async with httpx.AsyncClient(timeout=SCRAPE_TIMEOUT_S, trust_env=False) as client:

        async def read(target: str) -> str:
            try:
                return (await client.get(f"http://{target}/metrics")).raise_for_status().text
            except httpx.HTTPError as error:
                logger.warning("no metrics from %s: %s", target, error)
                return ""

        return merge_texts(await asyncio.gather(*map(read, await asyncio.to_thread(targets))))


def merge_texts(texts: Iterable[str]) -> str:
    """Several nodes' metrics as one Prometheus text: of each metric HELP and TYPE once, then its samples on all nodes.

    Lines are grouped, not parsed: `prometheus_client` takes over 0.1 ms to parse one, and a node has thousands, which
    would keep the ingress from answering requests.
    """
    headers: dict[str, dict[str, str]] = {}  # lines by metric and keyword
    samples: dict[str, list[str]] = {}
    for text in texts:
        metric = ""
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                keyword, metric = line.split(" ", 3)[1:3]
                headers.setdefault(metric, {}).setdefault(keyword, line)
            elif line.startswith(PREFIXES):
                samples.setdefault(metric, []).append(line)
    return "".join(f"{line}\n" for metric in samples for line in (*headers.get(metric, {}).values(), *samples[metric]))
