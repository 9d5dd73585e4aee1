"""Both commands in processes of their own, as a user runs them."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Self

TOP = pathlib.Path(__file__).resolve().parents[2]


PYTHON = pathlib.Path(sys.executable)


def evolve(
    *arguments: str | pathlib.Path, timeout_seconds: float = 240, python: pathlib.Path = PYTHON
) -> subprocess.CompletedProcess[str]:
    """Runs munet-evolve to its end."""
    return _run("evolve.cli", arguments, timeout_seconds, python)


def server(*arguments: str | pathlib.Path, timeout_seconds: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs a command of munet-server to its end."""
    return _run("server.cli", arguments, timeout_seconds, PYTHON)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TOP), "COLUMNS": "200"}


def lives(process_id: int) -> bool:
    """Tells whether a process runs; one that has ended and was not waited for does not."""
    try:
        return pathlib.Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def heed_interrupts() -> None:
    """For `preexec_fn`: whoever runs the tests in the background may have told them, and whatever they start, to ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(
    module: str, arguments: tuple[str | pathlib.Path, ...], timeout_seconds: float, python: pathlib.Path
) -> subprocess.CompletedProcess[str]:
    command = [str(python), "-m", module, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=timeout_seconds, check=False)


class ServerProcess:
    """munet-server serve on free ports; leaving the block stops it with SIGTERM.

    Args:
        repository: what to serve.
        arguments: further ones of the command.
        variables: of its environment, beside those of this process.

    Attributes:
        address: of the front door.
        admin_address: of the admin service.
        status: exit status, after the block.
    """

    def __init__(self, repository: pathlib.Path, *arguments: str, variables: Mapping[str, str] | None = None) -> None:
        command = [
            *(sys.executable, "-m", "server.cli", "serve", "--repository", str(repository)),
            *("--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"),
            *arguments,
        ]
        self.process = subprocess.Popen(command, env={**environment(), **(variables or {})}, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = re.search(r"at (\S+), admin (\S+)", self.process.stdout.readline())
        assert found is not None, "the server did not start"
        self.address, self.admin_address = found[1], found[2]
        self.status: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.status = self.process.wait(timeout=120)
        finally:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
