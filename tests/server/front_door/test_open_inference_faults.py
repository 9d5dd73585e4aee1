"""The Open Inference Protocol under deadlines, cancellations, overload and shutdown: a clear error each time, and nobody else waits."""

from __future__ import annotations

import itertools
import pathlib
import queue
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2

from server.config import Limits
from tests.support.open_inference import Stub, good, infer, tensor
from tests.support.repository import DIGITS, RepositoryBuilder, TaskPlan
from tests.support.serving import Brake, HeldPause, ServerThread, serving, wait_until


@pytest.fixture(scope="module")
def builder(tmp_path_factory: pytest.TempPathFactory) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path_factory.mktemp("repository"))
    builder.publish()
    return builder


class Stream:
    """A stream whose messages a test sends one by one."""

    def __init__(self, channel: grpc.Channel, timeout: float = 240) -> None:
        self._requests: queue.Queue[Any] = queue.Queue()
        self.num_taken = 0
        self.call = Stub(channel).ModelStreamInfer(self._take(), timeout=timeout)

    def _take(self) -> Iterator[Any]:
        for request in iter(self._requests.get, None):
            self.num_taken += 1
            yield request

    def send(self, *requests: Any) -> None:
        for request in requests:
            self._requests.put(request)

    def end(self) -> None:
        self._requests.put(None)


@pytest.fixture
def quiet(builder: RepositoryBuilder) -> Iterator[ServerThread]:
    """A server of the test's own."""
    with serving(builder.root) as server:
        yield server


