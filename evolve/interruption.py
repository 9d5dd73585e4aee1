"""Ending on SIGINT (Ctrl-C) and SIGTERM: the first one unwinds what runs, so that it ends cleanly and says how to go on; a second one
ends the process at once. Neither loses what was finished: everything on disk is whole at any moment.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Interrupted(BaseException):
    """A signal came. No `except Exception` may take it for an error of its own.

    Attributes:
        status: the exit status that says so, 128 + the number of the signal: 130 after SIGINT, 143 after SIGTERM.
    """

    def __init__(self, number: int) -> None:
        self.status = 128 + number
        super().__init__(signal.Signals(number).name)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raises Interrupted in the main thread at the first SIGINT or SIGTERM; the second ends the process. To be used there."""

    def interrupt(number: int, _frame: FrameType | None) -> None:
        for one in before:
            signal.signal(one, signal.SIG_DFL)
        raise Interrupted(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A shell that starts a process in the background may have told it to ignore Ctrl-C.
    before = {number: handler for number, handler in before.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in before:
            signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
