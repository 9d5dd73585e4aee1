"""What is kept of every call: metrics, a line of the log, and a span where traces are recorded."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable

import grpc

from server.call_context import REQUEST_ID_KEY, CallContext, request_id_of, set_call
from server.logs import told
from server.metrics import Metrics
from server.tracing import Span, Tracing

_access_log = logging.getLogger("server.access_log")

Metadata = Iterable[tuple[str, str | bytes]]


@dataclasses.dataclass(frozen=True, slots=True)
class OpenCall:
    """A call that has begun.

    Attributes:
        call: what the rest of the server knows of it.
        started_seconds: when, on the clock of `time.monotonic`.
        span: its place in its trace; none if no traces are made.
    """

    call: CallContext
    started_seconds: float
    span: Span | None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every answer brings with it."""
        return ((REQUEST_ID_KEY, self.call.request_id),)


class CallBook:
    """Where every call is entered.

    Args:
        metrics: where it is counted.
        logs_access: whether each call is a line at the level `info`, rather than at `debug`.
        tracing: makes traces; none makes none.
    """

    def __init__(self, metrics: Metrics, logs_access: bool = False, tracing: Tracing | None = None) -> None:
        self.metrics = metrics
        self._level = logging.INFO if logs_access else logging.DEBUG
        self._tracing = tracing

    def open(self, method: str, metadata: Metadata, request_id: str = "") -> OpenCall:
        """Begins a call, for the rest of this asyncio task.

        Args:
            method: such as `InferenceService/Classify`.
            metadata: that it came with.
            request_id: its id, if that is known already.
        """
        call = CallContext(request_id or request_id_of(metadata), method)
        set_call(call)
        span = self._tracing.begin(call, metadata) if self._tracing is not None else None
        return OpenCall(call, time.monotonic(), span)

    def close(self, opened: OpenCall, status: grpc.StatusCode, reason: str) -> None:
        """Ends a call.

        Args:
            opened: what `open` returned.
            status: of its answer.
            reason: why it was not answered, by `server.errors.reason_of`; empty if it was.
        """
        seconds = time.monotonic() - opened.started_seconds
        call = opened.call
        self.metrics.count_call(call.method, status.name, seconds)
        if reason:
            self.metrics.count_rejection(reason)
        if _access_log.isEnabledFor(self._level):
            fields = {"status": status.name, "seconds": round(seconds, 6)} | ({"reason": reason} if reason else {})
            why = f" {status.name}{f' ({reason})' if reason else ''}"
            _access_log.log(self._level, "%s%s in %.1f ms", call.method, why, seconds * 1000, extra=told(**fields))
        if opened.span is not None and self._tracing is not None:
            self._tracing.end(opened.span, call, status.name)
