"""What is borne from whoever connects: connections, silence, floods and nonsense, with sockets that speak HTTP/2 by hand."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import random
import re
import socket
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.client import AsyncClient, Client
from server.config import ConnectionSettings, Limits
from tests.support.http2 import GOAWAY, PING, PREFACE, SETTINGS, connect, frame
from tests.support.repository import DIGITS, RepositoryBuilder, random_images
from tests.support.serving import ServerThread, serving, wait_until

ENHANCE_YOUR_CALM = 11
IMAGE = random_images(1, 8)[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("repository")
    RepositoryBuilder(root).publish({"digits": DIGITS})
    return root


@pytest.fixture(scope="module")
def server(root: pathlib.Path) -> Iterator[ServerThread]:
    with serving(root, connections=ConnectionSettings(max_connections=6, max_calls=3, max_metadata_bytes=4096)) as server:
        yield server


@pytest.fixture(autouse=True)
def answers_afterwards(server: ServerThread) -> Iterator[None]:
    """Whatever somebody did, the next caller is answered."""
    yield
    wait_until(lambda: answers(server))


def answers(server: ServerThread) -> bool:
    with Client(server.address) as client:
        try:
            return client.classify("digits", IMAGE, timeout_seconds=5).task == "digits"
        except Exception:
            return False


def frames(connection: socket.socket) -> Iterator[tuple[int, bytes]]:
    """Yields kind and content of what the server sends, until it closes."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(65536):
            received += part
            while len(received) >= 9 and len(received) >= 9 + int.from_bytes(received[:3], "big"):
                size = int.from_bytes(received[:3], "big")
                yield received[3], received[9 : 9 + size]
                received = received[9 + size :]


def is_closed(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        while connection.recv(65536):
            pass
        return True
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


def test_more_connections_than_are_borne_are_closed_as_they_come(root: pathlib.Path) -> None:
    # With time to spare: none is closed for another reason.
    with serving(root, connections=ConnectionSettings(max_connections=6)) as server, contextlib.ExitStack() as stack:
        connections = []
        for _ in range(10):
            connections.append(stack.enter_context(connect(server.address)))
            connections[-1].sendall(PREFACE + frame(SETTINGS))
        wait_until(lambda: sum(map(is_closed, connections)) == 4)
        assert [is_closed(connection) for connection in connections] == [False] * 6 + [True] * 4
        assert not answers(server)


@pytest.mark.parametrize("content", [b"", PREFACE[:10]])
def test_a_connection_that_is_never_set_up_is_closed(root: pathlib.Path, content: bytes) -> None:
    with serving(root, connections=ConnectionSettings(handshake_seconds=0.5)) as patient:
        started = time.monotonic()
        with connect(patient.address) as connection:
            connection.sendall(content)
            assert GOAWAY in [kind for kind, _ in frames(connection)] or is_closed(connection)
        assert 0.3 < time.monotonic() - started < 9


def test_one_that_answers_no_question_whether_it_lives_is_closed(root: pathlib.Path) -> None:
    """As where a machine was switched off: nothing comes from it, not even the end."""
    bounds = ConnectionSettings(keepalive_seconds=1.0, keepalive_timeout_seconds=0.5)
    with serving(root, connections=bounds) as doubting:
        started = time.monotonic()
        with connect(doubting.address) as connection:
            connection.settimeout(30)
            connection.sendall(PREFACE + frame(SETTINGS) + frame(SETTINGS, flags=1))
            kinds = [kind for kind, _ in frames(connection)]
        assert PING in kinds
        # By itself gRPC waits a minute for the answer.
        assert 1.0 < time.monotonic() - started < 30


def test_a_flood_of_pings_is_ended(server: ServerThread) -> None:
    with connect(server.address) as connection:
        connection.sendall(PREFACE + frame(SETTINGS) + frame(SETTINGS, flags=1))
        with contextlib.suppress(ConnectionError):
            for number in range(1000):
                connection.sendall(frame(PING, number.to_bytes(8, "big")))
        gone = [content for kind, content in frames(connection) if kind == GOAWAY]
    assert ENHANCE_YOUR_CALM in [int.from_bytes(content[4:8], "big") for content in gone]


@pytest.mark.parametrize(
    "content",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
        bytes(100_000),
        PREFACE + b"\xff" * 100_000,
        PREFACE + frame(SETTINGS) + frame(1, b"\xff" * 1000, flags=4),
        PREFACE + frame(SETTINGS, b"\x00" * 5),
    ],
)
def test_what_is_no_call_is_ended_without_a_word_of_what_is_inside(server: ServerThread, content: bytes) -> None:
    with connect(server.address) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(content)
        connection.settimeout(30)
        received = b""
        with contextlib.suppress(ConnectionError):
            while part := connection.recv(65536):
                received += part
    check_words(received.decode("latin1"))


