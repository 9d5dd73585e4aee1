"""The Python client: `Client` blocks, `AsyncClient` is awaited; `AdminClient` and `AsyncAdminClient` for whoever operates a server.

    with Client("127.0.0.1:8500") as client:
        result = client.classify("digits", pathlib.Path("seven.png"), top_k=3)
        print(result.classifications[0].top.label)

Each call is written once, in `server.calls`: what its method takes, its request, how its answer is read. The classes here only differ in
how they send it. What they return (`server.results`) and raise (`server.errors` under `CallError`) can be imported from here too.
"""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

import grpc
import grpc.aio

from server import calls
from server.calls import DEFAULT_TIMEOUT_SECONDS, Call, Image
from server.credentials import Credentials
from server.errors import (
    CallDeniedError,
    CallError,
    CallRefusedError,
    CallTimeoutError,
    ServerBusyError,
    ServerFailedError,
    ServerUnreachableError,
    TaskNotFoundError,
)
from server.results import (
    Classification,
    ClassifyResult,
    ClassifyTasksResult,
    LabelProbability,
    ReloadReport,
    ReloadResult,
    SegmentCounters,
    ServerStatus,
    TaskClassification,
    TaskInfo,
    TaskList,
)

__all__ = [
    "DEFAULT_TIMEOUT_SECONDS",
    "AdminClient",
    "AsyncAdminClient",
    "AsyncClient",
    "CallDeniedError",
    "CallError",
    "CallRefusedError",
    "CallTimeoutError",
    "Classification",
    "ClassifyResult",
    "ClassifyTasksResult",
    "Client",
    "Credentials",
    "Image",
    "LabelProbability",
    "ReloadReport",
    "ReloadResult",
    "SegmentCounters",
    "ServerBusyError",
    "ServerFailedError",
    "ServerStatus",
    "ServerUnreachableError",
    "TaskClassification",
    "TaskInfo",
    "TaskList",
    "TaskNotFoundError",
]

_MAX_MESSAGE_BYTES = 1 << 30
_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
)

