"""Who may make which call: bearer tokens, asked for before a byte of the request is read."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from server.access import NOTHING, Grant, Role, set_grant
from server.errors import AccessError, ForbiddenError, UnauthenticatedError, reason_of
from server.front_door.call_book import CallBook
from server.front_door.edge import Context
from server.front_door.status import status_of
from server.tokens import TokenFile

_READ = (
    "munet.v1.InferenceService/ListTasks",
    "munet.v1.InferenceService/GetTask",
    "munet.v1.InferenceService/WatchTasks",
    "inference.GRPCInferenceService/ServerMetadata",
    "inference.GRPCInferenceService/ModelReady",
    "inference.GRPCInferenceService/ModelMetadata",
    "inference.GRPCInferenceService/ModelConfig",
    "inference.GRPCInferenceService/ModelStatistics",
    "inference.GRPCInferenceService/RepositoryIndex",
    "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
)
_INFER = (
    "munet.v1.InferenceService/Classify",
    "munet.v1.InferenceService/ClassifyTasks",
    "munet.v1.InferenceService/ClassifyStream",
    "inference.GRPCInferenceService/ModelInfer",
    "inference.GRPCInferenceService/ModelStreamInfer",
)
_OPEN = (
    "grpc.health.v1.Health/Check",
    "grpc.health.v1.Health/Watch",
    "inference.GRPCInferenceService/ServerLive",
    "inference.GRPCInferenceService/ServerReady",
)
ROLE_OF_METHOD = {
    **dict.fromkeys(_OPEN, Role.NOBODY),
    **dict.fromkeys(_READ, Role.READ),
    **dict.fromkeys(_INFER, Role.INFER),
}
"""The least role that may make a call. Whatever is not named here is administration."""

_SCHEME = "bearer "


class Doorkeeper(grpc.aio.ServerInterceptor):
    """Asks every call for its token and says to what comes after it what the caller may do, see `server.access`.

    Comes before every other interceptor. A call that is refused is never parsed, nor is its message received. A stream whose token
    stops being valid ends before its next message or answer.

    Args:
        tokens: who may call.
        book: where refusals are entered.
    """

    def __init__(self, tokens: TokenFile, book: CallBook) -> None:
        self._tokens = tokens
        self._book = book

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Returns the handler of a call, or one that refuses it."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method.removeprefix("/")
        token = _token_of(handler_call_details.invocation_metadata or ())
        try:
            grant = self._admit(method, token)
        except AccessError as error:
            return self._refusal(method, error)
        # This coroutine runs in the call's own asyncio task.
        set_grant(grant)
        if handler.response_streaming and token is not None:
            return self._watched(handler, method, token, grant)
        return handler

    def _admit(self, method: str, token: str | None) -> Grant:
        needed = ROLE_OF_METHOD.get(method, Role.ADMIN)
        grant = self._tokens.tokens.find(token) if token is not None else None
        if grant is None:
            if needed is Role.NOBODY:
                return NOTHING
            raise UnauthenticatedError
        if grant.role < needed:
            raise ForbiddenError
        return grant

    def _refusal(self, method: str, error: AccessError) -> grpc.RpcMethodHandler[Any, Any]:
        async def refuse(_: Any, context: Context) -> AsyncIterator[bytes]:
            await self._abort(context, method, error)
            yield b""

        # To the caller every kind of call looks alike, and of a stream gRPC receives nothing that nobody asks for.
        return grpc.stream_stream_rpc_method_handler(refuse)

    def _watched(
        self, handler: grpc.RpcMethodHandler[Any, Any], method: str, token: str, grant: Grant
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Returns a handler of a stream of answers that ends once the token does not grant the same any more."""
        behaviour: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream

        def is_valid() -> bool:
            return self._tokens.tokens.find(token) == grant

        async def end(context: Context) -> None:
            await self._abort(context, method, UnauthenticatedError())

        async def yielding(request: Any, context: Context) -> AsyncIterator[Any]:
            async for answer in behaviour(request, context):
                if not is_valid():
                    await end(context)
                yield answer

        async def writing(request: Any, context: Context) -> None:
            watched = _WatchedContext(context, is_valid, handler.request_streaming)
            with contextlib.suppress(UnauthenticatedError):
                await behaviour(request, watched)
            if watched.is_over:
                await end(context)

        watched = yielding if inspect.isasyncgenfunction(behaviour) else writing
        make = grpc.stream_stream_rpc_method_handler if handler.request_streaming else grpc.unary_stream_rpc_method_handler
        return make(watched, handler.request_deserializer, handler.response_serializer)

    async def _abort(self, context: Context, method: str, error: AccessError) -> None:
        short = method.removeprefix("munet.v1.").removeprefix("inference.")
        opened = self._book.open(short, context.invocation_metadata() or ())
        self._book.close(opened, status_of(error), reason_of(error))
        await context.abort(status_of(error), str(error), opened.metadata)


class _WatchedContext:
    """The context of a stream whose handler reads and writes itself. Once the token is not valid, the stream has no more messages and
    what is written goes nowhere.

    Args:
        context: gRPC's.
        is_valid: whether the token still is.
        has_messages: whether the handler learns of the end by reading; one that only writes is told by an error.
    """

    def __init__(self, context: Context, is_valid: Callable[[], bool], has_messages: bool) -> None:
        self._context = context
        self._is_valid = is_valid
        self._has_messages = has_messages
        self._reading: asyncio.Future[Any] | None = None
        self.is_over = False

    async def read(self) -> Any:
        """Returns the next message, or gRPC's mark of the end."""
        if self._ends():
            return grpc.aio.EOF
        self._reading = asyncio.ensure_future(self._context.read())
        try:
            message = await self._reading
        except asyncio.CancelledError:
            if self.is_over:
                return grpc.aio.EOF
            raise
        return grpc.aio.EOF if self._ends() else message

    async def write(self, message: Any) -> None:
        """Sends an answer.

        Raises:
            UnauthenticatedError: the token is not valid any more, of a stream of answers.
        """
        if not self._ends():
            await self._context.write(message)
        elif not self._has_messages:
            raise UnauthenticatedError
        elif self._reading is not None:
            # Its caller may send nothing more before it has this answer.
            self._reading.cancel()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def _ends(self) -> bool:
        self.is_over = self.is_over or not self._is_valid()
        return self.is_over


def _token_of(metadata: Sequence[tuple[str, str | bytes]]) -> str | None:
    """Returns the token that a call came with; None if it has none, or several."""
    values = [value for key, value in metadata if key == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str) or values[0][: len(_SCHEME)].lower() != _SCHEME:
        return None
    return values[0][len(_SCHEME) :].strip()
