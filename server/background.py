"""Work that gives way: what nobody waits for computes in threads of low priority, beside those that answer."""

from __future__ import annotations

import contextlib
import os
import sys
import threading

NICENESS = 10
"""Of threads that give way, on top of the process's own: beside one that does not, such a thread gets about a tenth of a core."""


def give_way() -> None:
    """Lowers the priority of the thread that calls, for good: a process that is nobody special cannot raise it again.

    Does nothing where threads have no priority of their own, which is everywhere but on Linux.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            thread = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICENESS)
