"""OpenTelemetry traces: a query's hops through ingress and replicas, and its walk over the sequence.

Serve creates a span at each hop and propagates the trace (`serve.trace_sample_rate` turns this on); the span of the
walk, with each expert's decision, is created here. Spans are exported to `$OTEL_EXPORTER_OTLP_ENDPOINT`, or into files
beside Serve's logs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from see_ray.errors import ServingError
from see_ray.routing.chain import Trace

EXPORTER = f"{__name__}:span_processors"
"""Import path of `span_processors`, for Serve, which calls it in each of its processes."""


def span_processors() -> list[Any]:
    """Span processors of this process.

    Raises:
        ServingError: the OTLP exporter is needed and not installed.
    """
    if not (os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
        from ray.serve._private.tracing_utils import default_tracing_exporter

        processors: list[Any] = default_tracing_exporter(f"{os.getpid()}.json")
        return processors
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ServingError(
            "$OTEL_EXPORTER_OTLP_ENDPOINT is set, but this node has no OTLP exporter; "
            "pip install opentelemetry-exporter-otlp-proto-http"
        ) from error
    return [BatchSpanProcessor(OTLPSpanExporter())]


class WalkSpan:
    """The span of a walk; without tracing it records nothing."""

    def __init__(self, span: Any):
        self._span = span

    def record(self, trace: Trace) -> None:
        """Set the outcome as attributes, and add an event `asked` for each expert's decision."""
        self._span.set_attribute("see.answered_by", trace.answered_by)
        self._span.set_attribute("see.reason", trace.reason)
        self._span.set_attribute("see.sequence_version", trace.sequence_version)
        for decision in trace.asked:
            attributes = {
                "see.expert": decision.expert,
                "see.decision": decision.decision,
                "see.threshold": decision.threshold,
            }
            if decision.p_accept is not None:
                attributes["see.p_accept"] = decision.p_accept
            self._span.add_event("asked", attributes)


@contextmanager
def walk_span() -> Iterator[WalkSpan]:
    """A span around a walk: the parent of the spans of its hops."""
    from opentelemetry import trace as opentelemetry

    with opentelemetry.get_tracer("see_ray").start_as_current_span("see.walk") as span:
        yield WalkSpan(span)
