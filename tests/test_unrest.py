"""What makes threads meet in unusual orders changes nothing else."""

from __future__ import annotations

import logging
import queue
import threading
import time
import types

import pytest

from tests.support import unrest
from tests.support.unrest import PausingLock


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Has every lock pause, and returns the pauses."""
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        time.sleep(seconds)

    monkeypatch.setattr(unrest, "time", types.SimpleNamespace(sleep=sleep))
    unrest.begin(monkeypatch, share=1.0, longest_seconds=0.001)
    return pauses


def test_taking_and_releasing_a_lock_and_starting_a_thread_pause(everywhere: list[float]) -> None:
    lock = threading.Lock()
    assert len(everywhere) == 0
    assert lock.acquire()
    assert len(everywhere) == 1
    lock.release()
    assert len(everywhere) == 2
    with lock:
        pass
    assert len(everywhere) == 4
    assert all(0 <= seconds <= 0.001 for seconds in everywhere)
    thread = threading.Thread(target=lambda: None)
    before = len(everywhere)
    thread.start()
    thread.join()
    assert len(everywhere) > before


def test_nothing_pauses_that_is_drawn_seldom(everywhere: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unrest, "_share", 0.0)
    with threading.Lock():
        pass
    assert everywhere == []


def test_locks_of_ours_still_keep_others_out(everywhere: list[float]) -> None:
    lock, counts = threading.Lock(), [0]
    assert isinstance(lock, PausingLock)

    def count() -> None:
        for _ in range(50):
            with lock:
                before = counts[0]
                unrest._pause()
                counts[0] = before + 1

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [200]
    assert lock.acquire()
    assert lock.locked()
    assert not lock.acquire(timeout=0.01)
    lock.release()


def test_conditions_and_events_are_made_of_them_and_what_is_not_ours_is_not(everywhere: list[float]) -> None:
    condition, event = threading.Condition(threading.Lock()), threading.Event()

    def wait() -> None:
        with condition:
            event.set()
            assert condition.wait(20)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert event.wait(20)
    with condition:
        condition.notify()
    waiter.join(20)
    assert not waiter.is_alive()
    assert not isinstance(queue.Queue().mutex, PausingLock)
    assert not isinstance(logging.Handler().lock, PausingLock)
