"""What carries a client's calls over gRPC: one transport that blocks, and one for asyncio.

What the blocking one does blocks, so that its coroutines never wait: `finish` runs one in a single step, without an event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf import message
from google.rpc import error_details_pb2, status_pb2

from server.calls import Call
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

MAX_MESSAGE_BYTES = 1 << 30
_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Else gRPC tries a lost connection only after a second, and calls that are sent again before that fail without having been sent.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5000),
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
_STATUS_OF_CODE = {status.value[0]: status for status in grpc.StatusCode}

_DETAILS_KEY = "grpc-status-details-bin"

_T = TypeVar("_T")
_Channel = TypeVar("_Channel")
_Work = Callable[[], Coroutine[Any, Any, Any]]


class BlockingTransport:
    """Carries calls and blocks until they are answered. May be used from several threads at once.

    Args:
        server: HOST:PORT.
        channel: an open channel to use instead; it is closed with the transport.
        credentials: TLS and token; none means plain text and no token.

    Raises:
        SettingsError: the credentials cannot be used, or the token would cross a network in plain text.

    Attributes:
        server: as given.
    """

    def __init__(self, server: str, channel: grpc.Channel | None, credentials: Credentials | None) -> None:
        self.server = server
        self._channel, self._metadata = _connect(server, channel, credentials, grpc.secure_channel, grpc.insecure_channel)
        self._closed = threading.Event()

    async def ask(self, call: Call[_T], timeout_seconds: float | None) -> _T:
        """See `server.sending.Transport`."""
        method = self._channel.unary_unary(call.method, _serialize, call.response.FromString)
        with _our_errors(self.server, call.method, self._closed):
            return call.read(method(call.request, timeout=timeout_seconds, metadata=self._metadata))

    async def receive(self, call: Call[_T]) -> AsyncGenerator[_T, None]:
        """See `server.sending.Transport`."""
        method = self._channel.unary_stream(call.method, _serialize, call.response.FromString)
        with _our_errors(self.server, call.method, self._closed):
            stream = method(call.request, timeout=call.timeout_seconds, metadata=self._metadata)
            try:
                for answer in stream:
                    yield call.read(answer)
            finally:
                stream.cancel()

    async def stream(
        self, call: Call[_T], requests: AsyncGenerator[message.Message, None], timeout_seconds: float | None
    ) -> AsyncGenerator[_T, None]:
        """See `server.sending.Transport`."""
        method = self._channel.stream_stream(call.method, _serialize, call.response.FromString)
        # gRPC asks for the requests in a thread of its own.
        with _our_errors(self.server, call.method, self._closed):
            stream = method(iterated(requests), timeout=timeout_seconds, metadata=self._metadata)
            try:
                for answer in stream:
                    yield call.read(answer)
            finally:
                stream.cancel()

    async def sleep(self, seconds: float) -> None:
        """See `server.sending.Transport`. Closing the transport ends it."""
        self._closed.wait(seconds)

    async def read(self, function: Callable[[], _T]) -> _T:
        """See `server.sending.Transport`."""
        return function()

    def semaphore(self, number: int) -> _BlockingSemaphore:
        """See `server.sending.Transport`."""
        return _BlockingSemaphore(number)

    def crew(self, size: int) -> _Threads:
        """See `server.sending.Transport`."""
        return _Threads(size)

    def close(self) -> None:
        """Closes the connection; calls under way are cancelled."""
        self._closed.set()
        self._channel.close()


class AsyncioTransport:
    """Carries calls for one event loop.

    Args:
        server: HOST:PORT.
        channel: an open channel to use instead; it is closed with the transport.
        credentials: TLS and token; none means plain text and no token.

    Raises:
        SettingsError: the credentials cannot be used, or the token would cross a network in plain text.

    Attributes:
        server: as given.
    """

    def __init__(self, server: str, channel: grpc.aio.Channel | None, credentials: Credentials | None) -> None:
        self.server = server
        self._channel, self._metadata = _connect(server, channel, credentials, grpc.aio.secure_channel, grpc.aio.insecure_channel)
        self._closed = asyncio.Event()

    async def ask(self, call: Call[_T], timeout_seconds: float | None) -> _T:
        """See `server.sending.Transport`."""
        method = self._channel.unary_unary(call.method, _serialize, call.response.FromString)
        with _our_errors(self.server, call.method, self._closed):
            return call.read(await method(call.request, timeout=timeout_seconds, metadata=self._metadata))

    async def receive(self, call: Call[_T]) -> AsyncGenerator[_T, None]:
        """See `server.sending.Transport`."""
        method = self._channel.unary_stream(call.method, _serialize, call.response.FromString)
        with _our_errors(self.server, call.method, self._closed):
            stream = method(call.request, timeout=call.timeout_seconds, metadata=self._metadata)
            try:
                async for answer in stream:
                    yield call.read(answer)
            finally:
                stream.cancel()

    async def stream(
        self, call: Call[_T], requests: AsyncGenerator[message.Message, None], timeout_seconds: float | None
    ) -> AsyncGenerator[_T, None]:
        """See `server.sending.Transport`."""
        method = self._channel.stream_stream(call.method, _serialize, call.response.FromString)
        with _our_errors(self.server, call.method, self._closed):
            stream = method(requests, timeout=timeout_seconds, metadata=self._metadata)
            try:
                async for answer in stream:
                    yield call.read(answer)
            finally:
                stream.cancel()

    async def sleep(self, seconds: float) -> None:
        """See `server.sending.Transport`. Closing the transport ends it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._closed.wait()

    async def read(self, function: Callable[[], _T]) -> _T:
        """See `server.sending.Transport`."""
        return await asyncio.to_thread(function)

    def semaphore(self, number: int) -> asyncio.Semaphore:
        """See `server.sending.Transport`."""
        return asyncio.Semaphore(number)

    def crew(self, size: int) -> _Tasks:
        """See `server.sending.Transport`."""
        return _Tasks()

    async def close(self) -> None:
        """Closes the connection; calls under way are cancelled."""
        self._closed.set()
        await self._channel.close()


