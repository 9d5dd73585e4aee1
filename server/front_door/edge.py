"""What every call passes at the server's edge: errors become statuses, requests in flight are bounded, all of it is counted."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf import message

from server.config import Limits
from server.errors import DeadlineError, MalformedRequestError, OverloadedError, UnavailableError
from server.front_door.status import INTERNAL_TEXT, status_of, trailing_metadata_of, words_of
from server.metrics import Metrics

_log = logging.getLogger(__name__)

_SOURCES = {"/munet.v1.": "proto/munet/v1", "/inference.": "grpc_service.proto of the Open Inference Protocol"}
"""Packages whose calls pass here, as their methods' names begin, and where their messages are defined."""

_PROBES = frozenset(f"GRPCInferenceService/{method}" for method in ("ServerLive", "ServerReady", "ModelReady"))
"""Methods that only say whether the server answers: like health, they always do."""

_MAX_OPEN_MESSAGES = 32
"""Messages of one stream that are worked on or whose answers wait to be sent; more are not read."""

# Words travel in a header. Above 8 KiB of headers, gRPC's receiving side refuses some at random, at 16 KiB all.
_MAX_DETAILS_BYTES = 6000

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Behaviour = Callable[[Any, Context], Awaitable[Any]]
StreamFailure = Callable[[Any, str], Any]
"""Makes the answer to a message that failed, from the message (none if it did not parse) and the reason in words."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Malformed:
    """Stands for a request whose bytes do not parse.

    Attributes:
        expected: name of the message that it should be.
        source: where that is defined.
    """

    expected: str
    source: str


@dataclasses.dataclass(frozen=True, slots=True)
class _Failure:
    """What a caller is told instead of an answer.

    Attributes:
        status: of gRPC.
        words: for people.
        trailing_metadata: goes with it.
    """

    status: grpc.StatusCode
    words: str
    trailing_metadata: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, method: str, error: Exception) -> _Failure:
        """Returns what is told of an error. What nobody outside is to know goes to the log, under an id that the caller gets."""
        status = status_of(error)
        words = shortened(words_of(error))
        if status is grpc.StatusCode.INTERNAL:
            error_id = secrets.token_hex(6)
            _log.error("%s failed, id %s", method, error_id, exc_info=error)
            words = INTERNAL_TEXT.format(id=error_id)
        return cls(status, words, trailing_metadata_of(error))


class Edge(grpc.aio.ServerInterceptor):
    """Wraps every call of this server's own services; health and reflection pass untouched.

    The method of a stream in both directions answers one message, like any other method. Here the stream is made of it: each message passes
    the limits and is counted as a call would be, messages are answered side by side, and answers go out in the order of the messages.

    Args:
        limits: how much may be in flight.
        metrics: where calls are counted.
        stream_failures: by method, what answers a message that failed; each method that is a stream in both directions needs one.
    """

    def __init__(self, limits: Limits, metrics: Metrics, stream_failures: Mapping[str, StreamFailure]) -> None:
        self._limits = limits
        self._metrics = metrics
        self._stream_failures = stream_failures
        self._num_requests = 0
        self._num_bytes = 0
        self._num_streams = 0
        self._readers: set[asyncio.Task[bool]] = set()
        self._shutting_down = False

    def shut_down(self) -> None:
        """Refuses new calls in words from now on. Open streams answer what they have read, and end."""
        self._shutting_down = True
        for reader in self._readers:
            reader.cancel()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Returns the handler of a call, wrapped."""
        handler: Any = await continuation(handler_call_details)
        package = next((package for package in _SOURCES if handler_call_details.method.startswith(package)), None)
        if handler is None or package is None:
            return handler
        method = handler_call_details.method.removeprefix(package)
        parse = _parse_or_mark(handler.request_deserializer, _SOURCES[package])
        if handler.unary_unary is not None:
            call = functools.partial(self._call, method, handler.unary_unary)
            return grpc.unary_unary_rpc_method_handler(call, parse, handler.response_serializer)
        if handler.stream_stream is not None:
            stream = functools.partial(self._stream, method, handler.stream_stream)
            return grpc.stream_stream_rpc_method_handler(stream, parse, handler.response_serializer)
        return handler

    async def _call(self, method: str, behaviour: Behaviour, request: Any, context: Context) -> Any:
        answer = await self._try(method, behaviour, request, context)
        if isinstance(answer, _Failure):
            await context.abort(answer.status, answer.words, answer.trailing_metadata)
        return answer

    async def _stream(self, method: str, behaviour: Behaviour, _: Any, context: Context) -> None:
        """Makes a stream of a method that answers one message."""
        error: Exception | None
        if self._num_streams >= self._limits.max_requests_in_flight:
            error = OverloadedError("open streams", self._num_streams, self._limits.max_requests_in_flight)
            self._metrics.count_call(method, status_of(error).name, 0.0)
        else:
            self._num_streams += 1
            try:
                is_whole = await self._answer_messages(method, behaviour, context)
                error = None if is_whole else UnavailableError("shutting down")
            except Exception as caught:
                error = caught
            finally:
                self._num_streams -= 1
        if error is not None:
            failure = _Failure.of(method, error)
            await context.abort(failure.status, failure.words, failure.trailing_metadata)

    async def _answer_messages(self, method: str, behaviour: Behaviour, context: Context) -> bool:
        """Answers a stream's messages until it ends or this server does, and returns whether it was the stream."""
        answers: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue()
        room = asyncio.Semaphore(_MAX_OPEN_MESSAGES)

        async def read() -> bool:
            try:
                while not self._shutting_down:
                    await room.acquire()
                    request = await context.read()
                    if request is grpc.aio.EOF:
                        return True
                    answers.put_nowait(group.create_task(self._answer_message(method, behaviour, request, context)))
                return False
            finally:
                answers.put_nowait(None)

        async with asyncio.TaskGroup() as group:
            reader = group.create_task(read())
            self._readers.add(reader)
            reader.add_done_callback(self._readers.discard)
            while (answer := await answers.get()) is not None:
                await context.write(await answer)
                room.release()
        return not reader.cancelled() and reader.result()

    async def _answer_message(self, method: str, behaviour: Behaviour, request: Any, context: Context) -> Any:
        answer = await self._try(method, behaviour, request, context)
        if isinstance(answer, _Failure):
            return self._stream_failures[method](None if isinstance(request, _Malformed) else request, answer.words)
        return answer

    async def _try(self, method: str, behaviour: Behaviour, request: Any, context: Context) -> Any:
        """Returns the answer to a request, or the `_Failure` that it came to, and counts which."""
        started = time.monotonic()
        status = grpc.StatusCode.OK
        try:
            return await self._admit(method, behaviour, request, context)
        except asyncio.CancelledError:
            # gRPC cancels the handler when the caller leaves or its deadline passes.
            late = context.time_remaining() is not None and context.time_remaining() <= 0
            status = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            raise
        except Exception as error:
            # The edge of the process: whatever happened, the caller gets a status and the server goes on.
            failure = _Failure.of(method, error)
            status = failure.status
            return failure
        finally:
            self._metrics.count_call(method, status.name, time.monotonic() - started)

    async def _admit(self, method: str, behaviour: Behaviour, request: Any, context: Context) -> Any:
        if isinstance(request, _Malformed):
            raise MalformedRequestError(request.expected, request.source)
        if method in _PROBES:
            return await behaviour(request, context)
        if self._shutting_down:
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


def _parse_or_mark(parse: Any, source: str) -> Callable[[bytes], Any]:
    """Returns what parses requests as a message's class method `parse` does, and marks what does not parse."""

    def parse_or_mark(content: bytes) -> Any:
        try:
            return parse(content)
        except message.DecodeError:
            return _Malformed(parse.__self__.DESCRIPTOR.name, source)

    return parse_or_mark


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
