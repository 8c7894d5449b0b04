"""What a live endpoint reports, and whether the dashboard asks for it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from see_ray.fit.progress_bridge import ProgressBridge
from see_ray.fit.report import Progress
from see_ray.fit.tracking import Tracker
from see_ray.observability.metrics import METRICS
from see_ray.progress import Listener

ROOT = Path(__file__).parents[2]
DASHBOARD = json.loads((ROOT / "cluster" / "grafana.json").read_text(encoding="utf-8"))
ANSWERED = re.compile(r'ray_see_answers_total\{[^}]*answered_by="generalist"')
REFUSED = re.compile(r'ray_see_requests_total\{[^}]*path="/v1/completions"[^}]*status="404"')


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]


def named(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


@pytest.fixture(scope="module")
def scraped(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The endpoint's /metrics, once Ray has collected what one answer of each kind, and a fit, report."""
    body = {"model": "see", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    for extra in ({"max_tokens": 4}, {"max_tokens": 4, "stream": True}):
        assert httpx.post(f"{endpoint}/v1/chat/completions", json=body | extra, timeout=60).status_code == 200
    assert httpx.post(f"{endpoint}/v1/completions", json={"model": "nobody", "prompt": "Hi"}).status_code == 404
    fit = ProgressBridge(Listener(), Tracker(tmp_path_factory.mktemp("runs"), "t", {}, print), "tickets")
    wanted = {f"ray_{name}" for name in METRICS}.union(*map(named, expressions()))
    deadline, text = time.monotonic() + 90, ""
    while time.monotonic() < deadline:  # Ray collects every few seconds, and forgets gauges that nobody sets
        fit.progress(Progress("fit", 1, 2, loss=0.5, tokens_per_s=100))
        text = httpx.get(f"{endpoint}/metrics", timeout=30).raise_for_status().text
        # A metric that earlier tests have set is there before what this fixture asked for.
        if all(name in text for name in wanted) and REFUSED.search(text) and ANSWERED.search(text):
            break
        time.sleep(2)
    return text


def samples(text: str) -> set[str]:
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def test_every_metric_of_the_table_is_reported(scraped: str) -> None:
    missing = {name for name in METRICS if not any(found.startswith(f"ray_{name}") for found in samples(scraped))}
    assert missing == set()


def test_nothing_else_of_ours_is_reported(scraped: str) -> None:
    known = {f"ray_{name}" for name in METRICS}
    ours = {family.name for family in text_string_to_metric_families(scraped) if family.name.startswith("ray_see_")}
    assert {name for name in ours if name not in known and f"{name}_total" not in known} == set()


def test_who_answered_is_counted(scraped: str) -> None:
    assert ANSWERED.search(scraped)


def test_a_refused_request_is_counted_by_its_status(scraped: str) -> None:
    assert REFUSED.search(scraped)


def test_a_requests_id_is_in_the_log_of_every_hop(endpoint: str) -> None:
    """The proxy, the ingress, each expert asked, and who answers."""
    import ray

    body = {"model": "see", "messages": [{"role": "user", "content": "Where is Rome?"}], "max_tokens": 2}
    headers = {"x-request-id": "followed-through-all-hops"}
    assert httpx.post(f"{endpoint}/v1/chat/completions", json=body, headers=headers, timeout=60).status_code == 200
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"
    until = time.monotonic() + 20
    found: set[str] = set()
    while time.monotonic() < until and len(found) < 5:
        found = {path.name for path in logs.glob("*.log") if headers["x-request-id"] in path.read_text()}
        time.sleep(0.5)
    replicas = {name.removeprefix("replica_").rsplit("_", 1)[0] for name in found if name.startswith("replica_")}
    assert {"see_Ingress", "see-generalist_Generalist"} <= replicas
    assert sum(name.startswith("see-expert-") for name in replicas) == 2
    assert any(name.startswith("proxy_") for name in found)


@pytest.mark.parametrize("expression", expressions())
def test_a_dashboard_expression_asks_for_metrics_that_are_scraped(expression: Any, scraped: str) -> None:
    assert named(expression)
    assert named(expression) - samples(scraped) == set()


@pytest.mark.skipif(shutil.which("promtool") is None, reason="Prometheus is not installed")
def test_prometheus_takes_the_endpoints_metrics(scraped: str) -> None:
    done = subprocess.run(["promtool", "check", "metrics"], input=scraped, capture_output=True, text=True)
    assert "error while linting" not in done.stderr + done.stdout
