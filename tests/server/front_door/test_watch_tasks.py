"""Being told of what is served, over real gRPC."""

from __future__ import annotations

import asyncio
import pathlib
import threading
from collections.abc import Iterator

import grpc
import pytest

from server.access import Grant, Role, set_grant
from server.classification import Classifier
from server.client import AdminClient, AsyncClient, Client, Credentials, TaskChanges
from server.config import Limits, TokenSettings
from server.embedded.engine import EmbeddedEngine
from server.errors import CallDeniedError, ServerBusyError, ServerUnreachableError
from server.preprocessing import Preprocessor
from server.task_counts import TaskCounts
from server.tokens import add_line, line_of, new_token
from tests.support.reloading import Watched, run
from tests.support.repository import DIGITS, GREEK, HEBREW, SHORT, RepositoryBuilder, TaskPlan, random_images
from tests.support.serving import ENGINE, serving, wait_until

IMAGE = random_images(1, 8)[0]
METHOD = "/munet.v1.InferenceService/WatchTasks"


@pytest.fixture
def builder(tmp_path: pathlib.Path) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path / "repository")
    builder.publish({"digits": DIGITS, "greek": GREEK, "short": SHORT})
    return builder


def told(changes: TaskChanges) -> tuple[int, list[str], list[str], list[str], int]:
    added, changed = ([task.name for task in tasks] for tasks in (changes.added, changes.changed))
    return changes.generation, added, changed, list(changes.removed), changes.num_unchanged


def test_a_watcher_is_told_everything_and_then_what_changes(builder: RepositoryBuilder) -> None:
    with serving(builder.root) as server, Client(server.address) as client, AdminClient(server.admin_address) as admin:
        watching = client.watch_tasks()
        first = next(watching)
        assert told(first) == (1, ["digits", "greek", "short"], [], [], 0)
        assert first.added == client.list_tasks().tasks
        builder.publish({"digits": HEBREW, "greek": GREEK, "hebrew": HEBREW})
        second = next(watching)
        assert told(second) == (2, ["hebrew"], ["digits"], ["short"], 1)
        assert second.changed[0] == client.get_task("digits")
        admin.rollback()
        assert told(next(watching)) == (1, ["short"], ["digits"], ["hebrew"], 1)
        watching.close()


def test_whoever_comes_back_late_is_told_of_the_newest_alone(builder: RepositoryBuilder) -> None:
    engine = EmbeddedEngine(ENGINE)
    preprocessor = Preprocessor(1, Limits().image)

    async def test(watched: Watched) -> None:
        await watched.reloader.reload()
        set_grant(Grant(Role.READ, ("digits", "h*", "short")))
        watching = Classifier(watched.reloader, engine, preprocessor, Limits(), TaskCounts()).watch_tasks()
        first = await anext(watching)
        assert [task.name for task in first.added] == ["digits", "short"]
        for plan in (HEBREW, SHORT, DIGITS):
            builder.publish({"digits": plan, "hebrew": HEBREW, "greek": HEBREW})
            await watched.reloader.reload()
        # `digits` is what it was; `greek` exists for others.
        second = await anext(watching)
        assert (second.generation, [task.name for task in second.added], second.changed) == (4, ["hebrew"], ())
        assert (second.removed, second.num_unchanged) == (("short",), 1)
        waiting = asyncio.ensure_future(anext(watching))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        waiting.cancel()

    try:
        run(builder, engine, test)
    finally:
        preprocessor.close()
        engine.close()


def read(stream: Iterator[object], into: list[object]) -> None:
    try:
        into.extend(stream)
    except grpc.RpcError as error:
        into.append((error.code().name, error.details()))


def test_draining_and_shutting_down_end_watches_in_words(builder: RepositoryBuilder) -> None:
    heard: list[list[object]] = [[], []]
    with serving(builder.root) as server:
        # Closed after the server.
        channel = grpc.insecure_channel(server.address)
        watch = channel.unary_stream(METHOD)
        # One that never reads: it must hold up neither.
        idle = watch(b"")
        readers = []
        for index in range(2):
            readers.append(threading.Thread(target=read, args=(watch(b""), heard[index])))
            readers[-1].start()
            wait_until(lambda: len(heard[index]) == 1)  # noqa: B023
            if index == 0:
                with AdminClient(server.admin_address) as admin:
                    assert admin.drain(timeout_seconds=10) is True
                    wait_until(lambda: len(heard[0]) == 2)
                    with Client(server.address) as client, pytest.raises(ServerUnreachableError, match="found it draining"):
                        next(client.watch_tasks())
                    assert admin.drain(cancel=True) is False
    for reader in readers:
        reader.join()
    words = "this server cannot answer this now: found it {}, expected it serving; ask again later, or another one"
    assert [entry[1] for entry in heard] == [("UNAVAILABLE", words.format(why)) for why in ("draining", "shutting down")]
    idle.cancel()
    channel.close()


