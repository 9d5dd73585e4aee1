"""The Python client: `Client` blocks, `AsyncClient` is awaited; `AdminClient` and `AsyncAdminClient` for whoever operates a server.

    with Client("127.0.0.1:8500") as client:
        result = client.classify("digits", pathlib.Path("seven.png"), top_k=3)
        print(result.classifications[0].top.label)

Each call is written once, in `server.calls`: what its method takes, its request, how its answer is read; and so is, in `server.bulk`,
how many questions are asked. The classes here only differ in how they wait. What they return (`server.results`) and raise
(`server.errors` under `CallError`) can be imported from here too.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

import grpc
import grpc.aio

from server import bulk, calls
from server.bulk import StreamQuestion
from server.calls import DEFAULT_TIMEOUT_SECONDS, Call, Image
from server.credentials import Credentials
from server.errors import (
    CallDeniedError,
    CallError,
    CallRefusedError,
    CallTimeoutError,
    ClientClosedError,
    ServerBusyError,
    ServerFailedError,
    ServerUnreachableError,
    TaskNotFoundError,
)
from server.results import (
    CanaryStatus,
    Classification,
    ClassifyResult,
    ClassifyTasksResult,
    FileAnswer,
    LabelProbability,
    ReloadReport,
    ReloadResult,
    RollbackResult,
    SegmentCounters,
    SegmentMemory,
    ServerStatus,
    StreamAnswer,
    TaskChanges,
    TaskClassification,
    TaskInfo,
    TaskList,
)
from server.retries import DEFAULT_RETRY, Retry
from server.sending import Sender
from server.transports import AsyncioTransport, BlockingTransport, finish, iterated

__all__ = [
    "DEFAULT_TIMEOUT_SECONDS",
    "AdminClient",
    "AsyncAdminClient",
    "AsyncClient",
    "CallDeniedError",
    "CallError",
    "CallRefusedError",
    "CallTimeoutError",
    "CanaryStatus",
    "Classification",
    "ClassifyResult",
    "ClassifyTasksResult",
    "Client",
    "ClientClosedError",
    "Credentials",
    "FileAnswer",
    "Image",
    "LabelProbability",
    "ReloadReport",
    "ReloadResult",
    "Retry",
    "RollbackResult",
    "SegmentCounters",
    "SegmentMemory",
    "ServerBusyError",
    "ServerFailedError",
    "ServerStatus",
    "ServerUnreachableError",
    "StreamAnswer",
    "StreamQuestion",
    "TaskChanges",
    "TaskClassification",
    "TaskInfo",
    "TaskList",
    "TaskNotFoundError",
]

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


_Many = Callable[Concatenate[Sender, _P], AsyncGenerator[_T, None]]


def _blocking_many(ask: _Many[_P, _T]) -> Callable[Concatenate[_Blocking, _P], Iterator[_T]]:
    """Makes a method that gives answers as they come, and blocks meanwhile."""

    def method(self: _Blocking, /, *args: _P.args, **kwargs: _P.kwargs) -> Iterator[_T]:
        return iterated(ask(self._sender, *args, **kwargs))

    functools.update_wrapper(method, ask)
    return method


def _awaited_many(ask: _Many[_P, _T]) -> Callable[Concatenate[_Awaited, _P], AsyncGenerator[_T, None]]:
    """Makes a method that gives answers as they come, to `async for`."""

    def method(self: _Awaited, /, *args: _P.args, **kwargs: _P.kwargs) -> AsyncGenerator[_T, None]:
        return ask(self._sender, *args, **kwargs)

    functools.update_wrapper(method, ask)
    return method


class _Blocking:
    """Sends calls and waits for their answers. May be used from several threads at once.

    Args:
        server: HOST:PORT.
        channel: an open channel to use instead; it is closed with the client.
        credentials: TLS and token; none means plain text and no token.
        retry: how calls that do no harm twice are sent again; none means never.

    Raises:
        SettingsError: the credentials cannot be used, or the token would cross a network in plain text.
    """

    def __init__(
        self,
        server: str,
        channel: grpc.Channel | None = None,
        credentials: Credentials | None = None,
        retry: Retry | None = DEFAULT_RETRY,
    ) -> None:
        self.server = server
        self._transport = BlockingTransport(server, channel, credentials)
        self._sender = Sender(self._transport, retry)

    def send(self, call: Call[_T]) -> _T:
        """Sends a call.

        Raises:
            CallError: it failed.
        """
        return finish(self._sender.send(call))

    def close(self) -> None:
        """Closes the connection; calls under way and later ones raise ClientClosedError."""
        self._transport.close()

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
        retry: how calls that do no harm twice are sent again; none means never.

    Raises:
        SettingsError: the credentials cannot be used, or the token would cross a network in plain text.
    """

    def __init__(
        self,
        server: str,
        channel: grpc.aio.Channel | None = None,
        credentials: Credentials | None = None,
        retry: Retry | None = DEFAULT_RETRY,
    ) -> None:
        self.server = server
        self._transport = AsyncioTransport(server, channel, credentials)
        self._sender = Sender(self._transport, retry)

    async def send(self, call: Call[_T]) -> _T:
        """Sends a call.

        Raises:
            CallError: it failed.
        """
        return await self._sender.send(call)

    async def close(self) -> None:
        """Closes the connection; calls under way and later ones raise ClientClosedError."""
        await self._transport.close()

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
        retry: how calls that do no harm twice are sent again; none means never.

    Raises:
        SettingsError: the credentials cannot be used, or the token would cross a network in plain text.
    """

    classify = _blocking(calls.classify)
    classify_tasks = _blocking(calls.classify_tasks)
    classify_stream = _blocking_many(bulk.classify_stream)
    classify_files = _blocking_many(bulk.classify_files)
    list_tasks = _blocking(calls.list_tasks)
    get_task = _blocking(calls.get_task)
    watch_tasks = _blocking_many(bulk.watch_tasks)


class AsyncClient(_Awaited):
    """Asks a server questions by task name, for asyncio. Paths are read where they are named, before anything is awaited.

    Args:
        server: HOST:PORT.
        channel: an open channel to use instead; it is closed with the client.
        credentials: TLS and token; none means plain text and no token.
        retry: how calls that do no harm twice are sent again; none means never.

    Raises:
        SettingsError: the credentials cannot be used, or the token would cross a network in plain text.
    """

    classify = _awaited(calls.classify)
    classify_tasks = _awaited(calls.classify_tasks)
    classify_stream = _awaited_many(bulk.classify_stream)
    classify_files = _awaited_many(bulk.classify_files)
    list_tasks = _awaited(calls.list_tasks)
    get_task = _awaited(calls.get_task)
    watch_tasks = _awaited_many(bulk.watch_tasks)


class AdminClient(_Blocking):
    """Asks a server's admin address. May be used from several threads at once.

    Args:
        server: HOST:PORT of the admin service.
        channel: an open channel to use instead; it is closed with the client.
        credentials: TLS and token; none means plain text and no token.
        retry: how calls that do no harm twice are sent again; none means never.

    Raises:
        SettingsError: the credentials cannot be used, or the token would cross a network in plain text.
    """

    status = _blocking(calls.status)
    reload = _blocking(calls.reload)
    rollback = _blocking(calls.rollback)
    drain = _blocking(calls.drain)


class AsyncAdminClient(_Awaited):
    """Asks a server's admin address, for asyncio.

    Args:
        server: HOST:PORT of the admin service.
        channel: an open channel to use instead; it is closed with the client.
        credentials: TLS and token; none means plain text and no token.
        retry: how calls that do no harm twice are sent again; none means never.

    Raises:
        SettingsError: the credentials cannot be used, or the token would cross a network in plain text.
    """

    status = _awaited(calls.status)
    reload = _awaited(calls.reload)
    rollback = _awaited(calls.rollback)
    drain = _awaited(calls.drain)