def test_deadlines_and_timeouts_free_the_caller_and_the_engine(quiet: ServerThread) -> None:
    engine = quiet.server.engine
    with grpc.insecure_channel(quiet.address) as channel:
        assert infer(channel, good(), timeout=0)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        brake = Brake(engine)
        request = tensor([64, 8, 8, 3], raw=bytes(64 * 192))
        assert infer(channel, request, timeout=0.3)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        stream = Stream(channel, timeout=0.3)
        stream.send(request)
        with pytest.raises(grpc.RpcError) as caught:
            next(stream.call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        stream.end()
        wait_until(lambda: len(engine._questions) == 0)
        # A message of a stream has a timeout of its own; the stream goes on.
        stream = Stream(channel)
        late = good(id="late")
        late.parameters["timeout"].int64_param = 1_000_000
        stream.send(late, good("greek", id="patient"))
        # The late one was read before the patient one, so that its second has begun; a slow machine may have used it up by now.
        wait_until(lambda: any("greek" in opened.question.tasks for opened in list(engine._questions._open.values())))
        time.sleep(1.1)
        brake.go_on.set()
        first, second = next(stream.call), next(stream.call)
        assert (first.infer_response.id, first.error_message.partition(";")[0]) == (
            "late",
            "the deadline passed before the answer was there",
        )
        assert (second.infer_response.id, second.error_message) == ("patient", "")
        stream.end()


def test_a_cancelled_stream_costs_nothing_more(quiet: ServerThread, caplog: pytest.LogCaptureFixture) -> None:
    engine = quiet.server.engine
    with grpc.insecure_channel(quiet.address) as channel:
        brake = Brake(engine)
        for _ in range(20):
            stream = Stream(channel)
            stream.send(*[good()] * 40)
            wait_until(lambda stream=stream: stream.num_taken > 0)
            stream.call.cancel()
            stream.end()
        wait_until(lambda: len(engine._questions) == 0)
        edge = quiet.server.front_door._edge
        wait_until(lambda: (len(edge._streams), edge._requests.total, edge._bytes.total, len(edge._endless)) == (0, 0, 0, 0))
        brake.go_on.set()
        assert infer(channel, good())[0] is grpc.StatusCode.OK
        # What had not begun never ran.
        assert max(segment.rows_computed for segment in engine.statistics()) <= 100
    assert not caplog.records


def test_a_stream_is_read_no_further_than_its_answers_go_out(quiet: ServerThread) -> None:
    engine = quiet.server.engine
    with grpc.insecure_channel(quiet.address) as channel:
        brake = Brake(engine)
        stream = Stream(channel)
        stream.send(*[good(id=str(index)) for index in range(200)])
        stream.end()
        wait_until(lambda: len(engine._questions) == 32)
        time.sleep(0.3)
        assert len(engine._questions) == 32
        brake.go_on.set()
        assert [answer.infer_response.id for answer in stream.call] == [str(index) for index in range(200)]


def test_who_never_reads_holds_up_nobody_else(tmp_path: pathlib.Path) -> None:
    builder = RepositoryBuilder(tmp_path)
    labels = tuple(f"class {index}" for index in range(20_000))
    builder.publish({"digits": DIGITS, "many": TaskPlan(("stem:8:a", "block:trunk", "head:many:20000"), labels)})
    with (
        serving(builder.root, metrics_listen="127.0.0.1:0") as server,
        grpc.insecure_channel(server.address) as lazy,
        grpc.insecure_channel(server.address) as channel,
    ):
        streams = [Stream(lazy) for _ in range(2)]
        for stream in streams:
            stream.send(*[good("many", id=str(index)) for index in range(100)])
            stream.end()
        wait_until(lambda: num_answered(server) >= 2 * 32)
        before = 0
        while before != (before := num_answered(server)):
            time.sleep(0.3)
        # What nobody reads is not computed for ever.
        assert before < 2 * 100
        for _ in range(20):
            assert infer(channel, good())[0] is grpc.StatusCode.OK
        for stream in streams:
            assert [answer.infer_response.id for answer in stream.call] == [str(index) for index in range(100)]
        assert num_answered(server) == 2 * 100


def num_answered(server: ServerThread) -> int:
    """Returns how many messages of streams were answered."""
    line = r'munet_calls_total{method="GRPCInferenceService/ModelStreamInfer",status="OK"} (.*)'
    found = re.search(line, scrape(server))
    return int(float(found[1])) if found else 0


def test_messages_and_streams_that_are_too_many_are_refused_and_probes_are_not(builder: RepositoryBuilder) -> None:
    limits = Limits(max_requests_in_flight=3, max_streams=3)
    with serving(builder.root, limits=limits, metrics_listen="127.0.0.1:0") as server:
        with grpc.insecure_channel(server.address) as channel:
            brake = Brake(server.server.engine)
            streams = [Stream(channel) for _ in range(3)]
            streams[0].send(*[good(id=str(index)) for index in range(5)])
            # The first three wait for the engine; the others fail at once, and are told in their turn.
            wait_until(lambda: "RESOURCE_EXHAUSTED" in scrape(server))
            assert infer(channel, good())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert Stub(channel).ServerReady(service_pb2.ServerReadyRequest(), timeout=10).ready
            assert Stub(channel).ModelReady(service_pb2.ModelReadyRequest(name="digits"), timeout=10).ready
            streams[1].send(good())
            assert "requests in flight: found 3" in next(streams[1].call).error_message
            streams[2].send(good())
            next(streams[2].call)
            with pytest.raises(grpc.RpcError) as caught:
                next(Stream(channel).call)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "open streams: found 3" in caught.value.details()
            assert ("retry-after-ms", "100") in caught.value.trailing_metadata()
            brake.go_on.set()
            answers = list(itertools.islice(streams[0].call, 5))
            assert [bool(answer.error_message) for answer in answers] == [False, False, False, True, True]
            assert [answer.infer_response.id for answer in answers] == ["0", "1", "2", "3", "4"]
            for stream in streams:
                stream.end()
                assert list(stream.call) == []
            (answer,) = Stub(channel).ModelStreamInfer(iter([good()]), timeout=10)
            assert not answer.error_message
        counted = 'munet_calls_total{method="GRPCInferenceService/ModelStreamInfer",status="RESOURCE_EXHAUSTED"} 5.0'
        assert counted in scrape(server)


def scrape(server: ServerThread) -> str:
    with urllib.request.urlopen(f"http://{server.server.metrics_address}/metrics", timeout=10) as answer:
        return str(answer.read(), "utf-8")


def test_readiness_goes_down_before_anything_is_refused(builder: RepositoryBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    pause = HeldPause(monkeypatch)
    seen: list[tuple[bool, bool, bool, grpc.StatusCode]] = []

    def look(address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            stub = Stub(channel)
            try:
                while True:
                    live = stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=5).live
                    ready = stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=5).ready
                    task = stub.ModelReady(service_pb2.ModelReadyRequest(name="digits"), timeout=5).ready
                    seen.append((live, ready, task, infer(channel, good())[0]))
                    if not ready and not task:
                        pause.over.set()
            except grpc.RpcError:
                return

    with serving(builder.root, drain_seconds=0.5) as server:
        looking = threading.Thread(target=look, args=(server.address,))
        looking.start()
        wait_until(lambda: bool(seen))
    looking.join()
    assert seen[0] == (True, True, True, grpc.StatusCode.OK)
    assert (True, False, False, grpc.StatusCode.OK) in seen
    assert pause.asked_seconds == [0.5]


def test_shutdown_answers_what_a_stream_has_sent_and_does_not_wait_for_idle_ones(builder: RepositoryBuilder) -> None:
    heard: list[Any] = []

    def listen(stream: Stream) -> None:
        try:
            heard.extend(stream.call)
        except grpc.RpcError as error:
            heard.append((error.code(), error.details()))

    # The channel outlives the server: it is the server that ends the two that stay open.
    with serving(builder.root, grace_seconds=20) as server:
        channel = grpc.insecure_channel(server.address)
        busy, idle, ended = Stream(channel), Stream(channel), Stream(channel)
        brake = Brake(server.server.engine)
        busy.send(good(id="last"))
        ended.send(good(id="last"))
        ended.end()
        wait_until(lambda: len(server.server.engine._questions) == 2)
        listeners = [threading.Thread(target=listen, args=(stream,)) for stream in (busy, idle, ended)]
        for listener in listeners:
            listener.start()
        threading.Timer(0.3, brake.go_on.set).start()
        started = time.monotonic()
    assert time.monotonic() - started < 15
    for stream in (busy, idle):
        stream.end()
    for listener in listeners:
        listener.join()
    channel.close()
    ends = [one for one in heard if isinstance(one, tuple)]
    assert [answer.infer_response.id for answer in heard if not isinstance(answer, tuple)] == ["last"] * 2
    assert [code for code, _ in ends] == [grpc.StatusCode.UNAVAILABLE] * 2
    assert all("found it shutting down" in words for _, words in ends)
