"""What every call passes at the server's edge: errors become statuses, requests in flight are bounded, all of it is counted."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf import message

from server.config import Limits
from server.errors import DeadlineError, MalformedRequestError, OverloadedError, UnavailableError
from server.front_door.status import INTERNAL_TEXT, status_of, trailing_metadata_of, words_of
from server.metrics import Metrics

_log = logging.getLogger(__name__)

_PACKAGE = "/munet.v1."

# Words travel in a header. Above 8 KiB of headers, gRPC's receiving side refuses some at random, at 16 KiB all.
_MAX_DETAILS_BYTES = 6000

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Behaviour = Callable[[Any, Context], Awaitable[Any]]


class _Malformed:
    """Stands for a request whose bytes do not parse."""


class Edge(grpc.aio.ServerInterceptor):
    """Wraps every call of this project's services; health and reflection pass untouched.

    Args:
        limits: how much may be in flight.
        metrics: where calls are counted.
    """

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self._limits = limits
        self._metrics = metrics
        self._num_requests = 0
        self._num_bytes = 0
        self.shutting_down = False

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Returns the handler of a call, wrapped."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or handler.unary_unary is None or not method.startswith(_PACKAGE):
            return handler
        behaviour: Behaviour = handler.unary_unary  # type: ignore[assignment]
        parse: Callable[[bytes], Any] = handler.request_deserializer  # type: ignore[assignment]

        def parse_or_mark(content: bytes) -> Any:
            try:
                return parse(content)
            except message.DecodeError:
                return _Malformed()

        async def wrapped(request: Any, context: Context) -> Any:
            return await self._call(method.removeprefix(_PACKAGE), behaviour, request, context)

        return grpc.unary_unary_rpc_method_handler(
            wrapped,
            request_deserializer=parse_or_mark,
            response_serializer=handler.response_serializer,
        )

    async def _call(self, method: str, behaviour: Behaviour, request: Any, context: Context) -> Any:
        started = time.monotonic()
        status = grpc.StatusCode.OK
        try:
            return await self._admit(method, behaviour, request, context)
        except asyncio.CancelledError:
            # gRPC cancels the handler when the caller leaves or its deadline passes.
            late = context.time_remaining() is not None and context.time_remaining() <= 0
            status = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            # The edge of the process: whatever happened, the caller gets a status and the server goes on.
            status = status_of(error)
            details = shortened(words_of(error))
            if status is grpc.StatusCode.INTERNAL:
                error_id = secrets.token_hex(6)
                _log.error("%s failed, id %s", method, error_id, exc_info=error)
                details = INTERNAL_TEXT.format(id=error_id)
            await context.abort(status, details, trailing_metadata_of(error))
        finally:
            self._metrics.count_call(method, status.name, time.monotonic() - started)

    async def _admit(self, method: str, behaviour: Behaviour, request: Any, context: Context) -> Any:
        if isinstance(request, _Malformed):
            raise MalformedRequestError(f"{method.rpartition('/')[2]}Request")
        if self.shutting_down:
            raise UnavailableError("shutting down")
        num_bytes = request.ByteSize()
        limits = self._limits
        if self._num_requests >= limits.max_requests_in_flight:
            raise OverloadedError("requests in flight", self._num_requests, limits.max_requests_in_flight)
        # A request larger than the bound is taken when nothing else is in flight: the limit of messages bounds its size.
        if self._num_bytes and self._num_bytes + num_bytes > limits.max_bytes_in_flight:
            raise OverloadedError("bytes of requests in flight", self._num_bytes, limits.max_bytes_in_flight)
        self._num_requests += 1
        self._num_bytes += num_bytes
        try:
            return await behaviour(request, context)
        finally:
            self._num_requests -= 1
            self._num_bytes -= num_bytes


def shortened(words: str) -> str:
    """Returns as much of an error's words as a gRPC header surely carries; what was cut off is marked."""
    left = _MAX_DETAILS_BYTES
    for index, character in enumerate(words):
        encoded = character.encode("utf-8", "replace")
        # gRPC writes bytes that are not printable ASCII, and the percent sign, as three.
        left -= sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in encoded)
        if left < 0:
            return words[:index] + "..."
    return words


def deadline_of(context: Context) -> float | None:
    """Returns a call's deadline on the clock of `time.monotonic`; none if it has none.

    Raises:
        DeadlineError: it has passed.
    """
    remaining: float | None = context.time_remaining()
    if remaining is None:
        return None
    if remaining <= 0:
        raise DeadlineError
    return time.monotonic() + remaining
