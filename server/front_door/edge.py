"""What every call passes at the server's edge: errors become statuses, requests in flight are bounded, all of it is counted."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf import message

from munet.v1 import inference_pb2
from server.call_context import REQUEST_ID_KEY, CallContext, request_id_of, set_call
from server.config import Limits
from server.errors import DeadlineError, MalformedRequestError, OverloadedError, UnavailableError, reason_of
from server.fairness import Flow, SharedRoom, flow_of
from server.front_door.call_book import CallBook, OpenCall
from server.front_door.status import INTERNAL_TEXT, retry_after_seconds_of, status_of, trailing_metadata_of, words_of

_log = logging.getLogger(__name__)

_SOURCES = {"/munet.v1.": "proto/munet/v1", "/inference.": "grpc_service.proto of the Open Inference Protocol"}
"""Packages whose calls pass here, as their methods' names begin, and where their messages are defined."""

_PROBES = frozenset(f"GRPCInferenceService/{method}" for method in ("ServerLive", "ServerReady", "ModelReady"))
"""Methods that only say whether the server answers: like health, they always do."""

_ADMINISTRATION = "AdminService/"
"""Methods of whoever operates the server, who must reach it when it is full of questions or takes none."""

MOST_WAY_SECONDS, WAY_SHARE = 0.01, 0.05
"""What of the time that a question leaves is kept for the way of its answer: so much at most, and so much of it. An answer that is complete
just before its deadline comes to a busy caller after it."""

# Words travel in a header. Above 8 KiB of headers, gRPC's receiving side refuses some at random, at 16 KiB all.
_MAX_DETAILS_BYTES = 6000

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Behaviour = Callable[[Any, Context], Awaitable[Any]]
AnswersBehaviour = Callable[[Any, Context], AsyncIterator[Any]]


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
class Failure:
    """What a caller is told instead of an answer.

    Attributes:
        status: of gRPC.
        words: for people.
        retry_after_seconds: when another try makes sense; none if nobody knows.
        trailing_metadata: goes with it, where it ends a call.
    """

    status: grpc.StatusCode
    words: str
    retry_after_seconds: float | None
    trailing_metadata: tuple[tuple[str, str | bytes], ...]

    @classmethod
    def of(cls, call: CallContext, error: Exception) -> Failure:
        """Returns what is told of an error. What nobody outside is to know goes to the log, under the call's id."""
        status = status_of(error)
        words = shortened(words_of(error))
        if status is grpc.StatusCode.INTERNAL:
            _log.error("%s failed, id %s", call.method, call.request_id, exc_info=error)
            words = INTERNAL_TEXT.format(id=call.request_id)
        return cls(status, words, retry_after_seconds_of(error), trailing_metadata_of(error))


StreamFailure = Callable[[Any, Failure], Any]
"""Makes the answer to a message that failed, from the message (none if it did not parse) and what is told of it."""


@dataclasses.dataclass(eq=False)
class _OpenStream:
    """A stream that has a place.

    Attributes:
        work: what goes on for it.
        moved_seconds: when it last sent a message or was given an answer.
        lost_place: whether it had to make room for another one.
    """

    work: asyncio.Task[None] | None = None
    moved_seconds: float = dataclasses.field(default_factory=time.monotonic)
    lost_place: bool = False

    def move(self) -> None:
        """Notes that it is in use."""
        self.moved_seconds = time.monotonic()


