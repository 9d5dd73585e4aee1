"""What the clients share, and how they bear a server that fails; answers of a real one are tested in front_door/test_calls.py."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import socket
import threading
import time
from collections.abc import Callable, Iterator

import grpc
import pytest

from server import bulk, calls
from server.client import (
    AdminClient,
    AsyncAdminClient,
    AsyncClient,
    CallTimeoutError,
    Client,
    ClientClosedError,
    Retry,
    ServerBusyError,
    ServerFailedError,
    ServerUnreachableError,
    StreamQuestion,
    TaskList,
)
from server.transports import _retry_after_seconds, finish
from tests.support.flaky import FlakyServer, details
from tests.support.ports import lasting_port
from tests.support.serving import wait_until

GONE = (grpc.StatusCode.UNAVAILABLE, None)
QUICK = Retry(first_pause_seconds=0.001)


def test_both_transports_have_the_same_calls() -> None:
    for blocking, awaited, where, names in (
        (Client, AsyncClient, calls, ("classify", "classify_tasks", "list_tasks", "get_task")),
        (Client, AsyncClient, bulk, ("classify_stream", "classify_files")),
        (AdminClient, AsyncAdminClient, calls, ("status", "reload")),
    ):
        for name in names:
            call = getattr(where, name)
            for method in (getattr(blocking, name), getattr(awaited, name)):
                assert method.__doc__ == call.__doc__
                assert inspect.signature(method) == inspect.signature(call)
                assert "Raises:" in method.__doc__


Ask = Callable[[str, Retry | None, float | None], TaskList]


def ask_blocking(address: str, retry: Retry | None, timeout_seconds: float | None) -> TaskList:
    with Client(address, retry=retry) as client:
        return client.list_tasks(timeout_seconds=timeout_seconds)


def ask_awaited(address: str, retry: Retry | None, timeout_seconds: float | None) -> TaskList:
    async def ask() -> TaskList:
        async with AsyncClient(address, retry=retry) as client:
            return await client.list_tasks(timeout_seconds=timeout_seconds)

    return asyncio.run(ask())


@pytest.fixture(params=[ask_blocking, ask_awaited], ids=["blocking", "awaited"])
def ask(request: pytest.FixtureRequest) -> Ask:
    return request.param


@pytest.fixture
def flaky() -> Iterator[FlakyServer]:
    with FlakyServer() as server:
        yield server


def test_a_server_that_is_not_there_for_a_moment_is_asked_again(ask: Ask, flaky: FlakyServer) -> None:
    flaky.failures = [GONE, (grpc.StatusCode.UNAVAILABLE, 0.2)]
    # gRPC rounds a deadline up before it sends it: of 4 seconds to some hundredths, of twice as many to a whole one.
    assert ask(flaky.address, QUICK, 4).generation == 7
    _, second, third = flaky.remaining_seconds
    # One deadline for all of them: what was waited is not there any more.
    assert third < second - 0.1


def test_but_only_so_often(ask: Ask, flaky: FlakyServer) -> None:
    flaky.failures = [GONE] * 9
    with pytest.raises(ServerUnreachableError, match="not now"):
        ask(flaky.address, QUICK, 10)
    assert len(flaky.remaining_seconds) == QUICK.max_attempts


def test_a_busy_server_is_asked_again_when_it_said(ask: Ask, flaky: FlakyServer) -> None:
    flaky.failures = [(grpc.StatusCode.RESOURCE_EXHAUSTED, 0.25)]
    started = time.monotonic()
    assert ask(flaky.address, QUICK, 10).generation == 7
    assert 0.25 <= time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("failure", "retry", "error"),
    [
        (GONE, None, ServerUnreachableError),
        ((grpc.StatusCode.RESOURCE_EXHAUSTED, None), QUICK, ServerBusyError),
        ((grpc.StatusCode.RESOURCE_EXHAUSTED, 3600.0), QUICK, ServerBusyError),
        ((grpc.StatusCode.INTERNAL, 0.001), QUICK, ServerFailedError),
    ],
    ids=["no retries", "no hint", "an hour", "a fault"],
)
def test_what_is_not_asked_again(
    ask: Ask, flaky: FlakyServer, failure: tuple[grpc.StatusCode, float | None], retry: Retry | None, error: type[Exception]
) -> None:
    flaky.failures = [failure]
    with pytest.raises(error) as caught:
        ask(flaky.address, retry, None if failure[1] else 10)
    assert len(flaky.remaining_seconds) == 1
    assert caught.value.retry_after_seconds == pytest.approx(failure[1]) if failure[1] else True


def test_nobody_waits_past_the_deadline(ask: Ask, flaky: FlakyServer) -> None:
    flaky.failures = [(grpc.StatusCode.RESOURCE_EXHAUSTED, 20.0)]
    started = time.monotonic()
    with pytest.raises(ServerBusyError):
        ask(flaky.address, Retry(), 5)
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    ("failure", "error"),
    [(GONE, ServerUnreachableError), ((grpc.StatusCode.RESOURCE_EXHAUSTED, 0.001), ServerBusyError)],
    ids=["gone", "busy"],
)
def test_when_time_runs_out_between_attempts_the_error_says_what_was_waited_for(
    ask: Ask, flaky: FlakyServer, failure: tuple[grpc.StatusCode, float | None], error: type[Exception]
) -> None:
    flaky.failures = [failure, (grpc.StatusCode.DEADLINE_EXCEEDED, None)]
    with pytest.raises(error) as caught:
        ask(flaky.address, QUICK, 10)
    assert isinstance(caught.value.__cause__, CallTimeoutError)
    assert len(flaky.remaining_seconds) == 2
    # In the first attempt there is nothing else to say.
    flaky.failures = [(grpc.StatusCode.DEADLINE_EXCEEDED, None)]
    with pytest.raises(CallTimeoutError):
        ask(flaky.address, QUICK, 10)


def test_a_server_that_is_started_again_meanwhile_is_reached() -> None:
    with FlakyServer(f"127.0.0.1:{lasting_port()}") as first, Client(first.address, retry=Retry(200, 0.05, 0.05)) as client:
        client.list_tasks()
        first.__exit__(None, None, None)
        found: list[TaskList] = []
        asking = threading.Thread(target=lambda: found.append(client.list_tasks(timeout_seconds=20)))
        asking.start()
        time.sleep(0.2)
        with FlakyServer(first.address):
            asking.join()
    assert [tasks.generation for tasks in found] == [7]


def test_orders_to_a_server_are_given_once(flaky: FlakyServer) -> None:
    flaky.failures = [GONE]
    with AdminClient(flaky.address, retry=QUICK) as admin, pytest.raises(ServerUnreachableError):
        admin.reload()
    assert len(flaky.remaining_seconds) == 1


def test_a_client_that_is_closed_between_two_attempts_ends_its_calls(flaky: FlakyServer) -> None:
    flaky.failures = [(grpc.StatusCode.UNAVAILABLE, 30.0)] * 9
    client = Client(flaky.address)
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        asked = threads.submit(client.list_tasks, timeout_seconds=None)
        wait_until(lambda: bool(flaky.remaining_seconds))
        client.close()
        with pytest.raises(ClientClosedError, match="expected an open one"):
            asked.result(20)
    assert len(flaky.remaining_seconds) == 1


def test_so_does_one_for_asyncio(flaky: FlakyServer) -> None:
    async def ask() -> None:
        flaky.failures = [(grpc.StatusCode.UNAVAILABLE, 30.0)] * 9
        client = AsyncClient(flaky.address)
        asked = asyncio.create_task(client.list_tasks(timeout_seconds=None))
        while not flaky.remaining_seconds:
            await asyncio.sleep(0.005)
        await client.close()
        with pytest.raises(ClientClosedError, match="expected an open one"):
            await asyncio.wait_for(asked, 20)
        assert len(flaky.remaining_seconds) == 1

    asyncio.run(ask())


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of something that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_closing_a_client_ends_calls_under_way_and_refuses_later_ones(mute: str) -> None:
    client = Client(mute)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        asked = threads.submit(client.list_tasks, timeout_seconds=None)
        watched = threads.submit(lambda: list(client.watch_tasks()))
        time.sleep(0.2)
        client.close()
        for future in (asked, watched):
            with pytest.raises(ClientClosedError):
                future.result(20)
    for late in (client.list_tasks, lambda: list(client.watch_tasks()), lambda: list(client.classify_stream(iter(())))):
        with pytest.raises(ClientClosedError):
            late()


def test_so_does_closing_one_for_asyncio_unless_whoever_waits_is_cancelled(mute: str) -> None:
    async def watch(client: AsyncClient) -> None:
        async for _ in client.watch_tasks():
            pass

    async def ask() -> None:
        client = AsyncClient(mute)
        asked = asyncio.create_task(client.list_tasks(timeout_seconds=None))
        watched = asyncio.create_task(watch(client))
        left = asyncio.create_task(client.list_tasks(timeout_seconds=None))
        await asyncio.sleep(0.2)
        left.cancel()
        await client.close()
        for task in (asked, watched):
            with pytest.raises(ClientClosedError):
                await asyncio.wait_for(task, 20)
        with pytest.raises(asyncio.CancelledError):
            await left
        with pytest.raises(ClientClosedError):
            await client.list_tasks()
        with pytest.raises(ClientClosedError):
            await watch(client)

    asyncio.run(ask())


def test_a_stream_that_breaks_says_so(flaky: FlakyServer) -> None:
    questions = [StreamQuestion("digits", b"", id=str(index)) for index in range(3)]
    flaky.failures = [None, GONE]
    with Client(flaky.address) as client:
        answers = client.classify_stream(iter(questions))
        first = next(answers)
        # A code that nobody knows is a failure all the same.
        assert (first.id, type(first.error)) == ("0", ServerFailedError)
        with pytest.raises(ServerUnreachableError, match="not now"):
            list(answers)


@pytest.mark.parametrize("value", [b"", b"\xff\xff", "no bytes", details(grpc.StatusCode.UNAVAILABLE, 1.0)[:-3]])
def test_details_that_nobody_can_read_are_passed_over(value: bytes | str) -> None:
    assert _retry_after_seconds((("other", "x"), ("grpc-status-details-bin", value))) is None


def test_a_coroutine_that_waits_is_no_blocking_one() -> None:
    with pytest.raises(RuntimeError, match="waits for an event loop"):
        finish(asyncio.sleep(0))
