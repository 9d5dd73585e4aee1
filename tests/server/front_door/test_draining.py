"""Taking a server out of service and putting it back, over real gRPC."""

from __future__ import annotations

import concurrent.futures
import pathlib

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from server.client import AdminClient, Client
from server.config import Limits
from server.errors import CallTimeoutError, ServerBusyError, ServerUnreachableError
from tests.support.repository import HEBREW, RepositoryBuilder, random_images
from tests.support.serving import Brake, HeldPause, ServerThread, serving, wait_until

IMAGE = random_images(1, 8)[0]


@pytest.fixture
def builder(tmp_path: pathlib.Path) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path / "repository")
    builder.publish()
    return builder


def is_serving(address: str, service: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def gives_up_and_leaves_it_draining(admin: AdminClient) -> bool:
    """Has a server drain and stops waiting for it; tells whether that had come to it by then."""
    with pytest.raises(CallTimeoutError):
        admin.drain(timeout_seconds=0.2)
    return admin.status().draining


def test_what_is_in_flight_finishes_and_nothing_new_begins(builder: RepositoryBuilder) -> None:
    with (
        serving(builder.root) as server,
        Client(server.address) as client,
        AdminClient(server.admin_address) as admin,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        brake = Brake(server.server.engine)
        asking = threads.submit(client.classify, "digits", IMAGE)
        assert brake.entered.wait(60)
        wait_until(lambda: gives_up_and_leaves_it_draining(admin))
        draining = threads.submit(admin.drain)
        with pytest.raises(ServerUnreachableError, match="found it draining"):
            client.classify("digits", IMAGE)
        assert not is_serving(server.address, "")
        assert not is_serving(server.address, "digits")
        status = admin.status()
        assert (status.draining, status.num_in_flight) == (True, 1)
        # The rest of administration goes on.
        assert admin.reload().changed is False
        assert not draining.done()
        brake.go_on.set()
        assert draining.result(60) is True
        assert asking.result(60).generation == 1
        assert admin.drain() is True
        assert admin.status().num_in_flight == 0
        assert admin.drain(cancel=True) is False
        assert admin.status().draining is False
        assert is_serving(server.address, "digits")
        assert client.classify("digits", IMAGE).generation == 1


def test_questions_are_answered_for_a_while_after_health_says_no(
    builder: RepositoryBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = HeldPause(monkeypatch)
    with (
        serving(builder.root, drain_seconds=0.3) as server,
        Client(server.address) as client,
        AdminClient(server.admin_address) as admin,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        draining = threads.submit(admin.drain)
        wait_until(lambda: not is_serving(server.address, ""))
        assert client.classify("digits", IMAGE).classifications
        assert not draining.done()
        pause.over.set()
        assert draining.result(60) is True
    assert pause.asked_seconds == [0.3]


def count_drains(server: ServerThread) -> list[None]:
    """Returns a list that gets an entry for each drain that comes to a server from now on."""
    begun: list[None] = []
    draining = server.server.front_door._draining
    drain = draining.drain

    async def counting() -> bool:
        begun.append(None)
        return await drain()

    draining.drain = counting
    return begun


def test_who_waits_is_told_that_somebody_cancelled(builder: RepositoryBuilder) -> None:
    with (
        serving(builder.root) as server,
        Client(server.address) as client,
        AdminClient(server.admin_address) as admin,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        brake = Brake(server.server.engine)
        asking = threads.submit(client.classify, "digits", IMAGE)
        assert brake.entered.wait(60)
        begun = count_drains(server)
        waiting = [threads.submit(admin.drain) for _ in range(2)]
        wait_until(lambda: len(begun) == 2)
        assert admin.status().draining
        assert admin.drain(cancel=True) is False
        assert admin.drain(cancel=True) is False
        assert [one.result(60) for one in waiting] == [False, False]
        brake.go_on.set()
        assert asking.result(60).classifications


def test_a_server_that_is_full_can_still_be_told_what_to_do(builder: RepositoryBuilder) -> None:
    builder.publish({"digits": HEBREW})
    with (
        serving(builder.root, limits=Limits(max_requests_in_flight=1)) as server,
        Client(server.address) as client,
        AdminClient(server.admin_address) as admin,
        concurrent.futures.ThreadPoolExecutor() as threads,
    ):
        brake = Brake(server.server.engine)
        asking = threads.submit(client.classify, "digits", IMAGE)
        assert brake.entered.wait(60)
        with pytest.raises(ServerBusyError):
            client.classify("digits", IMAGE)
        assert admin.status().num_in_flight == 1
        assert admin.reload().generation == 2
        brake.go_on.set()
        assert asking.result(60).classifications


def test_a_drained_server_shuts_down_as_any(builder: RepositoryBuilder) -> None:
    with serving(builder.root) as server, AdminClient(server.admin_address) as admin:
        assert admin.drain() is True
        address = server.address
    with Client(address) as client, pytest.raises(ServerUnreachableError):
        client.list_tasks(timeout_seconds=5)
