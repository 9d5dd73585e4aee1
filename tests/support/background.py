"""Threads that do something until a block is left."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self


class Background:
    """Runs functions in threads of their own while a block is entered; each returns when the event that it is given is set."""

    def __init__(self, functions: Iterable[Callable[[threading.Event], None]]) -> None:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=function, args=(self._stop,)) for function in functions]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
