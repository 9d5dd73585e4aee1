"""Searches in real processes without torch, which start at once: forked from one that has imported everything."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import traceback
from types import TracebackType
from typing import Any, Self

from tests.support.processes import environment

TOLD = 3
"""Exit status of one that was told of another at work on its task."""


class Jobs:
    """Starts processes; leaving the block kills those that are left."""

    def __init__(self, errors: pathlib.Path) -> None:
        """Keeps what goes wrong in a file."""
        self._errors = errors
        command = [sys.executable, "-m", "tests.support.jobs", str(errors)]
        self._process = subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, **job: Any) -> int:
        """Starts one and returns its process id; see `_run`."""
        return int(self._ask({"start": job}))

    def ended(self, process: int) -> int | None:
        """Returns the exit status of one, -9 after a kill; None if it runs. Not to be asked again after that."""
        answer = self._ask({"poll": process})
        return None if answer == "runs" else int(answer)

    def wait(self, process: int) -> int:
        """Returns the exit status of one at its end."""
        return int(self._ask({"wait": process}))

    @property
    def errors(self) -> str:
        """What went wrong so far."""
        return self._errors.read_text() if self._errors.exists() else ""

    def _ask(self, request: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return self._process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._process.communicate(timeout=30)


def main() -> None:
    import s3fs  # noqa: F401

    import tests.support.month  # noqa: F401

    # A kill takes nothing from the disk that was written: only a power cut does.
    os.fsync = lambda _: None
    left: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: Any = os.fork()
            if answer == 0:
                _become(request["start"], pathlib.Path(sys.argv[1]))
            left.add(answer)
        else:
            process = request.get("poll") or request["wait"]
            ended, status = os.waitpid(process, os.WNOHANG if "poll" in request else 0)
            answer = os.waitstatus_to_exitcode(status) if ended else "runs"
            left -= {ended}
        print(answer, flush=True)
    for process in left:
        os.kill(process, signal.SIGKILL)
    os._exit(0)


def _become(job: dict[str, Any], errors: pathlib.Path) -> None:
    """Does a job in place of this process; does not return."""
    from evolve.errors import BusyError

    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(nothing, 1)
    status = 70
    try:
        _run(**job)
        status = 0
    except BusyError:
        status = TOLD
    except BaseException:
        with errors.open("a") as file:
            file.write(f"{job}\n{traceback.format_exc()}\n")
    finally:
        os._exit(status)


def _run(location: str, cache: str, task: str, rounds: int) -> None:
    """Brings a task to a number of rounds, in a system that is made if there is none.

    Args:
        location: of the system.
        cache: where working copies of this machine are.
        task: its name.
        rounds: how many it is to have.
    """
    from evolve.errors import SystemFolderError
    from evolve.search import run_rounds
    from evolve.store import System
    from tests.support.fake_trainer import FakeTrainer, QuietObserver, tiny_root
    from tests.support.month import active_task, month_plan

    os.environ["MUNET_CACHE"] = cache
    try:
        system = System.open(location)
    except SystemFolderError:
        try:
            system = System.create(location, tiny_root(), 32)
        except SystemFolderError:
            system = System.open(location)
    run_rounds(system, [(active_task(task), FakeTrainer)], month_plan(rounds), QuietObserver())


if __name__ == "__main__":
    main()
