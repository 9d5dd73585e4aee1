"""Want of memory in training: what it looks like, and how a smaller computation takes the place of one that did not fit.

docs/decisions/0009 says why results stay what they are.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from evolve.errors import MemoryShortageError

T = TypeVar("T")

# What torch, its libraries and CUDA say in a RuntimeError of no kind of its own.
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_memory_shortage(error: BaseException) -> bool:
    """Tells whether an error says that memory ran out, on the host or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def in_parts_that_fit(compute: Callable[[int], T], make_room: Callable[[], None], most_parts: int, what: str) -> T:
    """Computes something as a whole if that fits, else in as few parts as do.

    Tried are: the whole; the whole again, after making room; 2, 4, 8 ... parts, `most_parts` last. Each try starts from the beginning,
    and each call from the whole: what fits does not depend on what was computed before.

    Args:
        compute: does it in the given number of parts; leaves nothing behind that a second try would trip over.
        make_room: gives back memory that a try can do without.
        most_parts: beyond that it cannot be cut, 1 or more.
        what: is computed, for messages.

    Raises:
        MemoryShortageError: it does not fit, however it is cut.
    """
    shortage = ""
    for parts in _numbers_of_parts(most_parts):
        if shortage:
            # Not before here is the error gone, and with it all that it held.
            make_room()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        try:
            return compute(parts)
        except Exception as error:
            # Torch, CUDA and Python share no class for it; whatever else it is goes on its way.
            if not is_memory_shortage(error):
                raise
            shortage = str(error).partition("\n")[0] or type(error).__name__
    raise MemoryShortageError(what, most_parts, shortage)


def _numbers_of_parts(most: int) -> Iterator[int]:
    yield 1
    parts = 1
    while parts < most:
        yield parts
        parts = min(2 * parts, most)
    yield most
