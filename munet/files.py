"""Writing files so that a crash leaves the old one or the new one, whole."""

from __future__ import annotations

import hashlib
import os
import pathlib
import tempfile


def write_atomically(target: pathlib.Path, data: bytes) -> None:
    """Writes a file by way of a temporary one beside it: synced, renamed over the target, folder synced.

    Args:
        target: the file; its folder is made if missing.
        data: the whole content.

    Raises:
        OSError: the folder cannot be written or the disk is full; the target is as it was.
    """
    make_folder(target.parent)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    temporary = pathlib.Path(name)
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