_ERROR_OF_STATUS: dict[grpc.StatusCode, type[CallError]] = {
    grpc.StatusCode.NOT_FOUND: TaskNotFoundError,
    grpc.StatusCode.INVALID_ARGUMENT: CallRefusedError,
    grpc.StatusCode.FAILED_PRECONDITION: CallRefusedError,
    grpc.StatusCode.UNIMPLEMENTED: CallRefusedError,
    grpc.StatusCode.UNAUTHENTICATED: CallDeniedError,
    grpc.StatusCode.PERMISSION_DENIED: CallDeniedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: CallTimeoutError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ServerBusyError,
    grpc.StatusCode.UNAVAILABLE: ServerUnreachableError,
}

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _blocking(build: Callable[_P, Call[_T]]) -> Callable[Concatenate[_Blocking, _P], _T]:
    """Makes a method that sends the call and waits."""

    def method(self: _Blocking, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self.send(build(*args, **kwargs))

    functools.update_wrapper(method, build)
    return method


def _awaited(build: Callable[_P, Call[_T]]) -> Callable[Concatenate[_Awaited, _P], Awaitable[_T]]:
    """Makes a method that sends the call and is awaited."""

    def method(self: _Awaited, /, *args: _P.args, **kwargs: _P.kwargs) -> Awaitable[_T]:
        return self.send(build(*args, **kwargs))

    functools.update_wrapper(method, build)
    return method


class _Blocking:
    """Sends calls and waits for their answers. May be used from several threads at once.

    Args:
        server: HOST:PORT.
        channel: an open channel to use instead; it is closed with the client.
        credentials: TLS and token; none means plain text and no token.

    Raises:
        SettingsError: the credentials cannot be used, or the token would cross a network in plain text.
    """

    def __init__(self, server: str, channel: grpc.Channel | None = None, credentials: Credentials | None = None) -> None:
        self.server = server
        credentials = credentials or Credentials()
        self._metadata = credentials.metadata(server if channel is None else None)
        if channel is None:
            tls = _channel_credentials(credentials)
            options = _options(credentials)
            channel = grpc.secure_channel(server, tls, options) if tls else grpc.insecure_channel(server, options)
        self._channel = channel

    def send(self, call: Call[_T]) -> _T:
        """Sends a call.

        Raises:
            CallError: it failed.
        """
        method = self._channel.unary_unary(call.method, type(call.request).SerializeToString, call.response.FromString)
        try:
            return call.read(method(call.request, timeout=call.timeout_seconds, metadata=self._metadata))
        except grpc.RpcError as error:
            raise _to_call_error(self.server, call.method, error) from error

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


class _Awaited:
    """Sends calls and awaits their answers. For one event loop. Cancelling a call cancels it at the server.

    Args:
        server: HOST:PORT.
        channel: an open channel to use instead; it is closed with the client.
        credentials: TLS and token; none means plain text and no token.

    Raises:
        SettingsError: the credentials cannot be used, or the token would cross a network in plain text.
    """

    def __init__(self, server: str, channel: grpc.aio.Channel | None = None, credentials: Credentials | None = None) -> None:
        self.server = server
        credentials = credentials or Credentials()
        self._metadata = credentials.metadata(server if channel is None else None)
        if channel is None:
            tls = _channel_credentials(credentials)
            options = _options(credentials)
            channel = grpc.aio.secure_channel(server, tls, options) if tls else grpc.aio.insecure_channel(server, options)
        self._channel = channel

    async def send(self, call: Call[_T]) -> _T:
        """Sends a call.

        Raises:
            CallError: it failed.
        """
        method = self._channel.unary_unary(call.method, type(call.request).SerializeToString, call.response.FromString)
        try:
            return call.read(await method(call.request, timeout=call.timeout_seconds, metadata=self._metadata))
        except grpc.RpcError as error:
            raise _to_call_error(self.server, call.method, error) from error

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class Client(_Blocking):
    """Asks a server questions by task name. May be used from several threads at once.

    Args:
        server: HOST:PORT.
        channel: an open channel to use instead; it is closed with the client.
        credentials: TLS and token; none means plain text and no token.

    Raises:
        SettingsError: the credentials cannot be used, or the token would cross a network in plain text.
    """

    classify = _blocking(calls.classify)
    classify_tasks = _blocking(calls.classify_tasks)
    list_tasks = _blocking(calls.list_tasks)
    get_task = _blocking(calls.get_task)


class AsyncClient(_Awaited):
    """Asks a server questions by task name, for asyncio. Paths are read where they are named, before anything is awaited.

    Args:
        server: HOST:PORT.
        channel: an open channel to use instead; it is closed with the client.
        credentials: TLS and token; none means plain text and no token.

    Raises:
        SettingsError: the credentials cannot be used, or the token would cross a network in plain text.
    """

    classify = _awaited(calls.classify)
    classify_tasks = _awaited(calls.classify_tasks)
    list_tasks = _awaited(calls.list_tasks)
    get_task = _awaited(calls.get_task)


class AdminClient(_Blocking):
    """Asks a server's admin address. May be used from several threads at once.

    Args:
        server: HOST:PORT of the admin service.
        channel: an open channel to use instead; it is closed with the client.
        credentials: TLS and token; none means plain text and no token.

    Raises:
        SettingsError: the credentials cannot be used, or the token would cross a network in plain text.
    """

    status = _blocking(calls.status)
    reload = _blocking(calls.reload)


class AsyncAdminClient(_Awaited):
    """Asks a server's admin address, for asyncio.

    Args:
        server: HOST:PORT of the admin service.
        channel: an open channel to use instead; it is closed with the client.
        credentials: TLS and token; none means plain text and no token.

    Raises:
        SettingsError: the credentials cannot be used, or the token would cross a network in plain text.
    """

    status = _awaited(calls.status)
    reload = _awaited(calls.reload)


def _channel_credentials(credentials: Credentials) -> grpc.ChannelCredentials | None:
    """Returns what a channel with TLS needs; None for plain text."""
    if not credentials.speaks_tls:
        return None
    authorities, key, chain = credentials.read()
    return grpc.ssl_channel_credentials(authorities, key, chain)


def _options(credentials: Credentials) -> tuple[tuple[str, int | str], ...]:
    name = credentials.server_name
    return _OPTIONS if name is None else (*_OPTIONS, ("grpc.ssl_target_name_override", name))


def _to_call_error(server: str, method: str, error: grpc.RpcError) -> CallError:
    # Both transports' errors are calls as well and know their status.
    status: grpc.StatusCode = error.code()
    cls = _ERROR_OF_STATUS.get(status, ServerFailedError)
    return cls(server, method.rpartition("/")[2], status.name, error.details() or "")
