"""Deadlines, cancellation, overload, health and shutdown over real gRPC."""

from __future__ import annotations

import asyncio
import pathlib
import threading
import time
import urllib.request
from collections.abc import Iterator

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from munet.v1 import inference_pb2 as pb
from server.client import AdminClient, AsyncClient, Client, Retry
from server.config import Limits
from server.errors import CallRefusedError, CallTimeoutError, ServerBusyError, ServerUnreachableError, SettingsError
from tests.support.repository import DIGITS, HEBREW, RepositoryBuilder, random_images
from tests.support.serving import ENGINE, Brake, ServerThread, serving, wait_until

IMAGES = random_images(64, 8, seed=2)


@pytest.fixture
def builder(tmp_path: pathlib.Path) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path / "repository")
    builder.publish()
    return builder


def test_a_deadline_frees_the_caller_and_the_engine(builder: RepositoryBuilder) -> None:
    with serving(builder.root) as server, Client(server.address) as client:
        brake = Brake(server.server.engine)
        started = time.monotonic()
        with pytest.raises(CallTimeoutError):
            client.classify("digits", list(IMAGES), timeout_seconds=0.3)
        assert time.monotonic() - started < 5
        wait_until(lambda: len(server.server.engine._questions) == 0)
        brake.go_on.set()
        assert client.classify("digits", IMAGES[0]).classifications
        # Of the late request one batch had begun; the other rows never ran.
        route = client.get_task("digits").route
        counters = {segment.name: segment.rows_computed for segment in server.server.engine.statistics()}
        assert counters[route[0]] <= 8 + 1
        assert counters[route[1]] == 1


def test_cancelled_calls_cost_nothing_and_disturb_nobody(builder: RepositoryBuilder) -> None:
    async def ask(server: ServerThread, brake: Brake) -> list[np.ndarray]:
        async with AsyncClient(server.address) as client:
            calls = [asyncio.ensure_future(client.classify("digits", IMAGES[0], include_logits=True)) for _ in range(1000)]
            await asyncio.to_thread(wait_until, lambda: len(server.server.engine._questions) == 1000)
            for index, call in enumerate(calls):
                if index % 100:
                    call.cancel()
            await asyncio.to_thread(wait_until, lambda: len(server.server.engine._questions) == 10)
            brake.go_on.set()
            results = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(result, asyncio.CancelledError) for result in results) == 990
        return [result.classifications[0].logits for result in results[::100]]

    with serving(builder.root) as server:
        brake = Brake(server.server.engine)
        logits = asyncio.run(ask(server, brake))
        assert len({answer.tobytes() for answer in logits}) == 1
        wait_until(lambda: len(server.server.engine._questions) == 0)
        with Client(server.address) as client:
            route = client.get_task("digits").route
        counters = {segment.name: segment.rows_computed for segment in server.server.engine.statistics()}
        assert counters[route[-1]] <= 20
        assert server.server.engine._questions.num_planned == 0


def test_too_much_at_once_is_refused_with_a_hint(builder: RepositoryBuilder) -> None:
    limits = Limits(max_requests_in_flight=4)
    with serving(builder.root, limits=limits) as server, grpc.insecure_channel(server.address) as channel:
        brake = Brake(server.server.engine)
        unary = channel.unary_unary("/munet.v1.InferenceService/Classify")
        image = pb.Image(raw=pb.RawImage(height=8, width=8, channels=3, data=IMAGES[0].tobytes()))
        request = pb.ClassifyRequest(task="digits", images=[image]).SerializeToString()
        calls = [unary.future(request, timeout=20) for _ in range(10)]
        wait_until(lambda: sum(call.done() for call in calls) >= 6)
        refused = [call for call in calls if call.done()]
        assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert ("retry-after-ms", "100") in refused[0].trailing_metadata()
        brake.go_on.set()
        assert sum(call.code() is grpc.StatusCode.OK for call in calls) == 4


def test_the_engines_bound_reaches_the_caller(builder: RepositoryBuilder) -> None:
    engine = ENGINE.model_copy(update={"max_waiting_rows": 100})
    with serving(builder.root, engine=engine) as server, Client(server.address) as client:
        brake = Brake(server.server.engine)
        first = threading.Thread(target=client.classify, args=("digits", list(IMAGES)))
        first.start()
        assert brake.entered.wait(60)
        with pytest.raises(ServerBusyError, match="expected at most 100"):
            client.classify("digits", IMAGES[0])
        brake.go_on.set()
        first.join()
        assert client.classify("digits", IMAGES[0]).classifications


def test_a_client_comes_back_when_it_was_told_to(builder: RepositoryBuilder) -> None:
    engine = ENGINE.model_copy(update={"max_waiting_rows": 100})
    # However long it takes until there is room.
    retry = Retry(max_attempts=1000)
    with (
        serving(builder.root, engine=engine, metrics_listen="127.0.0.1:0") as server,
        Client(server.address, retry=retry) as client,
    ):
        brake = Brake(server.server.engine)
        asking = [threading.Thread(target=client.classify, args=("digits", list(IMAGES)))]
        asking[0].start()
        assert brake.entered.wait(60)
        results: list[object] = []
        asking.append(threading.Thread(target=lambda: results.append(client.classify("digits", IMAGES[0]))))
        asking[1].start()
        refused = 'munet_calls_total{method="InferenceService/Classify",status="RESOURCE_EXHAUSTED"} '
        metrics = f"http://{server.server.metrics_address}/metrics"
        wait_until(lambda: refused in urllib.request.urlopen(metrics).read().decode())
        brake.go_on.set()
        for thread in asking:
            thread.join()
        assert len(results) == 1


