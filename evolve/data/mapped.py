"""Images that lie on disk, read through a memory map when they are asked for."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import pathlib
import re
from collections.abc import Callable, Iterable
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from evolve.data.task import LazyImages, hash_of
from evolve.errors import DataError
from munet.files import write_atomically
from munet.preprocessing import Pixels


class MappedImages(LazyImages):
    """Images in one file. Reading one is safe from any thread; it can be pickled, and then maps the file anew."""

    def __init__(self, file: pathlib.Path, records: npt.NDArray[np.void]) -> None:
        """Prepares to read.

        Args:
            file: pixels of many images.
            records: one for each image here, with `offset` in bytes, `height`, `width` and `hash` (32 bytes, task.hash_of the pixels).
        """
        self._file = file
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Pixels: ...

    @overload
    def __getitem__(self, index: slice) -> MappedImages: ...

    def __getitem__(self, index: int | slice) -> Pixels | MappedImages:
        """Returns an image as a read-only view of the file, or lazy images.

        Raises:
            DataError: the file is gone or was altered.
        """
        if isinstance(index, slice):
            return MappedImages(self._file, self._records[index])
        record = self._records[index]
        start, height, width = int(record["offset"]), int(record["height"]), int(record["width"])
        data = self._map[start : start + height * width * 3]
        if len(data) == height * width * 3:
            pixels: Pixels = data.reshape(height, width, 3)
            if hash_of(pixels) == record["hash"].tobytes():
                return pixels
        raise DataError(
            f"found altered pixels in {self._file}, at byte {start}",
            "what was written there",
            f"delete the folder {self._file.parent}: it is built again",
        )

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """See LazyImages.sizes."""
        return np.stack([self._records["height"], self._records["width"]], axis=1).astype(np.int64)

    @property
    def hashes(self) -> tuple[bytes, ...]:
        """See LazyImages.hashes."""
        return tuple(self._records["hash"].tolist())

    @property
    def scratch(self) -> pathlib.Path:
        """See LazyImages.scratch."""
        return self._file.parent

    def choose(self, indices: Iterable[int]) -> MappedImages:
        """See LazyImages.choose."""
        return MappedImages(self._file, self._records[np.array(list(indices), dtype=np.int64)])

    def remembered(self, key: str, compute: Callable[[], str]) -> str:
        """See LazyImages.remembered. The hash is kept in a file, with a hash of itself; a folder that cannot be written is no error."""
        file = self._file.parent / "digests" / key
        with contextlib.suppress(OSError, UnicodeDecodeError):
            digest, _, check = file.read_text().partition(" ")
            if re.fullmatch("[0-9a-f]{64}", digest) and check == _check(key, digest):
                return digest
        digest = compute()
        with contextlib.suppress(OSError):
            write_atomically(file, f"{digest} {_check(key, digest)}".encode())
        return digest

    @functools.cached_property
    def _map(self) -> npt.NDArray[np.uint8]:
        try:
            return np.asarray(np.memmap(self._file, dtype=np.uint8, mode="r"))
        except OSError as error:
            raise DataError(
                f"could not read {self._file} ({error.strerror})", "a file that can be read", "leave the cache while it is in use"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"_file": self._file, "_records": self._records}


def _check(key: str, digest: str) -> str:
    return hashlib.sha256(f"{key} {digest}".encode()).hexdigest()[:16]
