"""How calls are sent, written once for both kinds of client: as coroutines over a transport. Free of gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from google.protobuf import message

from server.calls import Call
from server.errors import CallError, CallTimeoutError
from server.retries import Attempts, Retry

_T = TypeVar("_T")
_Work = Callable[[], Coroutine[Any, Any, Any]]


class Semaphore(Protocol):
    """Bounds how much goes on at once."""

    async def acquire(self) -> Any:
        """Waits until there is room, and takes it."""

    def release(self) -> None:
        """Makes room."""


class Crew(Protocol):
    """Does several things side by side."""

    def start(self, work: _Work) -> Any:
        """Starts something and returns what `join` takes."""

    async def join(self, started: Any) -> Any:
        """Returns, or raises, what it came to."""

    def close(self) -> None:
        """Lets go of what was started and not joined: what has not begun never does, and nobody hears of the rest."""


class Transport(Protocol):
    """Carries calls to one server, and waits in the manner of its client: blocking, or on an event loop.

    Attributes:
        server: its address.
    """

    server: str

    async def ask(self, call: Call[_T], timeout_seconds: float | None) -> _T:
        """Sends a call once and returns its answer.

        Args:
            call: which.
            timeout_seconds: deadline in place of the call's own.

        Raises:
            CallError: it failed.
        """

    def receive(self, call: Call[_T]) -> AsyncGenerator[_T, None]:
        """Sends a call that is answered by a stream, and gives the answers as they come; closed before its end, it cancels the call.

        Raises:
            CallError: it failed, at the start or later.
        """

    def stream(
        self, call: Call[_T], requests: AsyncGenerator[message.Message, None], timeout_seconds: float | None
    ) -> AsyncGenerator[_T, None]:
        """Sends messages as they come and gives the answers as they come; closed before its end, it cancels the call.

        Args:
            call: its method, and how an answer is read.
            requests: what is sent in place of the call's own request. It raises nothing.
            timeout_seconds: deadline of the whole stream.

        Raises:
            CallError: it failed.
        """

    async def sleep(self, seconds: float) -> None:
        """Waits."""

    async def read(self, function: Callable[[], _T]) -> _T:
        """Returns what a function returns that has to wait for a disk."""

    def semaphore(self, number: int) -> Semaphore:
        """Returns one with room for so many."""

    def crew(self, size: int) -> Crew:
        """Returns one that has at least so many hands."""


class Sender:
    """Sends calls, and sends them again where that makes sense.

    Args:
        transport: what carries them.
        retry: when it makes sense; none means never.

    Attributes:
        transport: as given.
    """

    def __init__(self, transport: Transport, retry: Retry | None) -> None:
        self.transport = transport
        self._retry = retry

    async def send(self, call: Call[_T]) -> _T:
        """Sends a call.

        Raises:
            CallError: the last attempt failed. Where time ran out in an attempt after the first, it is what the one before came to: it says
                what there was to wait for.
        """
        attempts = Attempts(self._retry if call.is_repeatable else None, call.timeout_seconds)
        waited_for: CallError | None = None
        while True:
            try:
                return await self.transport.ask(call, attempts.remaining_seconds)
            except CallError as error:
                if waited_for is not None and isinstance(error, CallTimeoutError):
                    raise waited_for from error
                pause_seconds = attempts.pause_after(error)
                if pause_seconds is None:
                    raise
                waited_for = error
            await self.transport.sleep(pause_seconds)
