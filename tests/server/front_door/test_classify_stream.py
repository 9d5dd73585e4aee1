"""ClassifyStream over real gRPC: each question is answered, counted and refused by itself, in order."""

from __future__ import annotations

import asyncio
import itertools
import pathlib
import queue
import urllib.request
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import numpy as np
import pytest

from munet.v1 import inference_pb2 as pb
from munet.v1 import inference_pb2_grpc
from server.client import (
    AsyncClient,
    CallRefusedError,
    CallTimeoutError,
    ClassifyResult,
    ClassifyTasksResult,
    Client,
    ServerBusyError,
    StreamAnswer,
    StreamQuestion,
    TaskNotFoundError,
)
from server.config import Limits
from server.errors import CallError
from tests.support.images import encode
from tests.support.repository import TASKS, TRAP, RepositoryBuilder, random_images
from tests.support.serving import Brake, ServerThread, serving, wait_until

IMAGES = random_images(6, 8, seed=3)
TRAPPED = IMAGES[0].copy()
TRAPPED[0, 0, 0] = 255
METHOD = "InferenceService/ClassifyStream"


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path_factory.mktemp("repository"))
    builder.publish({**TASKS, "trap": TRAP})
    return builder


@pytest.fixture(scope="module")
def server(builder: RepositoryBuilder) -> Iterator[ServerThread]:
    limits = Limits(max_images=4, max_image_pixels=10_000, max_requests_in_flight=8, max_stream_messages=6, max_streams=2)
    with serving(builder.root, limits=limits, metrics_listen="127.0.0.1:0", watch_interval_seconds=60) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: ServerThread) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


def counted(server: ServerThread, status: str) -> int:
    """Returns how many questions of streams ended with a status."""
    page = urllib.request.urlopen(f"http://{server.server.metrics_address}/metrics").read().decode()
    line = f'munet_calls_total{{method="{METHOD}",status="{status}"}} '
    return int(float(page.partition(line)[2].partition("\n")[0] or 0))


