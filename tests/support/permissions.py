"""What a user who is not root may not do, for tests that may run as root."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
from collections.abc import Iterator

_VERSION_3 = 0x20080522
_OVERRIDE = (1 << 1) | (1 << 2)
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: root's right to pass over permissions."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextlib.contextmanager
def read_only(folder: pathlib.Path) -> Iterator[None]:
    """Takes away the right to write anywhere below a folder; this thread and processes of tests.support.commands feel it."""
    modes = {entry: entry.stat().st_mode for entry in (folder, *folder.rglob("*"))}
    for entry, mode in modes.items():
        entry.chmod(mode & ~0o222)
    try:
        with without_override():
            yield
    finally:
        for entry, mode in modes.items():
            entry.chmod(mode)


@contextlib.contextmanager
def without_override() -> Iterator[None]:
    """Lays down this thread's right, if it has it as root's, to pass over permissions."""
    if os.geteuid():
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = _Header(_VERSION_3, 0), (_Data * 2)()
    assert libc.capget(ctypes.byref(header), data) == 0, os.strerror(ctypes.get_errno())
    before = data[0].effective
    data[0].effective &= ~_OVERRIDE
    assert libc.capset(ctypes.byref(header), data) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        data[0].effective = before
        assert libc.capset(ctypes.byref(header), data) == 0, os.strerror(ctypes.get_errno())
