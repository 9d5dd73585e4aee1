"""What makes threads meet in unusual orders changes nothing else."""

from __future__ import annotations

import logging
import queue
import threading

import pytest

from tests.support import unrest
from tests.support.unrest import PausingLock


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    unrest.begin(monkeypatch, share=1.0, longest_seconds=0.001)


def test_locks_of_ours_pause_and_still_keep_others_out(everywhere: None) -> None:
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


def test_conditions_and_events_are_made_of_them_and_what_is_not_ours_is_not(everywhere: None) -> None:
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
