"""What is freed goes back to the system. In a process of its own: how it allocates is set for good."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from tests.support.processes import environment

CODE = """
import ctypes, os, pathlib, sys

from server.embedded.allocator import give_back_memory, prepare_allocator

if sys.argv[1] == "prepared":
    prepare_allocator()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.free(libc.malloc(8 << 20))  # From here on glibc by itself would keep pieces of up to 8 MiB in its heap.


def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


before = resident()
pieces = []
for _ in range(64):
    pieces.append(libc.malloc(1 << 20))
    ctypes.memset(pieces[-1], 1, 1 << 20)
    libc.malloc(100 << 10)  # Stays, as a session does that others were loaded around.
for piece in pieces:
    libc.free(piece)
kept = resident() - before
give_back_memory()
print(kept >> 20, (resident() - before) >> 20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_freed_between_what_stays_goes_back() -> None:
    def kept(how: str) -> list[int]:
        command = [sys.executable, "-c", CODE, how]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        return [int(word) for word in done.stdout.split()]

    at_once, given_back = kept("as it is")
    assert at_once > 50
    assert given_back < 8
    assert kept("prepared")[0] < 8