def test_random_bytes_on_many_connections(server: ServerThread) -> None:
    rng = random.Random(7)
    for _ in range(40):
        with contextlib.suppress(OSError), connect(server.address) as connection:
            connection.sendall((PREFACE if rng.random() < 0.5 else b"") + rng.randbytes(rng.randrange(2000)))


def test_calls_of_one_connection_beyond_the_bound_wait_at_the_client(server: ServerThread) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
        assert all(next(watch).status == health_pb2.HealthCheckResponse.SERVING for watch in watches)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(), timeout=0.5)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # On a connection of its own, as another client has.
        options = (("grpc.use_local_subchannel_pool", 1),)
        with grpc.insecure_channel(server.address, options) as other:
            assert health_pb2_grpc.HealthStub(other).Check(health_pb2.HealthCheckRequest(), timeout=30)
        watches[0].cancel()
        assert stub.Check(health_pb2.HealthCheckRequest(), timeout=30)


@pytest.mark.parametrize(("max_calls", "number"), [(32, 500), (2000, 1800)])
def test_calls_that_all_come_at_once_are_all_answered(root: pathlib.Path, max_calls: int, number: int) -> None:
    """Whether they wait at the client or at the server."""

    async def ask(address: str) -> list[str]:
        async with AsyncClient(address, retry=None) as client:
            calls = (client.classify("digits", IMAGE, timeout_seconds=240) for _ in range(number))
            answers = await asyncio.gather(*calls, return_exceptions=True)
        return [str(answer) for answer in answers if isinstance(answer, BaseException)]

    limits = Limits(max_requests_in_flight=4096)
    with serving(root, connections=ConnectionSettings(max_calls=max_calls), limits=limits) as server:
        assert asyncio.run(ask(server.address)) == []


@pytest.mark.parametrize(
    "metadata",
    [
        (("x", "y" * 5000),),
        tuple((f"key-{index}", "y" * 100) for index in range(50)),
        (("x-bin", os.urandom(5000)),),
    ],
)
def test_metadata_is_bounded(server: ServerThread, metadata: tuple[tuple[str, str | bytes], ...]) -> None:
    with grpc.insecure_channel(server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(), metadata=(("x", "y" * 3000),), timeout=30)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=30)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_idle_connection_is_closed_and_its_client_opens_another(root: pathlib.Path) -> None:
    with (
        serving(root, connections=ConnectionSettings(idle_seconds=0.5)) as idle,
        Client(idle.address) as client,
        connect(idle.address) as connection,
    ):
        connection.sendall(PREFACE + frame(SETTINGS) + frame(SETTINGS, flags=1))
        assert client.list_tasks().tasks
        assert GOAWAY in [kind for kind, _ in frames(connection)]
        time.sleep(0.6)
        assert client.list_tasks().tasks


LEAKS = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|/tmp/|/home/|/usr/|0x[0-9a-f]{6,}|object at|Error\(|Exception|onnxruntime|numpy",
    re.IGNORECASE,
)


def check_words(words: str) -> None:
    found = LEAKS.search(words)
    assert found is None, words


METHODS = (
    "/munet.v1.InferenceService/Classify",
    "/munet.v1.InferenceService/ClassifyTasks",
    "/munet.v1.InferenceService/GetTask",
    "/munet.v1.InferenceService/ListTasks",
    "/munet.v1.InferenceService/None",
    "/munet.v1.AdminService/Status",
    "/none",
    "/",
    "/../etc/passwd",
)


def call(channel: grpc.Channel, method: str, content: bytes) -> tuple[str, str]:
    """Returns the status of a call, and the words that came with it."""
    try:
        channel.unary_unary(method)(content, timeout=10)
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    return "OK", ""


def test_no_words_of_any_refusal_tell_what_is_inside(server: ServerThread) -> None:
    rng = random.Random(11)
    contents = [b"", b"\xff" * 20, b"\x0a\x05" + b"a" * 5, b"\x0a\xff\xff\xff\xff\x0f", *(rng.randbytes(60) for _ in range(15))]
    seen = set()
    with grpc.insecure_channel(server.address) as channel:
        for method in METHODS:
            for content in contents:
                status, words = call(channel, method, content)
                check_words(words)
                seen.add(status)
    assert seen == {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "UNIMPLEMENTED"}


@pytest.mark.parametrize(
    "method",
    [
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_nor_do_those_of_health_and_reflection(server: ServerThread, method: str) -> None:
    rng = random.Random(13)
    with grpc.insecure_channel(server.address) as channel:
        for content in (b"\xff" * 20, b"\x0a\xff", *(rng.randbytes(40) for _ in range(10))):
            call = channel.stream_stream(method)(iter([content]), timeout=0.5)
            with contextlib.suppress(grpc.RpcError):
                for _ in call:
                    pass
            check_words(call.details() or "")
