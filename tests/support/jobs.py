"""Searches in real processes without torch, which start at once."""

from __future__ import annotations

import os
import pathlib
import traceback
from typing import Any

from tests.support.forking import Forker, fork_on_request

TOLD = 3
"""Exit status of one that was told of another at work on its task."""


class Jobs(Forker):
    """Starts processes; leaving the block kills those that are left."""

    def __init__(self, errors: pathlib.Path) -> None:
        """Keeps what goes wrong in a file."""
        super().__init__("tests.support.jobs")
        self._errors = errors

    def start(self, **job: Any) -> int:
        """Starts one and returns its process id; see `_run`."""
        return self.fork({"errors": str(self._errors), "job": job})

    @property
    def errors(self) -> str:
        """What went wrong so far."""
        return self._errors.read_text() if self._errors.exists() else ""


def main() -> None:
    import s3fs  # noqa: F401

    import tests.support.month  # noqa: F401

    # A kill takes nothing from the disk that was written: only a power cut does.
    os.fsync = lambda _: None
    fork_on_request(lambda request: _become(request["job"], pathlib.Path(request["errors"])))


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
        rounds: how many it is to have; 0: the system is opened and nothing else.
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
    if rounds:
        run_rounds(system, [(active_task(task), FakeTrainer)], month_plan(rounds), QuietObserver())


if __name__ == "__main__":
    main()
