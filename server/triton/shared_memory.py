"""The shared memory of one Triton, and what is left there by those that were killed.

Triton's Python backend makes files in /dev/shm, removes them when it ends well and leaves them when it is killed. Each Triton gets a
prefix of its own and a lock that lives as long as anything that uses the files; what no lock protects may go.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import secrets

FOLDER = pathlib.Path("/dev/shm")

_START = "munet-triton-"
_LOCK = ".lock"


class SharedMemory:
    """A prefix of names in shared memory that nobody else uses, until `close`.

    Attributes:
        prefix: what the names begin with.
        handle: an open file that Triton must inherit: as long as it or a process that it started lives, nobody else tidies up.

    Raises:
        OSError: shared memory cannot be written.
    """

    def __init__(self) -> None:
        remove_abandoned()
        name = _START + secrets.token_hex(4)
        self.prefix = f"{name}-"
        self._lock = FOLDER / f"{name}{_LOCK}"
        self.handle = _lock(self._lock)

    def clear(self) -> None:
        """Removes what is there. Only when nothing that used it runs any more."""
        _remove(self.prefix)

    def close(self) -> None:
        """Removes what is there and gives the prefix back. Only when nothing that used it runs any more."""
        self.clear()
        self._lock.unlink(missing_ok=True)
        os.close(self.handle)


def _lock(file: pathlib.Path) -> int:
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle
        # Somebody who tidied up came in between.
        os.close(handle)


def remove_abandoned() -> None:
    """Removes what killed processes left."""
    for lock in FOLDER.glob(f"{_START}*{_LOCK}"):
        with contextlib.suppress(OSError):
            handle = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(lock.name.removesuffix(_LOCK) + "-")
                lock.unlink()
            finally:
                os.close(handle)


def _remove(prefix: str) -> None:
    for file in FOLDER.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            file.unlink()
