from __future__ import annotations

import grpc
from google.rpc import error_details_pb2, status_pb2

from server import errors
from server.front_door.status import DETAILS_KEY, LOST_TEXT, STATUS_OF_ERROR, status_of, trailing_metadata_of, words_of


def test_each_error_has_the_status_of_its_most_special_class() -> None:
    assert status_of(errors.UnknownTaskError("a", [], 1)) is grpc.StatusCode.NOT_FOUND
    assert status_of(errors.ImageRefusedError("images[0]", "bad")) is grpc.StatusCode.INVALID_ARGUMENT
    assert status_of(errors.DeadlineError()) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert status_of(errors.GenerationRefusedError(1, [errors.Finding("a", "b", "c")])) is grpc.StatusCode.FAILED_PRECONDITION
    assert status_of(errors.EngineClosedError()) is grpc.StatusCode.UNAVAILABLE
    assert status_of(errors.SegmentRunError("seg-a", "x")) is grpc.StatusCode.INTERNAL
    assert status_of(KeyError("bug")) is grpc.StatusCode.INTERNAL
    assert grpc.StatusCode.INTERNAL not in STATUS_OF_ERROR.values()


def test_overload_comes_with_a_hint() -> None:
    error = errors.OverloadedError("rows", 5, 4, 0.25)
    plain, (key, details) = trailing_metadata_of(error)
    assert plain == ("retry-after-ms", "250")
    assert key == DETAILS_KEY
    assert isinstance(details, bytes)
    status = status_pb2.Status.FromString(details)
    assert (status.code, status.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], str(error))
    hint = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(hint)
    assert hint.retry_delay.ToTimedelta().total_seconds() == 0.25
    assert trailing_metadata_of(errors.DeadlineError()) == ()


def test_addresses_of_what_computes_are_told_to_nobody_who_asks() -> None:
    for error in (
        errors.NoEndpointError(["digits"], ["10.1.2.3:8001 is down: refused"]),
        errors.EndpointGoneError("10.1.2.3:8001", "refused"),
        errors.ModelFailedError("10.1.2.3:8001", "/var/lib/models/seg-1/1/model.onnx"),
    ):
        assert status_of(error) is grpc.StatusCode.UNAVAILABLE
        assert words_of(error) == LOST_TEXT
        assert "found what computes here out of reach, expected it there" in LOST_TEXT
    assert words_of(errors.UnavailableError("shutting down")).startswith(
        "this server cannot answer this now: found it shutting down"
    )


def test_access_is_denied_with_the_same_words_always() -> None:
    assert status_of(errors.UnauthenticatedError()) is grpc.StatusCode.UNAUTHENTICATED
    assert status_of(errors.ForbiddenError()) is grpc.StatusCode.PERMISSION_DENIED
