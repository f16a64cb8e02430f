"""Traces of requests, as a collector gets them: a small HTTP server that parses the real protocol."""

from __future__ import annotations

import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

import robustfeat
from robustfeat.errors import InputError
from robustfeat.serving.http.options import check_otlp_endpoint
from robustfeat.serving.online.timeline import Timeline
from tests.serving.http.conftest import serving

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """Keeps what it is sent to /v1/traces."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                assert self.headers["content-type"] == "application/x-protobuf"
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.requests.append(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()

    @property
    def spans(self) -> list[Span]:
        scopes = [scope for request in self.requests for found in request.resource_spans for scope in found.scope_spans]
        return [span for scope in scopes for span in scope.spans]


@pytest.fixture
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


def attributes(holder: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in holder.attributes}


def test_a_collector_gets_each_request_with_its_stages(collector: Collector, photos: list[bytes]) -> None:
    with serving("--otlp-endpoint", collector.address, "--log-requests") as server:
        before = time.time_ns()
        assert server.form("/embed", photos[:3], traceparent=PARENT, x_request_id="mine").status == 200
        assert server.post("/embed", b"none").status == 422
        assert server.get("/health/ready").status == 200  # and no probe is traced
        assert server.stop() == 0  # what was recorded is sent before a worker ends
        after = time.time_ns()  # the client may have its answer before the span ends
        logged = {line["request_id"]: line for line in server.logged() if line["event"] == "request"}
    (resource,) = {str(found.resource) for request in collector.requests for found in request.resource_spans}
    assert "robustfeat" in resource
    assert robustfeat.__version__ in resource
    requests = [span for span in collector.spans if span.kind == Span.SPAN_KIND_SERVER]
    assert [span.name for span in requests] == ["POST /embed", "POST /embed"]
    good, bad = requests
    assert (good.trace_id.hex(), good.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3])
    assert (bad.trace_id != good.trace_id, bad.parent_span_id) == (True, b"")
    assert before <= good.start_time_unix_nano < good.end_time_unix_nano <= after
    assert good.status.code == bad.status.code == Status.STATUS_CODE_UNSET  # a client's fault is no error of ours
    expected = {
        "http.request.method": "POST",
        "http.route": "/embed",
        "http.response.status_code": 200,
        "client.address": "127.0.0.1",
        "robustfeat.request_id": "mine",
        "robustfeat.model": "robustfeat",
        "robustfeat.images": 3,
    }
    assert expected.items() <= attributes(good).items()
    assert attributes(bad)["http.response.status_code"] == 422
    assert logged["mine"]["trace_id"] == good.trace_id.hex()
    stages = {span.name: span for span in collector.spans if span.parent_span_id == good.span_id}
    assert list(stages) == ["decoder queue", "decode", "model queue", "predict"]
    begins = [span.start_time_unix_nano for span in stages.values()]
    assert begins == sorted(begins)
    for span in stages.values():
        assert good.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= good.end_time_unix_nano
    assert [span.name for span in collector.spans if span.parent_span_id == bad.span_id] == ["decoder queue", "decode"]


def test_a_collector_that_is_silent_or_gone_delays_nothing(photos: list[bytes]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, and never answers
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with serving("--otlp-endpoint", address) as server:
            assert server.post("/embed", photos[0]).status == 200
            began = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - began < 15
    with serving("--otlp-endpoint", address) as server:
        assert server.post("/embed", photos[0]).status == 200
        assert server.stop() == 0
        assert all(line.startswith(("{", "serving at")) for line in server.said)


def test_the_address_and_the_libraries_are_checked_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ("collector:4317", "grpc://collector", "http://"):
        with pytest.raises(InputError, match=f"otlp_endpoint={re.escape(wrong)}: expected an address"):
            check_otlp_endpoint(wrong)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    with pytest.raises(InputError, match=r"needs the libraries of OpenTelemetry; pip install 'robustfeat\[otel\]'"):
        check_otlp_endpoint("http://localhost:4318")


def test_a_timeline_spans_from_the_first_image_to_the_last() -> None:
    timeline = Timeline(queued=1.0)
    for began, ended in ((3.0, 4.0), (2.0, 5.0), (5.0, 6.0)):
        timeline.note_decoded(began, ended)
    for began, ended in ((4.5, 7.0), (7.0, 8.0)):
        timeline.note_run(began, ended)
    assert list(timeline.stages()) == [
        ("decoder queue", 1.0, 2.0),
        ("decode", 2.0, 6.0),
        ("model queue", 4.0, 4.5),
        ("predict", 4.5, 8.0),
    ]
    tensors = Timeline(queued=1.0)
    tensors.note_run(2.0, 3.0)
    assert list(tensors.stages()) == [("model queue", 1.0, 2.0), ("predict", 2.0, 3.0)]
