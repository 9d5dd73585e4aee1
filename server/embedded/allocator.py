"""How the C library allocates for sessions that come and go: without it, what a reload frees stays with the process for good."""

from __future__ import annotations

import ctypes
import functools

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
"""Numbers of glibc's mallopt."""

MAPPED_BYTES = 256 * 1024
"""From here on an allocation has pages of its own, which go back when it is freed: most weights, no hidden states of one image."""

NUM_ARENAS = 2
"""Heaps that threads share. By default each thread that loads has one of its own, with what was freed in it."""


def prepare_allocator() -> None:
    """Sets both. glibc would raise the first by itself, up to 32 MiB, as soon as a larger allocation is freed.

    Does nothing where the C library is another.
    """
    library = _glibc()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
        library.mallopt(_M_ARENA_MAX, NUM_ARENAS)


def give_back_memory() -> None:
    """Has the C library give back what it can of what was freed. Takes some milliseconds, in which no lock of Python's is held."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # there or not
    except (OSError, AttributeError):
        return None
    return library
