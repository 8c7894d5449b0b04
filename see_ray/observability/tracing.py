"""OpenTelemetry traces: a query's way through ingress and replicas, and its walk over the sequence.

Serve makes a span at each hop and hands the trace on (`serve.trace_sample_rate` turns it on); the walk's own span, with
what each expert decided, is made here. Spans go where `$OTEL_EXPORTER_OTLP_ENDPOINT` says, or into files beside Serve's
logs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from see_ray.errors import ServingError
from see_ray.routing.chain import Trace

EXPORTER = f"{__name__}:span_processors"
"""What Serve imports, in each of its processes."""


def span_processors() -> list[Any]:
    """Where the spans of this process go.

    Raises:
        ServingError: an endpoint is named, and the package that speaks to it is missing.
    """
    if not (os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")):
        from ray.serve._private.tracing_utils import default_tracing_exporter

        found: list[Any] = default_tracing_exporter(f"{os.getpid()}.json")
        return found
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ServingError(
            "traces are to go to $OTEL_EXPORTER_OTLP_ENDPOINT, which takes a package that is not installed on this "
            "node: pip install opentelemetry-exporter-otlp-proto-http"
        ) from error
    return [BatchSpanProcessor(OTLPSpanExporter())]


class Walk:
    """The span of a walk; without tracing, nothing."""

    def __init__(self, span: Any):
        self._span = span

    def ended(self, trace: Trace) -> None:
        """Note what was decided: `see.answered_by`, `see.reason`, and an event for each expert that was asked."""
        self._span.set_attribute("see.answered_by", trace.answered_by)
        self._span.set_attribute("see.reason", trace.reason)
        self._span.set_attribute("see.sequence_version", trace.sequence_version)
        for asked in trace.asked:
            attributes = {"see.expert": asked.expert, "see.decision": asked.decision, "see.threshold": asked.threshold}
            if asked.p_accept is not None:
                attributes["see.p_accept"] = asked.p_accept
            self._span.add_event("asked", attributes)


@contextmanager
def walk_span() -> Iterator[Walk]:
    """The span under which the hops of a walk stand."""
    from opentelemetry import trace as opentelemetry

    with opentelemetry.get_tracer("see_ray").start_as_current_span("see.walk") as span:
        yield Walk(span)
