"""Processes that start at once: forked from one that has imported everything that they need."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from tests.support.processes import environment


class Forker:
    """A process of its own that forks others; leaving the block kills those that nobody waited for."""

    def __init__(self, module: str) -> None:
        """Starts a module whose `main` imports what is needed and calls `fork_on_request`."""
        command = [sys.executable, "-m", module]
        self._process = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def fork(self, request: dict[str, Any]) -> int:
        """Starts a process that does what is requested, and returns its id."""
        return int(self._ask({"start": request}))

    def poll(self, process_id: int) -> int | None:
        """Returns the exit status of one, -9 after a kill; None if it runs. Not to be asked again after that."""
        answer = self._ask({"poll": process_id})
        return None if answer == "runs" else int(answer)

    def wait(self, process_id: int) -> int:
        """Returns the exit status of one at its end, -9 after a kill."""
        return int(self._ask({"wait": process_id}))

    def _ask(self, request: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._process.communicate(timeout=30)


def fork_on_request(become: Callable[[dict[str, Any]], object]) -> None:
    """Forks processes that are asked for on standard input, until that ends, and ends this one then.

    Args:
        become: does what is requested in place of the new process, and does not return.
    """
    left: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: Any = os.fork()
            if answer == 0:
                become(request["start"])
            left.add(answer)
        else:
            process = request.get("poll") or request["wait"]
            ended, status = os.waitpid(process, os.WNOHANG if "poll" in request else 0)
            answer = os.waitstatus_to_exitcode(status) if ended else "runs"
            left -= {ended}
        print(answer, flush=True)
    for process in left:
        os.kill(process, signal.SIGKILL)
    # Nothing to tidy up, and torch takes seconds to.
    os._exit(0)