def check_health(address: str, service: str) -> str:
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        except grpc.RpcError as error:
            return error.code().name
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


def test_health_by_task(builder: RepositoryBuilder) -> None:
    with serving(builder.root) as server:
        for service in ("", "digits", "munet.v1.InferenceService"):
            assert check_health(server.address, service) == "SERVING"
            assert check_health(server.admin_address, service) == "SERVING"
        assert check_health(server.address, "unknown") == "NOT_FOUND"
        builder.publish({"new": DIGITS})
        with AdminClient(server.admin_address) as admin:
            admin.reload()
        assert check_health(server.address, "new") == "SERVING"
        assert check_health(server.address, "digits") == "NOT_FOUND"


def test_every_watcher_of_health_hears_of_the_end(builder: RepositoryBuilder) -> None:
    heard: list[list[int]] = [[], [], []]

    def watch(address: str, index: int) -> None:
        with grpc.insecure_channel(address) as channel:
            answers = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="digits"))
            try:
                for answer in answers:
                    heard[index].append(answer.status)
                    if index == 0:
                        answers.cancel()
            except grpc.RpcError:
                pass

    with serving(builder.root, drain_seconds=0.3) as server:
        watchers = [threading.Thread(target=watch, args=(server.address, index)) for index in range(3)]
        for watcher in watchers:
            watcher.start()
        wait_until(lambda: all(heard))
    for watcher in watchers:
        watcher.join()
    assert heard == [[1], [1, 2], [1, 2]]


def test_shutdown_finishes_what_is_in_flight_and_refuses_what_is_new(builder: RepositoryBuilder) -> None:
    results: list[object] = []

    def ask(address: str) -> None:
        with Client(address) as client:
            results.append(client.classify("digits", list(IMAGES)))

    with serving(builder.root, grace_seconds=60) as server:
        brake = Brake(server.server.engine)
        asking = threading.Thread(target=ask, args=(server.address,))
        asking.start()
        assert brake.entered.wait(60)
        threading.Timer(0.3, brake.go_on.set).start()
    asking.join()
    assert len(results) == 1
    with Client(server.address) as client, pytest.raises(ServerUnreachableError):
        client.classify("digits", IMAGES[0], timeout_seconds=5)


def test_shutdown_does_not_wait_for_ever(builder: RepositoryBuilder) -> None:
    errors: list[BaseException] = []

    def ask(address: str) -> None:
        with Client(address) as client:
            try:
                client.classify("digits", list(IMAGES))
            except BaseException as error:
                errors.append(error)
        # What runs is let go when the call is over, so that it is not what ended it.
        brake.go_on.set()

    with serving(builder.root, grace_seconds=0.2) as server:
        brake = Brake(server.server.engine)
        asking = threading.Thread(target=ask, args=(server.address,))
        asking.start()
        assert brake.entered.wait(60)
    asking.join()
    assert len(errors) == 1


def test_a_refused_reload_tells_why(builder: RepositoryBuilder) -> None:
    with serving(builder.root, watch_interval_seconds=60) as server, AdminClient(server.admin_address) as admin:
        assert admin.reload().changed is False
        builder.publish({"digits": HEBREW})
        assert admin.reload().generation == 2
        builder.publish({"digits": DIGITS}, current=False)
        builder.edit(3, lambda message: message.tasks[0].route.reverse())
        builder.set_current(3)
        with pytest.raises(CallRefusedError, match="FAILED_PRECONDITION") as caught:
            admin.reload()
        assert "generation 3 is refused: task 'digits': route" in caught.value.details
        status = admin.status()
        assert status.generation == 2
        assert status.last_reload is not None
        assert (status.last_reload.generation, status.last_reload.error) == (3, caught.value.details)


def test_an_address_in_use_is_refused(builder: RepositoryBuilder) -> None:
    with (
        serving(builder.root) as server,
        pytest.raises(SettingsError, match="listen: found"),
        serving(builder.root, listen=server.address),
    ):
        pass


@pytest.fixture
def unreachable() -> Iterator[Client]:
    with Client("127.0.0.1:1") as client:
        yield client


def test_no_server_there(unreachable: Client) -> None:
    with pytest.raises(ServerUnreachableError, match=r"127\.0\.0\.1:1"):
        unreachable.list_tasks(timeout_seconds=5)


def test_words_of_any_length_reach_the_caller(builder: RepositoryBuilder) -> None:
    with serving(builder.root, watch_interval_seconds=60) as server, AdminClient(server.admin_address) as admin:
        builder.publish({"digits": DIGITS}, current=False)
        builder.edit(2, lambda message: [message.files.add(path="../" + "é" * 5000) for _ in range(50)])
        builder.set_current(2)
        # Several times: gRPC refuses headers that are somewhat too large at random.
        for _ in range(8):
            with pytest.raises(CallRefusedError, match="generation 2 is refused: files: "):
                admin.reload()
