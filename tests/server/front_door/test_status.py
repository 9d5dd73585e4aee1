from __future__ import annotations

import grpc

from server import errors
from server.front_door.status import STATUS_OF_ERROR, status_of, trailing_metadata_of


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
    assert trailing_metadata_of(errors.OverloadedError("rows", 5, 4, 0.25)) == (("retry-after-ms", "250"),)
    assert trailing_metadata_of(errors.DeadlineError()) == ()
