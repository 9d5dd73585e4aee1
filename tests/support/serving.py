"""Servers and engines for tests: real ones, small."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import uvloop

from server.cli import RunningServer, main, running_server
from server.config import EngineSettings, Limits, ServerSettings
from server.front_door import draining

# One thread: this process also makes ONNX Runtime sessions of other kinds, which a global thread pool would forbid.
ENGINE = EngineSettings(threads=1, workers=1, max_waiting_rows=10_000_000)


def server_settings(repository: pathlib.Path, **overrides: Any) -> ServerSettings:
    settings: dict[str, Any] = {
        "repository": repository,
        "listen": "127.0.0.1:0",
        "admin_listen": "127.0.0.1:0",
        "decode_threads": 2,
        "watch_interval_seconds": 0.02,
        "drain_seconds": 0.0,
        "grace_seconds": 5.0,
        "limits": Limits(),
        "engine": ENGINE,
    }
    return ServerSettings(**(settings | overrides))


class ServerThread:
    """A running server with its event loop in a thread of its own."""

    def __init__(self, server: RunningServer, loop: asyncio.AbstractEventLoop) -> None:
        self.server = server
        self.loop = loop
        self.address = server.front_door.address
        self.admin_address = server.front_door.admin_address


@contextlib.contextmanager
def serving(repository: pathlib.Path, **overrides: Any) -> Iterator[ServerThread]:
    """Serves a repository on free ports within the block."""
    started: list[ServerThread] = []
    failed: list[BaseException] = []
    ready = threading.Event()
    stop = asyncio.Event()

    async def run() -> None:
        async with running_server(server_settings(repository, **overrides)) as server:
            started.append(ServerThread(server, asyncio.get_running_loop()))
            ready.set()
            await stop.wait()

    def work() -> None:
        try:
            uvloop.run(run())
        except BaseException as error:
            failed.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait()
    try:
        if not started:
            raise failed[0]
        yield started[0]
    finally:
        if started:
            started[0].loop.call_soon_threadsafe(stop.set)
        thread.join()
    if failed:
        raise failed[0]


def run_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Runs a command of munet-server without a process and returns its status, output and errors.

    For commands that start no engine, whose thread pool would be this process's for good.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["munet-server", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as error:
            status = int(error.code or 0)
    return status, *capsys.readouterr()


class HeldPause:
    """The pause between health's word and the end of questions: it ends when it is told to, however long it was to be.

    Attributes:
        over: ends it.
        asked_seconds: how long each was to be.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.over = threading.Event()
        self.asked_seconds: list[float] = []
        patch.setattr(draining, "asyncio", types.SimpleNamespace(**vars(asyncio) | {"sleep": self._sleep}))

    async def _sleep(self, seconds: float) -> None:
        self.asked_seconds.append(seconds)
        async with asyncio.timeout(60):
            while not self.over.is_set():
                await asyncio.sleep(0.005)


class ManualClock:
    """A clock that goes forward only when told."""

    def __init__(self) -> None:
        self.now_seconds = 1000.0

    def __call__(self) -> float:
        return self.now_seconds


class Brake:
    """Holds an engine's sessions until it is let go."""

    def __init__(self, engine: Any) -> None:
        self.go_on = threading.Event()
        self.entered = threading.Event()
        for session in engine._memory.sessions.values():
            session.run = self._slow(session.run)

    def _slow(self, run: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def slow(rows: Any) -> Any:
            self.entered.set()
            self.go_on.wait(60)
            return run(rows)

        return slow


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 60) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_empty(server: ServerThread) -> bool:
    """Tells whether nothing is in flight: no stream, no request, not a byte of one, no question of the engine's."""
    edge = server.server.front_door._edge
    in_flight = (len(edge._streams), edge._requests.total, edge._bytes.total, len(server.server.engine._questions))
    return in_flight == (0, 0, 0, 0)