class Stream:
    """An open stream, message by message."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.Queue[Any] = queue.Queue()
        self.num_taken = 0
        self.answers = inference_pb2_grpc.InferenceServiceStub(channel).ClassifyStream(self._take(), timeout=240)

    def _take(self) -> Iterator[Any]:
        for request in iter(self._requests.get, None):
            self.num_taken += 1
            yield request

    def send(self, *requests: Any) -> None:
        for request in requests:
            self._requests.put(request)

    def end(self) -> None:
        self._requests.put(None)


def question(id_: str = "", task: str = "digits", pixels: np.ndarray = IMAGES[0], **fields: Any) -> pb.ClassifyStreamRequest:
    image = pb.Image(raw=pb.RawImage(height=8, width=8, channels=3, data=pixels.tobytes()))
    return pb.ClassifyStreamRequest(id=id_, classify=pb.ClassifyRequest(task=task, images=[image]), **fields)


def ask_blocking(address: str, questions: list[StreamQuestion]) -> list[StreamAnswer]:
    with Client(address) as client:
        return list(client.classify_stream(questions, window=4))


def ask_awaited(address: str, questions: list[StreamQuestion]) -> list[StreamAnswer]:
    async def given() -> AsyncIterator[StreamQuestion]:
        for asked in questions:
            yield asked

    async def ask() -> list[StreamAnswer]:
        async with AsyncClient(address) as client:
            return [answer async for answer in client.classify_stream(given(), window=4)]

    return asyncio.run(ask())


@pytest.mark.parametrize("ask", [ask_blocking, ask_awaited])
def test_answers_come_in_order_and_are_those_of_single_calls(server: ServerThread, client: Client, ask: Any) -> None:
    questions = [StreamQuestion("digits", image, id=f"<{index}>", include_logits=True) for index, image in enumerate(IMAGES)]
    questions.append(StreamQuestion("hebrew", list(IMAGES[:3]), top_k=2))
    questions.append(StreamQuestion(["large", "digits"], encode(IMAGES[0])))
    questions.append(StreamQuestion((), IMAGES[0]))
    *answers, several, two_tasks, all_tasks = ask(server.address, questions)
    assert [answer.id for answer in answers] == [f"<{index}>" for index in range(6)]
    for image, answer in zip(IMAGES, answers, strict=True):
        alone = client.classify("digits", image, include_logits=True)
        assert isinstance(answer.result, ClassifyResult)
        assert (answer.result.path_id, answer.result.generation) == (alone.path_id, alone.generation)
        assert np.array_equal(answer.result.classifications[0].logits, alone.classifications[0].logits)
    assert isinstance(several.result, ClassifyResult)
    assert [len(classification.labels) for classification in several.result.classifications] == [2, 2, 2]
    assert isinstance(two_tasks.result, ClassifyTasksResult)
    assert [task.task for task in two_tasks.result.tasks] == ["large", "digits"]
    assert isinstance(all_tasks.result, ClassifyTasksResult)
    assert len(all_tasks.result.tasks) == len(TASKS) + 1


BAD: dict[str, tuple[StreamQuestion, type[CallError], str]] = {
    "no image": (StreamQuestion("digits", b"nonsense"), CallRefusedError, "images[0]: "),
    "too many": (StreamQuestion("digits", list(IMAGES)), CallRefusedError, "images: found 6, expected at most 4"),
    "none": (StreamQuestion("digits", []), CallRefusedError, "images: found 0, expected at least one"),
    "no such task": (StreamQuestion("digit", IMAGES[0]), TaskNotFoundError, "did you mean 'digits'?"),
    "late": (StreamQuestion("digits", IMAGES[0], timeout_seconds=0.0), CallTimeoutError, "the deadline passed"),
    "very late": (StreamQuestion("digits", IMAGES[0], timeout_seconds=-3e11), CallTimeoutError, "the deadline passed"),
    "a fault inside": (StreamQuestion("trap", TRAPPED), CallError, "its log says why under the id"),
}


def test_a_question_that_fails_ends_nothing(server: ServerThread, client: Client) -> None:
    before = [counted(server, status) for status in ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED", "INTERNAL")]
    questions = [StreamQuestion("digits", IMAGES[0], id="first")]
    for index, (bad, _, _) in enumerate(BAD.values()):
        questions += [bad, StreamQuestion("digits", IMAGES[0], id=f"after {index}", timeout_seconds=3e11)]
    # One after the other: what fails here fails by itself and not for what else is asked.
    answers = list(client.classify_stream(questions, window=1))
    assert [answer.error for answer in answers[::2]] == [None] * 8
    assert [answer.id for answer in answers[::2]] == ["first", *(f"after {index}" for index in range(7))]
    for answer, (_, kind, words) in zip(answers[1::2], BAD.values(), strict=True):
        assert isinstance(answer.error, kind)
        assert answer.result is None
        assert words in answer.error.details
        assert answer.error.retry_after_seconds is None
    after = [counted(server, status) for status in ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "DEADLINE_EXCEEDED", "INTERNAL")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [8, 3, 1, 2, 1]


def test_messages_that_are_none_are_answered_too(server: ServerThread) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stream = channel.stream_stream(f"/munet.v1.{METHOD}", None, pb.ClassifyStreamResponse.FromString)
        sent = [b"\xff\xff", pb.ClassifyStreamRequest(id="empty").SerializeToString(), question("good").SerializeToString()]
        malformed, empty, good = stream(iter(sent), timeout=10)
    assert (malformed.id, malformed.failure.code) == ("", grpc.StatusCode.INVALID_ARGUMENT.value[0])
    assert "found bytes that do not parse, expected a ClassifyStreamRequest" in malformed.failure.message
    assert (empty.id, empty.failure.code) == ("empty", grpc.StatusCode.INVALID_ARGUMENT.value[0])
    assert "fill `classify` or `classify_tasks`" in empty.failure.message
    assert (good.id, good.classify.task) == ("good", "digits")


def test_the_generation_may_change_from_answer_to_answer(
    builder: RepositoryBuilder, client: Client, server: ServerThread
) -> None:
    def questions() -> Iterator[StreamQuestion]:
        yield StreamQuestion("digits", IMAGES[0])
        first.get(timeout=10)
        yield StreamQuestion("digits", IMAGES[0])

    first: queue.Queue[bool] = queue.Queue()
    answers = client.classify_stream(questions())
    before = next(answers)
    number = builder.publish({**TASKS, "trap": TRAP})
    asyncio.run_coroutine_threadsafe(server.server.reloader.reload(), server.loop).result(20)
    first.put(True)
    (after,) = answers
    assert isinstance(before.result, ClassifyResult)
    assert isinstance(after.result, ClassifyResult)
    assert (before.result.generation, after.result.generation) == (number - 1, number)


@pytest.mark.parametrize("error", [SystemExit(7), KeyboardInterrupt()])
def test_an_exit_among_the_questions_is_the_callers(client: Client, error: BaseException) -> None:
    """gRPC takes the questions in a thread of its own, where nobody would hear of it."""

    def questions() -> Iterator[StreamQuestion]:
        yield StreamQuestion("digits", IMAGES[0])
        raise error

    answers = client.classify_stream(questions(), timeout_seconds=20)
    assert next(answers).error is None
    with pytest.raises(type(error)) as caught:
        next(answers)
    assert caught.value is error


def test_only_so_many_messages_and_streams_are_open(builder: RepositoryBuilder, tmp_path: pathlib.Path) -> None:
    limits = Limits(max_requests_in_flight=4, max_stream_messages=6, max_streams=2)
    with (
        serving(builder.root, limits=limits, metrics_listen="127.0.0.1:0") as server,
        grpc.insecure_channel(server.address) as channel,
        Client(server.address, retry=None) as client,
    ):
        brake = Brake(server.server.engine)
        stream = Stream(channel)
        stream.send(*[question(str(index)) for index in range(20)])
        stream.end()
        # Four wait for the engine, two were refused and wait for their turn; fourteen nobody has read.
        wait_until(lambda: counted(server, "RESOURCE_EXHAUSTED") == 2)
        other = Stream(channel)
        other.send(question("other"))
        busy = next(other.answers)
        assert busy.failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert busy.failure.retry_delay.ToNanoseconds() > 0
        with pytest.raises(ServerBusyError, match="open streams: found 2 waiting, expected at most 2"):
            list(client.classify_stream([StreamQuestion("digits", IMAGES[0])]))
        assert counted(server, "RESOURCE_EXHAUSTED") == 4
        brake.go_on.set()
        other.end()
        assert list(other.answers) == []
        answers = list(stream.answers)
        assert [answer.id for answer in answers] == [str(index) for index in range(20)]
        assert [answer.WhichOneof("outcome") for answer in answers[:6]] == ["classify"] * 4 + ["failure"] * 2


def let_pass(server: ServerThread, seconds: float) -> None:
    """Has all streams that are open seem to have done nothing for so long."""
    for stream in list(server.server.front_door._edge._streams):
        stream.moved_seconds -= seconds


def test_an_idle_stream_makes_room_for_one_that_wants_its_place(builder: RepositoryBuilder) -> None:
    with (
        serving(builder.root, limits=Limits(max_streams=2, idle_stream_seconds=60)) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        idle = Stream(channel)
        idle.send(question("first"))
        assert next(idle.answers).id == "first"
        let_pass(server, 100)
        busy = Stream(channel)
        busy.send(question("first"))
        assert next(busy.answers).id == "first"
        third = Stream(channel)
        third.send(question("first"))
        assert next(third.answers).id == "first"
        with pytest.raises(grpc.RpcError) as caught:
            next(idle.answers)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "found it full, and this stream idle for 60 s or more" in caught.value.details()
        # Who was not idle stays, and so does who was, once a message comes.
        let_pass(server, 100)
        busy.send(question("second"))
        assert next(busy.answers).id == "second"
        fourth = Stream(channel)
        fourth.send(question("first"))
        assert next(fourth.answers).id == "first"
        with pytest.raises(grpc.RpcError):
            next(third.answers)
        fifth = Stream(channel)
        fifth.send(question("first"))
        with pytest.raises(grpc.RpcError) as caught:
            next(fifth.answers)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        for stream in (busy, fourth):
            stream.end()
            assert list(stream.answers) == []
        wait_until(lambda: server.server.front_door._edge.num_in_flight == 0)


def test_a_stream_whose_answers_nobody_takes_makes_room(builder: RepositoryBuilder) -> None:
    with (
        serving(builder.root, limits=Limits(max_streams=1), metrics_listen="127.0.0.1:0") as server,
        grpc.insecure_channel(server.address) as channel,
        grpc.insecure_channel(server.address, (("grpc.use_local_subchannel_pool", 1),)) as another,
    ):
        deaf = Stream(channel)
        # Their ids come back in the answers, which fill what a connection holds.
        deaf.send(*[question("x" * 20_000) for _ in range(20)])
        wait_until(lambda: counted(server, "OK") == 20)

        def is_let_in() -> bool:
            let_pass(server, 100)
            patient = Stream(another)
            patient.send(question("heard"))
            patient.end()
            try:
                return [answer.id for answer in patient.answers] == ["heard"]
            except grpc.RpcError:
                # The last answers were only just on their way.
                return False

        wait_until(is_let_in)
        deaf.answers.cancel()
        wait_until(lambda: server.server.front_door._edge.num_in_flight == 0)


@pytest.mark.parametrize("client_class", [Client, AsyncClient])
def test_no_more_is_taken_than_there_is_room_for(server: ServerThread, client_class: Any) -> None:
    taken = itertools.count()
    endless = (StreamQuestion("digits", IMAGES[0], id=str(next(taken))) for _ in itertools.repeat(None))

    async def ask() -> list[str]:
        async with AsyncClient(server.address) as client:
            answers = client.classify_stream(endless, window=3)
            ids = [(await anext(answers)).id for _ in range(5)]
            await answers.aclose()
            return ids

    if client_class is AsyncClient:
        ids = asyncio.run(ask())
    else:
        with Client(server.address) as client:
            ids = [answer.id for answer in itertools.islice(client.classify_stream(endless, window=3), 5)]
    assert ids == ["0", "1", "2", "3", "4"]
    # Five answered, three open, and one more taken to wait for room.
    assert next(taken) <= 5 + 3 + 1
    wait_until(lambda: server.server.front_door._edge.num_in_flight == 0)


@pytest.mark.parametrize("ask", [ask_blocking, ask_awaited])
def test_a_fault_of_whoever_asks_is_raised(server: ServerThread, ask: Any) -> None:
    good = StreamQuestion("digits", IMAGES[0])
    with pytest.raises(FileNotFoundError):
        ask(server.address, [good, StreamQuestion("digits", pathlib.Path("nowhere.png"))])
    with pytest.raises(TypeError, match="found an image of type str"):
        ask(server.address, [StreamQuestion(["digits"], "nowhere.png")])  # type: ignore[arg-type]


def test_a_window_without_room_is_refused(client: Client) -> None:
    with pytest.raises(ValueError, match="window: found 0, expected at least 1"):
        list(client.classify_stream([], window=0))


def test_a_stream_has_a_deadline_if_it_is_given_one(server: ServerThread, client: Client) -> None:
    held: queue.Queue[None] = queue.Queue()

    def questions() -> Iterator[StreamQuestion]:
        yield StreamQuestion("digits", IMAGES[0])
        held.get(timeout=20)

    answers = client.classify_stream(questions(), timeout_seconds=4)
    assert next(answers).error is None
    with pytest.raises(CallTimeoutError):
        next(answers)
    held.put(None)
