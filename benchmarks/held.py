"""What a process holds: the figures that grow where something leaks."""

from __future__ import annotations

import dataclasses
import pathlib


@dataclasses.dataclass(frozen=True)
class Held:
    """What a process holds at one moment.

    Attributes:
        descriptors: open files, sockets and the like.
        threads: that run.
        memory_bytes: that it keeps in memory (RSS).
    """

    descriptors: int
    threads: int
    memory_bytes: int

    @classmethod
    def by(cls, process_id: int) -> Held:
        """Returns what a process holds now.

        Raises:
            OSError: there is no such process.
        """
        folder = pathlib.Path("/proc") / str(process_id)
        lines = (folder / "status").read_text(encoding="utf-8").splitlines()
        status = dict(line.split(":", 1) for line in lines)
        descriptors = sum(1 for _ in (folder / "fd").iterdir())
        return cls(descriptors, int(status["Threads"]), 1024 * int(status["VmRSS"].split()[0]))
