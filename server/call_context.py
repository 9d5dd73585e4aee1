"""The call under way: its request id, and what else lines of the log and traces tell of it.

It travels in a context variable, which the front door sets, so that whatever is logged within a call carries the id.
"""

from __future__ import annotations

import contextvars
import dataclasses
import random
import re
from collections.abc import Iterable

from server.engine import OnRun

REQUEST_ID_KEY = "x-request-id"
"""Metadata of a call, and of its answer: the caller's own id if it is sane, else one made here."""

_SANE = re.compile(r"[!-~]{1,128}")
"""Printable ASCII without spaces: it stands in lines of the log."""


@dataclasses.dataclass(slots=True)
class CallContext:
    """A call, or one message of a stream, while it is answered.

    Attributes:
        request_id: the caller's, or made here.
        method: such as `InferenceService/Classify`.
        tasks: what it asks, as far as that is known yet.
        trace_id: of the trace that it belongs to, 32 hex digits; empty if none is recorded.
        on_run: hears of each run of a segment for it, for the trace; none if none is recorded.
    """

    request_id: str
    method: str
    tasks: tuple[str, ...] = ()
    trace_id: str = ""
    on_run: OnRun | None = None


_call: contextvars.ContextVar[CallContext | None] = contextvars.ContextVar("call", default=None)


def current_call() -> CallContext | None:
    """Returns the call under way; none outside of calls."""
    return _call.get()


def set_call(call: CallContext) -> None:
    """Says which call is under way, for the rest of this asyncio task."""
    _call.set(call)


def request_id_of(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """Returns the request id that a call came with, or a new one if it has none, several or one that is not sane."""
    values = [value for key, value in metadata if key == REQUEST_ID_KEY]
    if len(values) == 1 and isinstance(values[0], str) and _SANE.fullmatch(values[0]):
        return values[0]
    # To tell calls apart, not to keep a secret.
    return f"{random.getrandbits(64):016x}"