class Edge(grpc.aio.ServerInterceptor):
    """Wraps every call of this server's own services; health and reflection pass untouched.

    A stream of answers is open until either side ends it. The method of a stream in both directions answers one message, like any other
    method. Here the stream is made of it: each message passes the limits and is counted as a call would be, messages are answered side by
    side, and answers go out in the order of the messages. When as many are open as may be, one that is idle makes room for another.

    Args:
        limits: how much may be in flight.
        book: where calls are entered.
        stream_failures: by method, what answers a message that failed; each method that is a stream in both directions needs one.
    """

    def __init__(self, limits: Limits, book: CallBook, stream_failures: Mapping[str, StreamFailure]) -> None:
        self._limits = limits
        self._book = book
        self._stream_failures = stream_failures
        self._requests = SharedRoom(limits.max_requests_in_flight)
        self._bytes = SharedRoom(limits.max_bytes_in_flight)
        self._streams: set[_OpenStream] = set()
        # Of each open stream what goes on for as long as its caller wants: reading messages, or sending answers.
        self._endless: set[asyncio.Task[Any]] = set()
        self._refusal = ""
        self._shutting_down = False
        book.metrics.watch("requests_in_flight", lambda: self._requests.total)
        book.metrics.watch("request_bytes_in_flight", lambda: self._bytes.total)
        self._emptied = asyncio.Event()

    @property
    def num_in_flight(self) -> int:
        """Questions and streams that are open."""
        return self._requests.total + len(self._streams)

    def shut_down(self) -> None:
        """Refuses new calls in words from now on, for good. Open streams answer what they have read, and end."""
        self._shutting_down = True
        self.refuse_questions("shutting down")

    def refuse_questions(self, reason: str) -> None:
        """Refuses new calls in words from now on, but for those of administration. Open streams answer what they have read, and end.

        Args:
            reason: why; empty to take questions again.
        """
        self._refusal = "shutting down" if self._shutting_down else reason
        if self._refusal:
            for endless in self._endless:
                endless.cancel()

    async def wait_until_empty(self) -> None:
        """Waits until no question and no stream is open."""
        while self.num_in_flight:
            self._emptied.clear()
            await self._emptied.wait()

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
        if handler.unary_stream is not None:
            answers = functools.partial(self._answers, method, handler.unary_stream)
            return grpc.unary_stream_rpc_method_handler(answers, parse, handler.response_serializer)
        if handler.stream_stream is not None:
            stream = functools.partial(self._stream, method, handler.stream_stream)
            return grpc.stream_stream_rpc_method_handler(stream, parse, handler.response_serializer)
        return handler

    async def _call(self, method: str, behaviour: Behaviour, request: Any, context: Context) -> Any:
        opened = self._book.open(method, context.invocation_metadata() or ())
        answer = await self._try(opened, behaviour, request, context)
        if isinstance(answer, Failure):
            await context.abort(answer.status, answer.words, (*answer.trailing_metadata, *opened.metadata))
        context.set_trailing_metadata(opened.metadata)
        return answer

    async def _answers(self, method: str, behaviour: AnswersBehaviour, request: Any, context: Context) -> None:
        """Sends the answers of a stream, each when the one before is on its way. It is entered as one call when it ends."""

        async def send(stream: _OpenStream) -> None:
            if isinstance(request, _Malformed):
                raise MalformedRequestError(request.expected, request.source)
            async for answer in behaviour(request, context):
                stream.move()
                await context.write(answer)

        async def send_until_refused(call: CallContext, stream: _OpenStream) -> None:
            opened = self._book.open(method, context.invocation_metadata() or (), call.request_id)
            status, reason = grpc.StatusCode.CANCELLED, reason_of(asyncio.CancelledError())
            sending = self._noted(asyncio.ensure_future(send(stream)))
            try:
                await asyncio.wait([sending])
                if sending.cancelled():
                    raise self._refused()
                sending.result()
                status, reason = grpc.StatusCode.OK, ""
            except Exception as error:
                status, reason = status_of(error), reason_of(error)
                raise
            finally:
                sending.cancel()
                self._book.close(opened, status, reason)

        await self._keep_open(method, send_until_refused, context)

    async def _stream(self, method: str, behaviour: Behaviour, _: Any, context: Context) -> None:
        """Makes a stream of a method that answers one message."""

        async def answer_messages(call: CallContext, stream: _OpenStream) -> None:
            if not await self._answer_messages(call, stream, behaviour, context):
                raise self._refused()

        await self._keep_open(method, answer_messages, context)

    async def _keep_open(
        self, method: str, work: Callable[[CallContext, _OpenStream], Coroutine[Any, Any, None]], context: Context
    ) -> None:
        """Does the work of a stream, unless too many are open or none is taken, and ends the stream."""
        metadata = context.invocation_metadata() or ()
        call = CallContext(request_id_of(metadata), method)
        set_call(call)
        context.set_trailing_metadata(((REQUEST_ID_KEY, call.request_id),))
        error: Exception | None = None
        if self._refusal:
            error = self._refused()
        elif not self._has_place():
            error = OverloadedError("open streams", len(self._streams), self._limits.max_streams)
        if error is not None:
            self._book.close(self._book.open(method, metadata, call.request_id), status_of(error), reason_of(error))
        else:
            stream = _OpenStream()
            self._streams.add(stream)
            stream.work = asyncio.create_task(work(call, stream))
            try:
                await stream.work
            except asyncio.CancelledError:
                if not stream.lost_place:
                    # The caller has left.
                    raise
                error = UnavailableError(f"full, and this stream idle for {self._limits.idle_stream_seconds:g} s or more")
            except Exception as caught:
                # The edge of the process, as in `_try`.
                error = caught
            finally:
                self._streams.discard(stream)
                self._tell_if_empty()
        if error is not None:
            failure = Failure.of(call, error)
            trailing_metadata = (*failure.trailing_metadata, (REQUEST_ID_KEY, call.request_id))
            await context.abort(failure.status, failure.words, trailing_metadata)

    def _has_place(self) -> bool:
        """Whether one more stream may be open; makes room for it if one is idle."""
        if len(self._streams) < self._limits.max_streams:
            return True
        idlest = min(self._streams, key=lambda stream: stream.moved_seconds)
        if idlest.work is None or time.monotonic() - idlest.moved_seconds < self._limits.idle_stream_seconds:
            return False
        self._streams.remove(idlest)
        idlest.lost_place = True
        idlest.work.cancel()
        return True

    def _refused(self) -> UnavailableError:
        # Whoever takes questions again must not wait for the streams that end.
        return UnavailableError(self._refusal or "ending its streams")

    def _noted(self, task: asyncio.Task[Any]) -> asyncio.Task[Any]:
        self._endless.add(task)
        task.add_done_callback(self._endless.discard)
        return task

    def _tell_if_empty(self) -> None:
        if not self.num_in_flight:
            self._emptied.set()

    async def _answer_messages(self, call: CallContext, stream: _OpenStream, behaviour: Behaviour, context: Context) -> bool:
        """Answers a stream's messages until it ends or this server does, and returns whether it was the stream."""
        answers: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue()
        room = asyncio.Semaphore(self._limits.max_stream_messages)

        async def read() -> bool:
            try:
                while not self._refusal:
                    await room.acquire()
                    request = await context.read()
                    stream.move()
                    if request is grpc.aio.EOF:
                        return True
                    answers.put_nowait(group.create_task(self._answer_message(call, behaviour, request, context)))
                return False
            finally:
                answers.put_nowait(None)

        async with asyncio.TaskGroup() as group:
            reader = self._noted(group.create_task(read()))
            while (answer := await answers.get()) is not None:
                result = await answer
                stream.move()
                await context.write(result)
                room.release()
        return not reader.cancelled() and reader.result()

    async def _answer_message(self, call: CallContext, behaviour: Behaviour, request: Any, context: Context) -> Any:
        opened = self._book.open(call.method, context.invocation_metadata() or (), call.request_id)
        answer = await self._try(opened, behaviour, request, context)
        if isinstance(answer, Failure):
            return self._stream_failures[call.method](None if isinstance(request, _Malformed) else request, answer)
        return answer

    async def _try(self, opened: OpenCall, behaviour: Behaviour, request: Any, context: Context) -> Any:
        """Returns the answer to a request, or the `Failure` that it came to, and enters which."""
        status, reason = grpc.StatusCode.OK, ""
        try:
            return await self._admit(opened.call.method, behaviour, request, context)
        except asyncio.CancelledError as left:
            # gRPC cancels the handler when the caller leaves or its deadline passes.
            late = context.time_remaining() is not None and context.time_remaining() <= 0
            status = grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED
            reason = reason_of(DeadlineError() if late else left)
            raise
        except Exception as error:
            # The edge of the process: whatever happened, the caller gets a status and the server goes on.
            failure = Failure.of(opened.call, error)
            status, reason = failure.status, reason_of(error)
            # They refer to each other in circles, whole images among them, and would stay until garbage is collected.
            traceback.clear_frames(error.__traceback__)
            return failure
        finally:
            self._book.close(opened, status, reason)

    async def _admit(self, method: str, behaviour: Behaviour, request: Any, context: Context) -> Any:
        if isinstance(request, _Malformed):
            raise MalformedRequestError(request.expected, request.source)
        if method in _PROBES:
            return await behaviour(request, context)
        if method.startswith(_ADMINISTRATION):
            if self._shutting_down:
                raise self._refused()
            return await behaviour(request, context)
        if self._refusal:
            raise self._refused()
        num_bytes = request.ByteSize()
        flow = _named_flow(request)
        for room, amount, what in (
            (self._requests, 1, "requests in flight"),
            (self._bytes, num_bytes, "bytes of requests in flight"),
        ):
            if not room.has_room(flow, amount):
                if room.total + amount > room.size:
                    raise OverloadedError(what, room.total, room.size)
                raise OverloadedError(f"{what} to the same task", room.held_by(flow), room.bound_of(flow))
        self._requests.take(flow, 1)
        self._bytes.take(flow, num_bytes)
        try:
            return await behaviour(request, context)
        finally:
            self._requests.give_back(flow, 1)
            self._bytes.give_back(flow, num_bytes)
            self._tell_if_empty()


def _named_flow(request: Any) -> Flow:
    """Returns the flow of a request by the tasks that it names, whether or not there are such."""
    if isinstance(request, inference_pb2.ClassifyStreamRequest):
        request = request.classify if request.HasField("classify") else request.classify_tasks
    names = getattr(request, "tasks", None) or (getattr(request, "task", "") or getattr(request, "model_name", ""),)
    return flow_of(names)


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


def deadline_of(context: Context, timeout_seconds: float | None = None) -> float | None:
    """Returns a question's deadline on the clock of `time.monotonic`; none if it has none.

    It is a little earlier than its caller's: the answer has a way to go.

    Args:
        context: of its call, whose deadline holds for it.
        timeout_seconds: how long from now the answer is of use, if the question itself says so.

    Raises:
        DeadlineError: it has passed.
    """
    bounds = [seconds for seconds in (context.time_remaining(), timeout_seconds) if seconds is not None]
    if not bounds:
        return None
    left_seconds = min(bounds)
    if left_seconds <= 0:
        raise DeadlineError
    return time.monotonic() + left_seconds - min(MOST_WAY_SECONDS, WAY_SHARE * left_seconds)
