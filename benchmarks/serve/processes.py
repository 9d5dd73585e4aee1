"""Servers in processes of their own: starting them, and what they take."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.reporting import TOP, rounded

HEAP_BYTES = 64 * 2**20
"""Of glibc, on 64 bits, for threads other than the first."""


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that is up.

    Attributes:
        address: where questions are asked.
        admin_address: where it is administered; empty if nowhere.
        process_id: of the process that was started.
    """

    address: str
    admin_address: str
    process_id: int

    @property
    def processes(self) -> list[int]:
        """The process that was started and all that it started."""
        return [self.process_id, *descendants(self.process_id)]

    def cpu_seconds(self) -> float:
        """Returns the CPU time that all its processes have taken so far."""
        return sum(map(cpu_seconds, self.processes))

    def memory(self) -> dict[str, float]:
        """Returns what all its processes take, in MiB."""
        return memory(self.processes)


@contextlib.contextmanager
def server_process(repository: pathlib.Path, *arguments: str, module: str = "server.cli") -> Iterator[Server]:
    """Serves a repository in a process of its own, with default settings but for these arguments.

    Args:
        repository: what to serve.
        arguments: further ones.
        module: that has `munet-server`'s command line.
    """
    command = [
        *(sys.executable, "-m", module, "serve", "--repository", str(repository), "--log-level", "warning"),
        *("--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--drain", "0", *arguments),
    ]
    with started(command, stdout=subprocess.PIPE) as process:
        found = re.search(r"at (\S+), admin ([^\s,]+)", first_line(process))
        if found is None:
            raise RuntimeError("the server did not start; it says why above")
        yield Server(found[1], found[2], process.pid)


@contextlib.contextmanager
def started(command: Sequence[str], **arguments: Any) -> Iterator[subprocess.Popen[str]]:
    """Starts a process, which finds this project, and ends it with SIGTERM; `arguments` are those of Popen."""
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(TOP)}, text=True, **arguments)
    with process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)


def first_line(process: subprocess.Popen[str]) -> str:
    """Returns the first line that a process prints."""
    return process.stdout.readline() if process.stdout is not None else ""


def cpu_seconds(pid: int) -> float:
    """Returns the CPU time that a process has taken so far; 0 where the system does not tell."""
    file = pathlib.Path(f"/proc/{pid}/stat")
    if not file.exists():
        return 0.0
    # Behind the command's name, which may hold blanks: the 12th and 13th field are user and system time.
    fields = file.read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descendants(pid: int) -> list[int]:
    """Returns the processes that a process started, and those that they started."""
    children: list[int] = []
    # Threads and processes come and go meanwhile.
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in pathlib.Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                children += map(int, (thread / "children").read_text().split())
    return [*children, *itertools.chain(*map(descendants, children))]


def memory(processes: Sequence[int]) -> dict[str, float]:
    """Returns what processes take, in MiB: PSS, which counts what they share once, and RSS, which counts it in each."""
    found = {"pss_mib": 0, "rss_mib": 0}
    for pid in processes:
        fields = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().split()
        for name, field in (("pss_mib", "Pss:"), ("rss_mib", "Rss:")):
            found[name] += int(fields[fields.index(field) + 1])
    return {name: rounded(kib / 1024) for name, kib in found.items()}


def resident_bytes(pid: int) -> int:
    """Returns a process's resident memory."""
    return int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def resident_by_kind(pid: int) -> dict[str, float]:
    """Returns a process's resident memory in MiB by what it is: mapped files, glibc's heaps, and the rest, such as large tensors."""
    kinds = {"files": 0, "heaps": 0, "other": 0}
    kind = "other"
    for line in pathlib.Path(f"/proc/{pid}/smaps").read_text().splitlines():
        fields = line.split()
        if re.fullmatch("[0-9a-f]+-[0-9a-f]+", fields[0]):
            # Heaps other than the first begin at a multiple of their greatest size.
            is_heap = fields[5:] == ["[heap]"] or (not fields[5:] and int(fields[0].partition("-")[0], 16) % HEAP_BYTES == 0)
            kind = "heaps" if is_heap else "files" if fields[5:] and fields[5].startswith("/") else "other"
        elif fields[0] == "Rss:":
            kinds[kind] += int(fields[1])
    return {name: rounded(kib / 1024) for name, kib in kinds.items()}


def num_open(pid: int) -> dict[str, int]:
    """Returns a process's open files and threads."""
    folder = pathlib.Path(f"/proc/{pid}")
    return {"files": len(list((folder / "fd").iterdir())), "threads": len(list((folder / "task").iterdir()))}
