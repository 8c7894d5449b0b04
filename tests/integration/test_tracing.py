"""OpenTelemetry spans of one query through a real Serve, as its processes wrote them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from see_ray.errors import ServingError
from see_ray.observability.tracing import span_processors


def spans() -> list[dict[str, Any]]:
    """All spans of this Ray's Serve so far."""
    import ray

    # Of all sessions on this machine, the one that this process is connected to.
    folder = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve" / "spans"
    decoder, found = json.JSONDecoder(), []
    for path in folder.glob("*.json"):
        text = path.read_text(encoding="utf-8")
        at = 0
        while (at := text.find("{", at)) >= 0:
            try:
                span, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError:  # being written
                break
            found.append(span)
    return found


@pytest.fixture(scope="module")
def traced(endpoint: str) -> list[dict[str, Any]]:
    """The spans of one query that nobody accepts, so that both experts and the generalist are asked."""
    body = {"messages": [{"role": "user", "content": "Hello, how are you?"}], "model": "see", "max_tokens": 2}
    answer = httpx.post(
        f"{endpoint}/v1/chat/completions", json=body, headers={"x-request-id": "traced-1"}, timeout=60
    ).json()
    assert answer["see"]["answered_by"] == "generalist"
    until = time.monotonic() + 20
    while time.monotonic() < until:
        every = spans()
        ids = {span["context"]["trace_id"] for span in every if span["attributes"].get("request_id") == "traced-1"}
        own = [span for span in every if span["context"]["trace_id"] in ids]
        if ids and any(span["name"] == "see.walk" for span in own) and any("generate" in span["name"] for span in own):
            assert len(ids) == 1, "all hops are in one trace"
            return own
        time.sleep(0.5)
    raise AssertionError("no spans of the query were written")


def test_a_query_is_one_trace_through_all_hops(traced: list[dict[str, Any]]) -> None:
    names = [span["name"] for span in traced]
    assert sum(name == "replica_handle_request Expert decide" for name in names) == 2
    for hop in ("Ingress __call__", "Generalist export_prefix", "Generalist generate"):
        assert names.count(f"replica_handle_request {hop}") == 1


def test_the_experts_that_are_asked_stand_under_the_walk(traced: list[dict[str, Any]]) -> None:
    parents = {span["context"]["span_id"]: span["parent_id"] for span in traced}
    (walk,) = (span["context"]["span_id"] for span in traced if span["name"] == "see.walk")

    def ancestors(span: str | None) -> list[str]:
        return [] if span is None else [span, *ancestors(parents.get(span))]

    for span in traced:
        if "Expert decide" in span["name"]:
            assert walk in ancestors(span["context"]["span_id"])


def test_the_walk_says_what_was_decided(traced: list[dict[str, Any]]) -> None:
    (walk,) = (span for span in traced if span["name"] == "see.walk")
    assert walk["attributes"]["see.answered_by"] == "generalist"
    assert [event["attributes"]["see.expert"] for event in walk["events"]] == ["dates", "tickets"]
    for event in walk["events"]:
        assert event["attributes"]["see.decision"] == "pass"
        assert event["attributes"]["see.p_accept"] < event["attributes"]["see.threshold"]


def test_a_missing_exporter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ServingError, match="pip install opentelemetry-exporter-otlp-proto-http"):
        span_processors()