def test_who_never_reads_holds_up_nobody(builder: RepositoryBuilder) -> None:
    def long(name: str) -> TaskPlan:
        return TaskPlan((*DIGITS.route[:-1], f"head:{name}:3"), tuple(f"{name} {index} " + "x" * 100_000 for index in range(3)))

    # More than any connection takes in unread.
    builder.publish({"digits": long("a")})
    with (
        serving(builder.root) as server,
        AdminClient(server.admin_address) as admin,
        grpc.insecure_channel(server.address) as channel,
    ):
        idle = channel.unary_stream(METHOD)(b"")
        wait_until(lambda: admin.status().num_in_flight == 1)
        for name in ("b", "c", "d"):
            builder.publish({"digits": long(name)})
            assert admin.reload().generation == builder.newest()
        with Client(server.address) as client:
            assert client.get_task("digits").labels[0].startswith("d ")
        assert admin.drain(timeout_seconds=10) is True
        idle.cancel()


def test_watches_are_bounded_and_take_no_room_from_questions(builder: RepositoryBuilder) -> None:
    with serving(builder.root, limits=Limits(max_streams=2)) as server, Client(server.address) as client:
        watches = [client.watch_tasks() for _ in range(3)]
        for watch in watches[:2]:
            next(watch)
        with pytest.raises(ServerBusyError, match="open streams: found 2"):
            next(watches[2])
        assert client.classify("digits", IMAGE).classifications
        watches[0].close()

        def is_let_in() -> bool:
            watching = client.watch_tasks()
            try:
                return bool(next(watching).added)
            except ServerBusyError:
                return False
            finally:
                watching.close()

        wait_until(is_let_in)


def test_an_idle_watch_makes_room_and_is_told(builder: RepositoryBuilder) -> None:
    with serving(builder.root, limits=Limits(max_streams=1)) as server, Client(server.address) as client:
        first, second = client.watch_tasks(), client.watch_tasks()
        next(first)
        (watch,) = server.server.front_door._edge._streams
        watch.moved_seconds -= 100
        assert next(second).added
        with pytest.raises(ServerUnreachableError, match="found it full, and this stream idle for 60 s or more"):
            next(first)
        second.close()


def test_a_watch_that_cannot_be_parsed_is_refused(builder: RepositoryBuilder) -> None:
    with serving(builder.root) as server, grpc.insecure_channel(server.address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.unary_stream(METHOD)(b"\xff\xff"))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "expected a WatchTasksRequest" in caught.value.details()


def test_a_watch_ends_with_its_token(builder: RepositoryBuilder, tmp_path: pathlib.Path) -> None:
    file, token = tmp_path / "tokens.toml", new_token()
    add_line(file, line_of("some", "read", token, ["digits"]))
    with serving(builder.root, tokens=TokenSettings(file=file)) as server:
        with Client(server.address) as stranger, pytest.raises(CallDeniedError):
            next(stranger.watch_tasks())
        with Client(server.address, credentials=Credentials(token=token)) as client:
            watching = client.watch_tasks()
            assert told(next(watching)) == (1, ["digits"], [], [], 0)
            file.write_text("[tokens]\n")
            with pytest.raises(CallDeniedError):
                wait_until(lambda: client.list_tasks() is None)
            builder.publish({"digits": HEBREW})
            with pytest.raises(CallDeniedError, match="UNAUTHENTICATED"):
                next(watching)


def test_asyncio_too(builder: RepositoryBuilder) -> None:
    async def watch(address: str) -> list[int]:
        numbers = []
        async with AsyncClient(address) as client:
            async for changes in client.watch_tasks():
                numbers.append(changes.generation)
                if len(numbers) == 2:
                    break
                builder.publish({"digits": HEBREW})
        return numbers

    with serving(builder.root) as server:
        assert asyncio.run(watch(server.address)) == [1, 2]
