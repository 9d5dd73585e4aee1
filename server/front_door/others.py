"""Calls of services that others wrote, health and reflection: when they fail, callers are told in this server's words.

gRPC itself would answer UNKNOWN with the names of our classes, and write a trace into the log for whatever a stranger sends.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf import message

from server.errors import MalformedRequestError
from server.front_door.edge import Context
from server.front_door.status import INTERNAL_TEXT, status_of

_log = logging.getLogger(__name__)


class OthersServices(grpc.aio.ServerInterceptor):
    """Wraps every call of some services.

    Args:
        services: their full names.
    """

    def __init__(self, *services: str) -> None:
        self._services = frozenset(services)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Returns the handler of a call, wrapped."""
        handler: Any = await continuation(handler_call_details)
        service, _, _ = handler_call_details.method.removeprefix("/").rpartition("/")
        if handler is None or service not in self._services:
            return handler
        wrapped = _Wrapped(handler_call_details.method, service, handler)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(wrapped.call, wrapped.parse, handler.response_serializer)
        make = grpc.unary_stream_rpc_method_handler if handler.unary_stream is not None else grpc.stream_stream_rpc_method_handler
        return make(wrapped.stream, wrapped.parse, handler.response_serializer)


class _Wrapped:
    """A handler whose failures are told in words."""

    def __init__(self, method: str, service: str, handler: Any) -> None:
        self._method = method
        self._service = service
        self._handler = handler

    def parse(self, content: bytes) -> Any:
        """Returns a request, or the error that it is none, for gRPC would not let its caller know."""
        try:
            return self._handler.request_deserializer(content)
        except message.DecodeError:
            expected = self._handler.request_deserializer.__self__.DESCRIPTOR.name
            return MalformedRequestError(expected, f"the definition of {self._service}")

    async def call(self, request: Any, context: Context) -> Any:
        """Answers one request."""
        try:
            return await self._handler.unary_unary(_parsed(request), context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            # The edge of the process, as in `server.front_door.edge`: the caller gets a status.
            await self._abort(error, context)

    async def stream(self, given: Any, context: Context) -> AsyncIterator[Any]:
        """Answers one request, or a stream of them, with a stream."""
        try:
            async with contextlib.aclosing(self._answers(given, context)) as answers:
                async for answer in answers:
                    yield answer
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await self._abort(error, context)

    def _answers(self, given: Any, context: Context) -> AsyncGenerator[Any, None]:
        if self._handler.unary_stream is not None:
            answers = self._handler.unary_stream(_parsed(given), context)
        else:
            answers = self._handler.stream_stream(_each_parsed(given), context)
        return cast(AsyncGenerator[Any, None], answers)

    async def _abort(self, error: Exception, context: Context) -> None:
        words = str(error)
        if not isinstance(error, MalformedRequestError):
            # The edge of the process, as for our own services.
            error_id = secrets.token_hex(6)
            _log.error("%s failed, id %s", self._method, error_id, exc_info=error)
            words = INTERNAL_TEXT.format(id=error_id)
        await context.abort(status_of(error), words)


def _parsed(request: Any) -> Any:
    """Returns a request, unless `_Wrapped.parse` found that it is none."""
    if isinstance(request, MalformedRequestError):
        raise request
    return request


async def _each_parsed(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _parsed(request)
