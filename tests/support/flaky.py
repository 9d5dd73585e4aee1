"""A server for tests of clients that answers as it is told."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from munet.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

Failure = tuple[grpc.StatusCode, float | None] | None
"""What a call ends with, and the seconds after which it may be tried again, if it says so; or none, and it goes well."""

# gRPC prescribes the methods' names.
# ruff: noqa: N802


class FlakyServer(inference_pb2_grpc.InferenceServiceServicer, admin_pb2_grpc.AdminServiceServicer):
    """A gRPC server; its calls fail in turn with what stands in `failures`, then succeed.

    Attributes:
        address: HOST:PORT, by default with any free port.
        failures: what the next calls end with.
        remaining_seconds: of each call that came, how much time its caller gave it.
    """

    def __init__(self, address: str = "127.0.0.1:0") -> None:
        self.failures: list[Failure] = []
        self.remaining_seconds: list[float] = []
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(4))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port(address)}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._server.stop(None).wait()

    def ListTasks(self, request: Any, context: Any) -> inference_pb2.ListTasksResponse:
        self._fail(context)
        return inference_pb2.ListTasksResponse(generation=7)

    def Reload(self, request: Any, context: Any) -> admin_pb2.ReloadResponse:
        self._fail(context)
        return admin_pb2.ReloadResponse(generation=7)

    def ClassifyStream(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for request in requests:
            self._fail(context)
            yield inference_pb2.ClassifyStreamResponse(id=request.id, failure=inference_pb2.Failure(code=99, message="words"))

    def _fail(self, context: Any) -> None:
        self.remaining_seconds.append(context.time_remaining())
        failure = self.failures.pop(0) if self.failures else None
        if failure is not None:
            status, seconds = failure
            if seconds is not None:
                context.set_trailing_metadata((("grpc-status-details-bin", details(status, seconds)),))
            context.abort(status, "not now")


def details(status: grpc.StatusCode, retry_after_seconds: float) -> bytes:
    """Returns what a server says beside the status, as gRPC's own libraries say it: something else, and when to come back."""
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(retry_after_seconds * 1e9))
    told = status_pb2.Status(code=status.value[0], message="not now")
    told.details.append(any_pb2.Any(type_url="type.googleapis.com/google.rpc.DebugInfo", value=b"\xff"))
    told.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return told.SerializeToString()
