"""Sends traces of requests to an OpenTelemetry collector by OTLP over HTTP."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping
from typing import Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import robustfeat
from robustfeat.serving.online.timeline import Timeline

__all__ = ["Tracer"]

_EXPORT_S = 5.0
_LAST_EXPORT_S = 2.0
"""Time limit for sending the last spans when a worker ends."""


class Tracer:
    """Records the spans of one worker, and sends them in the background.

    Spans are made when a request has been answered, from the times that were noted meanwhile. Sampling is set by
    the environment's OTEL_TRACES_SAMPLER, and further attributes by OTEL_RESOURCE_ATTRIBUTES.

    Args:
        endpoint: address of the collector, to which /v1/traces is added.
        number: number of the worker.
    """

    def __init__(self, endpoint: str, number: int) -> None:
        resource = Resource.create(
            {
                "service.name": "robustfeat",
                "service.version": robustfeat.__version__,
                "service.instance.id": f"{socket.gethostname()}/{number}",
            }
        )
        # Disable the exit handler, which would wait for half a minute.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("robustfeat", robustfeat.__version__)
        self._propagator = TraceContextTextMapPropagator()

    def record(
        self,
        name: str,
        began: float,
        attributes: Mapping[str, Any],
        timeline: Timeline,
        headers: Mapping[bytes, bytes],
        failure: str | None,
    ) -> str:
        """Records a request that ends now, and its stages.

        Args:
            name: method and route.
            began: when it began, by `time.perf_counter`.
            attributes: attributes of its span, of which empty ones are ignored.
            timeline: times of its images' stages.
            headers: headers of the request. `traceparent` names the parent span.
            failure: the server's failure, if any.

        Returns:
            The id of the trace, in hex.
        """
        now, now_ns = time.perf_counter(), time.time_ns()

        def wall(seconds: float) -> int:
            return now_ns - int((now - seconds) * 1e9)

        carrier = {
            key.decode(): headers[key].decode("latin-1") for key in (b"traceparent", b"tracestate") if key in headers
        }
        span = self._tracer.start_span(
            name,
            self._propagator.extract(carrier),
            SpanKind.SERVER,
            {key: value for key, value in attributes.items() if value is not None},
            start_time=wall(began),
        )
        if failure is not None:
            span.set_attribute("error.type", failure)
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        for stage, start, end in timeline.stages():
            self._tracer.start_span(stage, inside, start_time=wall(start)).end(wall(end))
        span.end(now_ns)
        return f"{span.get_span_context().trace_id:032x}"

    def close(self) -> None:
        """Sends the recorded spans, as far as the collector accepts them within seconds."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(_LAST_EXPORT_S)