class _BlockingSemaphore:
    def __init__(self, number: int) -> None:
        self._semaphore = threading.Semaphore(number)
        self.release = self._semaphore.release

    async def acquire(self) -> None:
        self._semaphore.acquire()


class _Threads:
    def __init__(self, size: int) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(size, "munet-client")

    def start(self, work: _Work) -> concurrent.futures.Future[Any]:
        return self._pool.submit(lambda: finish(work()))

    async def join(self, started: concurrent.futures.Future[Any]) -> Any:
        return started.result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Tasks:
    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: _Work) -> asyncio.Task[Any]:
        task = asyncio.create_task(work())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Else asyncio complains of an error that nobody joined in time to hear of.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        return task

    async def join(self, started: asyncio.Task[Any]) -> Any:
        return await started

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()


def finish(coroutine: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine that never waits.

    Raises:
        RuntimeError: it waits.
    """
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: _T = done.value
        return result
    coroutine.close()
    raise RuntimeError("found a coroutine that waits for an event loop, expected one that blocks")


def iterated(items: AsyncGenerator[_T, None]) -> Iterator[_T]:
    """Gives what a generator gives that never waits, and closes it."""
    try:
        while True:
            try:
                item = finish(items.__anext__())
            except StopAsyncIteration:
                return
            yield item
    finally:
        finish(items.aclose())


def to_call_error(server: str, method: str, code: int, words: str, retry_after_seconds: float | None) -> CallError:
    """Returns what a caller learns of a call, or of a message of a stream, that failed.

    Args:
        server: who was asked.
        method: the call's full name.
        code: of the gRPC status.
        words: the server's.
        retry_after_seconds: when it said that another try makes sense, if it did.
    """
    status = _STATUS_OF_CODE.get(code, grpc.StatusCode.UNKNOWN)
    cls = _ERROR_OF_STATUS.get(status, ServerFailedError)
    return cls(server, method.rpartition("/")[2], status.name, words, retry_after_seconds)


@contextlib.contextmanager
def _our_errors(server: str, method: str, closed: threading.Event | asyncio.Event) -> Iterator[None]:
    """Raises as errors of ours what gRPC raises of a call."""
    asker = asyncio.current_task() if isinstance(closed, asyncio.Event) else None
    num_cancelled = asker.cancelling() if asker is not None else 0
    try:
        yield
    except grpc.RpcError as error:
        if closed.is_set() and error.code() is grpc.StatusCode.CANCELLED:
            raise ClientClosedError(server, method.rpartition("/")[2]) from error
        raise _to_call_error(server, method, error) from error
    except (ValueError, grpc.aio.UsageError) as error:
        # What gRPC raises of a closed channel.
        if not closed.is_set():
            raise
        raise ClientClosedError(server, method.rpartition("/")[2]) from error
    except asyncio.CancelledError as error:
        # A channel of asyncio that is closed cancels what waits for its calls, which nobody has cancelled.
        task = asyncio.current_task()
        if not closed.is_set() or task is None or task.cancelling() > (num_cancelled if task is asker else 0):
            raise
        raise ClientClosedError(server, method.rpartition("/")[2]) from error


def _to_call_error(server: str, method: str, error: grpc.RpcError) -> CallError:
    # Both transports' errors are calls as well and know their status.
    retry_after_seconds = _retry_after_seconds(error.trailing_metadata() or ())
    return to_call_error(server, method, error.code().value[0], error.details() or "", retry_after_seconds)


def _retry_after_seconds(metadata: Iterable[Any]) -> float | None:
    """Returns the delay of google.rpc.RetryInfo that came with an error; None if none did."""
    encoded = next((value for key, value in metadata if key == _DETAILS_KEY), b"")
    told = error_details_pb2.RetryInfo()
    try:
        for detail in status_pb2.Status.FromString(encoded).details:
            if detail.Unpack(told):
                return float(told.retry_delay.ToNanoseconds() / 1e9)
    except (message.DecodeError, TypeError):
        # Whatever stands between may have put something else there; the error itself is worth more.
        return None
    return None


def _connect(
    server: str,
    channel: _Channel | None,
    credentials: Credentials | None,
    secure: Callable[..., _Channel],
    insecure: Callable[..., _Channel],
) -> tuple[_Channel, tuple[tuple[str, str], ...] | None]:
    """Returns a channel to a server, the given one or a new one, and the metadata of each call."""
    credentials = credentials or Credentials()
    metadata = credentials.metadata(server if channel is None else None)
    if channel is None:
        tls, options = _channel_credentials(credentials), _options(credentials)
        channel = secure(server, tls, options) if tls else insecure(server, options)
    return channel, metadata


def _channel_credentials(credentials: Credentials) -> grpc.ChannelCredentials | None:
    """Returns what a channel with TLS needs; None for plain text."""
    if not credentials.speaks_tls:
        return None
    authorities, key, chain = credentials.read()
    return grpc.ssl_channel_credentials(authorities, key, chain)


def _options(credentials: Credentials) -> tuple[tuple[str, int | str], ...]:
    name = credentials.server_name
    return _OPTIONS if name is None else (*_OPTIONS, ("grpc.ssl_target_name_override", name))


def _serialize(request: message.Message) -> bytes:
    return request.SerializeToString()
