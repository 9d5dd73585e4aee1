"""Many answers to one call, or many questions at once: the tasks as they change, a stream of any questions, files in groups.

Written once for both kinds of client, see `server.sending`.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import errno
import functools
import os
import pathlib
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from google.protobuf import message

from munet.v1 import inference_pb2
from server import calls
from server.calls import DEFAULT_TIMEOUT_SECONDS, Call, Image
from server.errors import CallError, ServerBusyError
from server.results import ClassifyTasksResult, FileAnswer, StreamAnswer, TaskChanges, TaskClassification
from server.sending import Sender
from server.transports import MAX_MESSAGE_BYTES, to_call_error

_T = TypeVar("_T")
_Files = Sequence[tuple[pathlib.Path, bytes]]


@dataclasses.dataclass(frozen=True, slots=True)
class StreamQuestion:
    """A question of a stream.

    Attributes:
        task: the name of one task, to ask about one or more images; or several names, or none for every task, to ask about one image.
        images: one, or a sequence of them.
        id: whatever the caller likes; it comes back with the answer.
        top_k: how many labels to answer with; more than there are means all.
        include_logits: whether to answer with all logits too.
        timeout_seconds: how long the answer is of use, from when the server reads the question; none means as long as the stream.
    """

    task: str | Sequence[str]
    images: Image | Sequence[Image]
    id: str = ""
    top_k: int = 1
    include_logits: bool = False
    timeout_seconds: float | None = None


async def classify_stream(
    sender: Sender,
    questions: Iterable[StreamQuestion] | AsyncIterable[StreamQuestion],
    *,
    window: int = 32,
    timeout_seconds: float | None = None,
) -> AsyncGenerator[StreamAnswer, None]:
    """Asks questions over one call as they come, and gives their answers in the same order as they come.

    A question that fails ends nothing: its answer has the error. Nothing is asked again. Each answer is of the generation that served when
    its question was read. Whoever asks a blocking client has the questions taken from them in another thread.

    Args:
        sender: the client's own.
        questions: any number, perhaps without end; an asynchronous client takes an asynchronous iterable too.
        window: questions that are asked and not yet answered; no more are taken from `questions` until there is room.
        timeout_seconds: deadline of the whole stream; none means to go on for ever.

    Raises:
        CallError: the stream itself failed; questions without an answer may or may not have been heard.
        OSError: a path cannot be read.
        ValueError: pixels of another type or shape, or a window without room.
    """
    if window < 1:
        raise ValueError(f"window: found {window!r}, expected at least 1")
    room = sender.transport.semaphore(window)
    asked: collections.deque[tuple[StreamQuestion, Call[Any]]] = collections.deque()
    faults: list[BaseException] = []
    is_over = False

    async def requests() -> AsyncGenerator[message.Message, None]:
        try:
            async for question in _each(questions):
                await room.acquire()
                if is_over:
                    return
                request, call = _to_request(question)
                asked.append((question, call))
                yield request
        except (GeneratorExit, asyncio.CancelledError):
            raise
        except BaseException as error:
            # gRPC would only say that there was one; and of an exit, in a thread of its own, nothing at all.
            faults.append(error)

    whole = Call(_STREAM, inference_pb2.ClassifyStreamRequest(), inference_pb2.ClassifyStreamResponse, _as_it_is, None)
    answers = sender.transport.stream(whole, requests(), timeout_seconds)
    try:
        async for answer in answers:
            room.release()
            yield _to_stream_answer(sender.transport.server, *asked.popleft(), answer)
    finally:
        is_over = True
        room.release()
        await answers.aclose()
    if faults:
        raise faults[0]


async def watch_tasks(sender: Sender, *, timeout_seconds: float | None = None) -> AsyncGenerator[TaskChanges, None]:
    """Gives every task that is served, and then what changes whenever another generation serves; it goes on until the server ends it.

    Args:
        sender: the client's own.
        timeout_seconds: when to end; none means never.

    Raises:
        CallError: see `server.errors`. A server that shuts down or drains ends it with `ServerUnreachableError`.
    """
    answers = sender.transport.receive(calls.watch_tasks(timeout_seconds=timeout_seconds))
    try:
        async for changes in answers:
            yield changes
    finally:
        await answers.aclose()


async def classify_files(
    sender: Sender,
    files: Iterable[pathlib.Path],
    tasks: Sequence[str] = (),
    *,
    top_k: int = 1,
    include_logits: bool = False,
    timeout_seconds: float | None = DEFAULT_TIMEOUT_SECONDS,
    in_flight: int = 8,
    max_images: int = 16,
    max_bytes: int = 8 * 1024 * 1024,
) -> AsyncGenerator[FileAnswer, None]:
    """Asks about many files, several at a time, and gives their answers in the order of the files as they come.

    A file that cannot be read or is no image ends nothing: its answer has the error. One task is asked about several files in one request;
    a request that is refused for its images is asked again in halves, so that only those at fault have an error. Files are
    read when their turn comes, so that any number of them need no more memory than a few.

    Args:
        sender: the client's own.
        files: their paths; taken one after another as answers are, by an asynchronous client in other threads.
        tasks: names of the tasks to ask; none means every task that is served.
        top_k: how many labels to answer with; more than there are means all.
        include_logits: whether to answer with all logits too.
        timeout_seconds: deadline of each request; none means to wait for ever.
        in_flight: requests that are under way at once.
        max_images: files in one request, if one task is asked.
        max_bytes: their sizes in sum, unless one file alone is larger.

    Raises:
        TaskNotFoundError: no such task is served; the message names similar ones.
        CallError: anything that concerns all files: nobody answers, or the caller may not ask.
        ValueError: a number below 1.
    """
    for name, number in (("in_flight", in_flight), ("max_images", max_images), ("max_bytes", max_bytes)):
        if number < 1:
            raise ValueError(f"{name}: found {number!r}, expected at least 1")
    asking = _Asking(sender, _to_names(tasks), top_k, include_logits, timeout_seconds)
    groups = _groups(files, max_images if len(asking.tasks) == 1 else 1, max_bytes)
    crew = sender.transport.crew(in_flight)
    started: collections.deque[Any] = collections.deque()
    try:
        while (group := await sender.transport.read(functools.partial(next, groups, None))) is not None:
            started.append(crew.start(functools.partial(asking.ask, group)))
            if len(started) >= in_flight:
                for answer in await crew.join(started.popleft()):
                    yield answer
        while started:
            for answer in await crew.join(started.popleft()):
                yield answer
    finally:
        crew.close()


@dataclasses.dataclass(frozen=True, slots=True)
class _Asking:
    """What is asked about every group of files."""

    sender: Sender
    tasks: tuple[str, ...]
    top_k: int
    include_logits: bool
    timeout_seconds: float | None

    async def ask(self, group: Sequence[pathlib.Path]) -> list[FileAnswer]:
        """Returns the answers about some files, in their order."""
        contents = await self.sender.transport.read(lambda: [_read(file) for file in group])
        readable = [(file, content) for file, content in zip(group, contents, strict=True) if isinstance(content, bytes)]
        answers = iter(await self._ask_about(readable) if readable else ())
        return [
            next(answers) if isinstance(content, bytes) else FileAnswer(file, None, content)
            for file, content in zip(group, contents, strict=True)
        ]

    async def _ask_about(self, files: _Files) -> list[FileAnswer]:
        try:
            results = await self._send([content for _, content in files])
        except CallError as error:
            if not _lies_with_the_images(error):
                raise
            if len(files) == 1:
                return [FileAnswer(files[0][0], None, error)]
            middle = len(files) // 2
            return [*await self._ask_about(files[:middle]), *await self._ask_about(files[middle:])]
        return [FileAnswer(file, result, None) for (file, _), result in zip(files, results, strict=True)]

    async def _send(self, images: Sequence[bytes]) -> list[ClassifyTasksResult]:
        told: dict[str, Any] = {"top_k": self.top_k, "include_logits": self.include_logits}
        told["timeout_seconds"] = self.timeout_seconds
        if len(self.tasks) != 1:
            return [await self.sender.send(calls.classify_tasks(images[0], self.tasks, **told))]
        answer = await self.sender.send(calls.classify(self.tasks[0], images, **told))
        return [
            ClassifyTasksResult(answer.generation, (TaskClassification(answer.task, answer.path_id, classification),))
            for classification in answer.classifications
        ]


def _lies_with_the_images(error: CallError) -> bool:
    """Returns whether other images may be answered all the same. Whoever is too busy for them says when to come back."""
    is_too_large = isinstance(error, ServerBusyError) and error.retry_after_seconds is None
    return is_too_large or error.status in ("INVALID_ARGUMENT", "INTERNAL")


def _groups(files: Iterable[pathlib.Path], max_images: int, max_bytes: int) -> Iterator[list[pathlib.Path]]:
    """Gives files in groups, each as many as fit into one request."""
    group: list[pathlib.Path] = []
    num_bytes = 0
    for file in files:
        size = _size_of(file)
        if group and (len(group) == max_images or num_bytes + size > max_bytes):
            yield group
            group, num_bytes = [], 0
        group.append(file)
        num_bytes += size
    if group:
        yield group


def _size_of(file: pathlib.Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        # Reading it says the same, in its turn.
        return 0


def _read(file: pathlib.Path) -> bytes | OSError:
    try:
        if _size_of(file) > MAX_MESSAGE_BYTES:
            return OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(file))
        return file.read_bytes()
    except OSError as error:
        return error


def _to_names(tasks: Sequence[str]) -> tuple[str, ...]:
    if isinstance(tasks, str):
        raise TypeError(f"found tasks {tasks!r}, expected a sequence of names; write [{tasks!r}]")
    return tuple(tasks)


_STREAM = "/munet.v1.InferenceService/ClassifyStream"


def _as_it_is(answer: inference_pb2.ClassifyStreamResponse) -> inference_pb2.ClassifyStreamResponse:
    return answer


def _to_request(question: StreamQuestion) -> tuple[inference_pb2.ClassifyStreamRequest, Call[Any]]:
    """Returns a question as it is sent, and the call that it would be by itself."""
    told: dict[str, Any] = {"top_k": question.top_k, "include_logits": question.include_logits}
    # Several images for several tasks are refused where they are read.
    images: Any = question.images
    call: Call[Any]
    asked: dict[str, Any]
    if isinstance(question.task, str):
        call = calls.classify(question.task, images, **told)
        asked = {"classify": call.request}
    else:
        call = calls.classify_tasks(images, question.task, **told)
        asked = {"classify_tasks": call.request}
    request = inference_pb2.ClassifyStreamRequest(id=question.id, **asked)
    if question.timeout_seconds is not None:
        request.timeout.FromNanoseconds(round(question.timeout_seconds * 1e9))
    return request, call


def _to_stream_answer(
    server: str, question: StreamQuestion, call: Call[Any], answer: inference_pb2.ClassifyStreamResponse
) -> StreamAnswer:
    outcome = answer.WhichOneof("outcome")
    if outcome in ("classify", "classify_tasks"):
        return StreamAnswer(question.id, call.read(getattr(answer, outcome)), None)
    failure = answer.failure
    retry_after_seconds = failure.retry_delay.ToNanoseconds() / 1e9 if failure.HasField("retry_delay") else None
    return StreamAnswer(question.id, None, to_call_error(server, _STREAM, failure.code, failure.message, retry_after_seconds))


async def _each(items: Iterable[_T] | AsyncIterable[_T]) -> AsyncGenerator[_T, None]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item
