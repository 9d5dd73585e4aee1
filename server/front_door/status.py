"""The one table from error classes to gRPC statuses."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from server.errors import (
    AccessError,
    DeadlineError,
    EndpointError,
    EngineClosedError,
    ForbiddenError,
    NoCanaryError,
    NoEndpointError,
    OverloadedError,
    RepositoryError,
    RequestError,
    ServerError,
    UnavailableError,
    UnknownTaskError,
    UnknownVersionError,
    UnsupportedError,
)

# An error has the status of the most special of its classes that stands here. What stands nowhere is INTERNAL: its words are for
# the log, the caller gets an id.
STATUS_OF_ERROR: dict[type[ServerError], grpc.StatusCode] = {
    UnknownTaskError: grpc.StatusCode.NOT_FOUND,
    UnknownVersionError: grpc.StatusCode.NOT_FOUND,
    NoCanaryError: grpc.StatusCode.NOT_FOUND,
    UnsupportedError: grpc.StatusCode.UNIMPLEMENTED,
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    AccessError: grpc.StatusCode.UNAUTHENTICATED,
    ForbiddenError: grpc.StatusCode.PERMISSION_DENIED,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    OverloadedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    EngineClosedError: grpc.StatusCode.UNAVAILABLE,
    EndpointError: grpc.StatusCode.UNAVAILABLE,
    RepositoryError: grpc.StatusCode.FAILED_PRECONDITION,
}

INTERNAL_TEXT = "the server failed to answer; its log says why under the id {id}"

LOST_TEXT = (
    "this server cannot answer this now: found what computes here out of reach, "
    "expected it there; ask again later, or another one"
)
"""Where Tritons are is no business of whoever asks questions. The log has it, and Status on the admin address."""

RETRY_KEY = "retry-after-ms"
"""Trailing metadata of RESOURCE_EXHAUSTED: when another try makes sense, in milliseconds."""

DETAILS_KEY = "grpc-status-details-bin"
"""Trailing metadata that all of gRPC's libraries know: a `google.rpc.Status`, here with a `google.rpc.RetryInfo` that says the same."""


def status_of(error: BaseException) -> grpc.StatusCode:
    """Returns the status of an error; INTERNAL if the table does not have it."""
    for cls in type(error).__mro__:
        if cls in STATUS_OF_ERROR:
            return STATUS_OF_ERROR[cls]
    return grpc.StatusCode.INTERNAL


def words_of(error: BaseException) -> str:
    """Returns what a caller is told of an error: its own words, without the addresses of what computes."""
    return LOST_TEXT if isinstance(error, EndpointError | NoEndpointError) else str(error)


def retry_after_seconds_of(error: BaseException) -> float | None:
    """Returns when another try makes sense after an error; None if nobody knows."""
    return error.retry_after_seconds if isinstance(error, OverloadedError) else None


def trailing_metadata_of(error: BaseException) -> tuple[tuple[str, str | bytes], ...]:
    """Returns what goes with an error beside its words."""
    seconds = retry_after_seconds_of(error)
    if seconds is None:
        return ()
    milliseconds = max(1, round(seconds * 1000))
    delay = duration_pb2.Duration()
    delay.FromMilliseconds(milliseconds)
    detail = any_pb2.Any()
    detail.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    code: int = status_of(error).value[0]
    status = status_pb2.Status(code=code, message=words_of(error), details=[detail])
    return (RETRY_KEY, str(milliseconds)), (DETAILS_KEY, status.SerializeToString())
