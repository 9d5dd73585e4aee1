"""Writing files so that a crash leaves the old one or the new one, whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pathlib
import tempfile
from collections.abc import Callable

_UNFINISHED = ".part"


def write_atomically(target: pathlib.Path, data: bytes) -> None:
    """Writes a file by way of a temporary one beside it: synced, renamed over the target, folder synced.

    Args:
        target: the file; its folder is made if missing.
        data: the whole content.

    Raises:
        OSError: the folder cannot be written or the disk is full; the target is as it was.
    """
    make_folder(target.parent)
    handle, temporary = _begin(target)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def _begin(target: pathlib.Path) -> tuple[int, pathlib.Path]:
    """Opens a temporary file beside the target and locks it, so that `remove_unfinished` knows that its writer lives."""
    while True:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=_UNFINISHED)
        fcntl.flock(handle, fcntl.LOCK_SH)
        if os.fstat(handle).st_nlink:
            return handle, pathlib.Path(name)
        # Somebody who tidied up came in between.
        os.close(handle)


def remove_unfinished(folder: pathlib.Path) -> None:
    """Removes the temporary files that killed writers left in a folder; those of living writers stay.

    No clock is asked: a writer holds a lock on its file, and the end of the writer, however it comes, releases it.

    Raises:
        OSError: the folder cannot be read or written.
    """
    _visit_unfinished(folder, lambda file, _num_bytes: file.unlink())


def unfinished_files(folder: pathlib.Path) -> list[tuple[pathlib.Path, int]]:
    """Returns what `remove_unfinished` would remove, each with its size in bytes.

    Raises:
        OSError: the folder or a file in it cannot be read or written.
    """
    found: list[tuple[pathlib.Path, int]] = []
    _visit_unfinished(folder, lambda file, num_bytes: found.append((file, num_bytes)))
    return found


def _visit_unfinished(folder: pathlib.Path, visit: Callable[[pathlib.Path, int], None]) -> None:
    """Tells of each temporary file of a killed writer, with its size, while holding its lock."""
    for name in os.listdir(folder):  # noqa: PTH208  # a folder of many thousand files: no object for each
        if not (name.startswith(".") and name.endswith(_UNFINISHED)):
            continue
        with contextlib.suppress(FileNotFoundError, BlockingIOError), (folder / name).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            visit(folder / name, os.fstat(file.fileno()).st_size)


def make_folder(folder: pathlib.Path) -> None:
    """Makes a folder, and those above it, durable; nothing happens if it is there.

    Raises:
        OSError: it cannot be made.
    """
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        sync_folder(new.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Makes renames within a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file's bytes in lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
