"""Traces by OpenTelemetry, where they are asked for: a span for each call, and below it one for each run of a segment for it.

A batch serves several calls; each of their traces gets a span of its own for it, with the size of the batch (docs/decisions/0027).
OpenTelemetry is imported when traces are asked for and not before: it is an extra, `munet[otel]`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import munet
from server.call_context import CallContext
from server.config import TracingSettings
from server.engine import SegmentRun
from server.errors import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span as _Span

Span: TypeAlias = "_Span"
"""A call's place in its trace."""

_ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"

_FAULTS = frozenset(("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"))
"""Statuses that OpenTelemetry's conventions for gRPC call the server's own fault."""

_PACKAGES = {"InferenceService": "munet.v1", "AdminService": "munet.v1", "GRPCInferenceService": "inference"}

_CLOSE_SECONDS = 5.0
_NUM_TASKS = 16


def is_wanted(settings: TracingSettings) -> bool:
    """Returns whether the settings or OpenTelemetry's own variables ask for traces.

    Raises:
        SettingsError: they ask for what is not here.
    """
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = os.environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if settings.otlp_endpoint is None:
        if exporter == "none" or not (exporter or any(os.environ.get(name) for name in _ENDPOINT_VARIABLES)):
            return False
        if exporter not in ("", "otlp"):
            raise SettingsError("OTEL_TRACES_EXPORTER", exporter, "otlp or none")
    for name in _PROTOCOL_VARIABLES:
        protocol = os.environ.get(name, "").strip()
        if protocol not in ("", _PROTOCOL):
            raise SettingsError(name, protocol, f"{_PROTOCOL}, which collectors take on port 4318")
    return True


class Tracing:
    """Makes traces. For any thread.

    Args:
        settings: where they go.
        processor: takes ended spans instead of sending them there.

    Raises:
        SettingsError: OpenTelemetry is not installed.
    """

    def __init__(self, settings: TracingSettings, processor: SpanProcessor | None = None) -> None:
        try:
            from opentelemetry import propagate, trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            found = f"a Python without OpenTelemetry ({error})"
            raise SettingsError(
                "tracing", found, "opentelemetry-sdk and its OTLP exporter; install 'munet[server,otel]'"
            ) from error
        self._trace = trace
        self._extract = propagate.extract
        resource = Resource.create({"service.version": munet.__version__})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "munet-server"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        if processor is None:
            base = settings.otlp_endpoint
            endpoint = f"{base.rstrip('/')}/v1/traces" if base is not None else None
            processor = BatchSpanProcessor(OTLPSpanExporter(endpoint))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("munet", munet.__version__)

    def begin(self, call: CallContext, metadata: Iterable[tuple[str, str | bytes]]) -> Span:
        """Begins the span of a call, within its caller's trace if the metadata names one, and has the call hear of segments' runs.

        Args:
            call: which.
            metadata: that it came with; W3C's `traceparent`, unless OTEL_PROPAGATORS names others.
        """
        trace = self._trace
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        span = self._tracer.start_span(
            _full_name(call.method),
            self._extract(carrier),
            trace.SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": _full_name(call.method), "munet.request_id": call.request_id},
        )
        if span.is_recording():
            call.trace_id = trace.format_trace_id(span.get_span_context().trace_id)
            parent = trace.set_span_in_context(span)
            # Engines and spans have different clocks. What lies between them may change while a server runs, hardly while a call does.
            offset_ns = time.time_ns() - time.monotonic_ns()
            call.on_run = lambda run: self._record(run, parent, offset_ns)
        return span

    def end(self, span: Span, call: CallContext, status: str) -> None:
        """Ends the span of a call.

        Args:
            span: what `begin` returned.
            call: the call, as it is now.
            status: name of its gRPC status.
        """
        if span.is_recording():
            span.set_attribute("rpc.response.status_code", status)
            if call.tasks:
                span.set_attribute("munet.tasks", call.tasks[:_NUM_TASKS])
                span.set_attribute("munet.num_tasks", len(call.tasks))
            if status in _FAULTS:
                span.set_attribute("error.type", status)
                span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Sends what has not been sent, for some seconds at most."""
        # The exporter tries for longer than a server may take to stop where nobody listens.
        closing = threading.Thread(target=self._provider.shutdown, name="tracing", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)

    def _record(self, run: SegmentRun, parent: Any, offset_ns: int) -> None:
        span = self._tracer.start_span(
            f"segment {run.segment}",
            parent,
            attributes={
                "munet.segment": run.segment,
                "munet.rows": run.num_rows,
                "munet.batch.rows": run.batch_rows,
                "munet.batch.requests": run.batch_questions,
                "munet.queue_seconds": run.waited_seconds,
            },
            start_time=round(run.started_seconds * 1e9) + offset_ns,
        )
        span.end(round(run.ended_seconds * 1e9) + offset_ns)


def _full_name(method: str) -> str:
    package = _PACKAGES.get(method.partition("/")[0])
    return f"{package}.{method}" if package else method
