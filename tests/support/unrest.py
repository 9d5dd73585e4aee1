"""A plugin of pytest that has threads meet in unusual orders: `python -m pytest -m "not gpu" -n 4 -p tests.support.unrest`.

Locks, and what is made of them, pause now and then before they are taken and after they are released, and threads before they start; an
RLock, which Python makes elsewhere, does not. What holds only because one thread is mostly quicker than another fails sooner. Nothing else
changes, so whatever passes must pass. Where the pauses are is something else each time.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from types import TracebackType
from typing import Any

import pytest

PACKAGES = ("munet", "evolve", "server", "tests", "threading", "concurrent")
"""Whose locks pause."""

_make_lock = threading.Lock
_start = threading.Thread.start
_draws = random.Random()
_share = 0.0
_longest_seconds = 0.0


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("unrest")
    group.addoption(
        "--unrest-share", type=float, default=0.05, help="of all times that a lock is taken or released, those with a pause"
    )
    group.addoption("--unrest-seconds", type=float, default=0.02, help="the longest pause")


def pytest_configure(config: pytest.Config) -> None:
    begin(pytest.MonkeyPatch(), config.getoption("unrest_share"), config.getoption("unrest_seconds"))


def begin(patch: pytest.MonkeyPatch, share: float, longest_seconds: float) -> None:
    """Has the locks pause that are made until the patch is undone."""
    patch.setattr(sys.modules[__name__], "_share", share)
    patch.setattr(sys.modules[__name__], "_longest_seconds", longest_seconds)
    # A class, too: some keep it as an attribute of their own.
    patch.setattr(threading, "Lock", LockMaker)
    patch.setattr(threading.Thread, "start", _start_late)


class LockMaker:
    """Stands for threading.Lock: gives muNet's modules a lock that pauses, and all others one that does not."""

    def __new__(cls) -> Any:
        package = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        return PausingLock() if package in PACKAGES else _make_lock()


class PausingLock:
    """A lock that pauses."""

    def __init__(self) -> None:
        self._lock = _make_lock()
        self.locked = self._lock.locked
        # Python asks a thread's locks for it after a fork, and it has no public name that a type checker knows.
        self._at_fork_reinit = self._lock._at_fork_reinit  # type: ignore[attr-defined]

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        _pause()
        return self._lock.acquire(blocking, timeout)

    def release(self) -> None:
        self._lock.release()
        _pause()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.release()


def _pause() -> None:
    if _draws.random() < _share:
        time.sleep(_draws.random() * _longest_seconds)


def _start_late(thread: threading.Thread) -> None:
    _pause()
    _start(thread)
