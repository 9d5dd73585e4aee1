from __future__ import annotations

import contextlib
import http.server
import os
import pathlib
import sys
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from munet.v1 import inference_pb2 as pb
from server.call_context import CallContext
from server.config import TracingSettings
from server.engine import SegmentRun
from server.errors import SettingsError
from server.tracing import Tracing, is_wanted
from tests.support.repository import RepositoryBuilder, random_images
from tests.support.serving import serving

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


class Receiver:
    """A collector that takes OTLP over HTTP.

    Attributes:
        url: its base URL.
        received: requests, in the order in which they came, with the path each was sent to.
    """

    def __init__(self) -> None:
        received: list[tuple[str, ExportTraceServiceRequest]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                received.append((self.path, ExportTraceServiceRequest.FromString(content)))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.received = received
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever, args=(0.01,))
    thread.start()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()
    thread.join()


def test_a_collector_gets_a_span_for_the_call_and_one_for_each_segment(tmp_path: pathlib.Path, receiver: Receiver) -> None:
    RepositoryBuilder(tmp_path).publish()
    image = pb.Image(raw=pb.RawImage(height=8, width=8, channels=3, data=random_images(1, 8)[0].tobytes()))
    request = pb.ClassifyTasksRequest(image=image, tasks=["digits", "greek"])
    with (
        serving(tmp_path, tracing=TracingSettings(otlp_endpoint=receiver.url)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        metadata = [("traceparent", f"00-{TRACE}-{PARENT}-01"), ("x-request-id", "mine")]
        call = channel.unary_unary("/munet.v1.InferenceService/ClassifyTasks")
        before = time.time_ns()
        answer = pb.ClassifyTasksResponse.FromString(call(request.SerializeToString(), metadata=metadata))
        assert len(answer.tasks) == 2
        # Not sampled by its caller: no span.
        call(request.SerializeToString(), metadata=[("traceparent", f"00-{TRACE}-{PARENT}-00")])
        generation = server.server.reloader.generation
        assert generation is not None
        routes = {segment for task in ("digits", "greek") for segment in generation.tasks[task].route}
    # What the server stopped with is sent before it has stopped.
    assert {path for path, _ in receiver.received} == {"/v1/traces"}
    resources = [resource for _, sent in receiver.received for resource in sent.resource_spans]
    named = {attribute.key: attribute.value.string_value for attribute in resources[0].resource.attributes}
    assert named["service.name"] == "munet-server"
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    (of_call,) = [span for span in spans if span.name == "munet.v1.InferenceService/ClassifyTasks"]
    assert (of_call.trace_id.hex(), of_call.parent_span_id.hex()) == (TRACE, PARENT)
    of_segments = [span for span in spans if span is not of_call]
    assert sorted(span.name for span in of_segments) == sorted(f"segment {name}" for name in routes)
    for span in of_segments:
        assert (span.trace_id, span.parent_span_id) == (of_call.trace_id, of_call.span_id)
        assert before <= of_call.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= of_call.end_time_unix_nano


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Iterator[Tracing]:
    tracing = Tracing(TracingSettings(), SimpleSpanProcessor(exporter))
    yield tracing
    tracing.close()


def test_what_spans_tell(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    call = CallContext("mine", "GRPCInferenceService/ModelInfer")
    span = tracing.begin(call, [("binary-bin", b"\0")])
    call.tasks = ("digits",)
    assert call.on_run is not None
    assert len(call.trace_id) == 32
    call.on_run(SegmentRun("seg-a", 1, 8, 5, 100.0, 100.5, 0.25))
    tracing.end(span, call, "OK")
    of_segment, of_call = exporter.get_finished_spans()
    assert dict(of_segment.attributes or {}) == {
        "munet.segment": "seg-a",
        "munet.rows": 1,
        "munet.batch.rows": 8,
        "munet.batch.requests": 5,
        "munet.queue_seconds": 0.25,
    }
    assert (of_segment.end_time or 0) - (of_segment.start_time or 0) == 500_000_000
    assert (of_call.name, of_call.kind) == ("inference.GRPCInferenceService/ModelInfer", SpanKind.SERVER)
    assert dict(of_call.attributes or {}) == {
        "rpc.system.name": "grpc",
        "rpc.method": "inference.GRPCInferenceService/ModelInfer",
        "rpc.response.status_code": "OK",
        "munet.request_id": "mine",
        "munet.tasks": ("digits",),
        "munet.num_tasks": 1,
    }


def test_segments_ran_while_their_call_did_also_after_the_clock_was_set(
    tracing: Tracing, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    hour_ns = 3600 * 10**9
    set_ns = time.time_ns() + hour_ns
    monkeypatch.setattr("server.tracing.time.time_ns", lambda: set_ns)
    call = CallContext("mine", "InferenceService/Classify")
    span = tracing.begin(call, [])
    assert call.on_run is not None
    call.on_run(SegmentRun("seg-a", 1, 1, 1, time.monotonic(), time.monotonic(), 0.0))
    tracing.end(span, call, "OK")
    of_segment, _ = exporter.get_finished_spans()
    assert abs((of_segment.start_time or 0) - set_ns) < hour_ns / 2


@pytest.mark.parametrize(("status", "is_fault"), [("INTERNAL", True), ("NOT_FOUND", False), ("DEADLINE_EXCEEDED", True)])
def test_what_is_the_servers_fault_is_an_error(
    tracing: Tracing, exporter: InMemorySpanExporter, status: str, is_fault: bool
) -> None:
    call = CallContext("mine", "InferenceService/Classify")
    tracing.end(tracing.begin(call, []), call, status)
    (span,) = exporter.get_finished_spans()
    assert (span.status.status_code is StatusCode.ERROR) is is_fault
    assert ("error.type" in (span.attributes or {})) is is_fault


def test_a_call_that_is_not_sampled_hears_of_nothing(tracing: Tracing, exporter: InMemorySpanExporter) -> None:
    call = CallContext("mine", "InferenceService/Classify")
    span = tracing.begin(call, [("traceparent", f"00-{TRACE}-{PARENT}-00")])
    assert (call.on_run, call.trace_id) == (None, "")
    tracing.end(span, call, "OK")
    assert exporter.get_finished_spans() == ()


@pytest.mark.parametrize(
    ("endpoint", "variables", "wanted"),
    [
        (None, {}, False),
        ("http://collector:4318", {}, True),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        (None, {"OTEL_TRACES_EXPORTER": "otlp"}, True),
        (None, {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, False),
        ("http://collector:4318", {"OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_traces_are_made_when_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, endpoint: str | None, variables: dict[str, str], wanted: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_wanted(TracingSettings(otlp_endpoint=endpoint)) is wanted


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", "found 'grpc', expected http/protobuf"),
        ("OTEL_TRACES_EXPORTER", "zipkin", "found 'zipkin', expected otlp or none"),
    ],
)
def test_what_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{name}: {words}"):
        is_wanted(TracingSettings())


def test_without_opentelemetry_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(SettingsError, match=r"tracing: found .*; install 'munet\[server,otel\]'"):
        Tracing(TracingSettings())


def test_a_collector_that_is_not_there_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.tracing._CLOSE_SECONDS", 0.2)
    with contextlib.closing(Tracing(TracingSettings(otlp_endpoint="http://127.0.0.1:1"))) as tracing:
        call = CallContext("mine", "InferenceService/Classify")
        tracing.end(tracing.begin(call, []), call, "OK")
        started = time.monotonic()
    assert time.monotonic() - started < 5
