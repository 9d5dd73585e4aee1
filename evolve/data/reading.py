"""Reading images: in threads, a bounded number at a time; into memory; and what becomes of those that cannot be read."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np

from evolve.data.splits import Labels
from evolve.data.stored import StoredImage, hash_image, read_image
from evolve.errors import DataError
from munet.preprocessing import Pixels

THREADS = min(8, os.cpu_count() or 1)
"""Files are read and decoded by so many threads."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Files:
    """Images of one split that are still to be read, most often files.

    Attributes:
        images: where they lie.
        names: what they are called, relative to the source, in NFC; each once within a source.
        labels: [files] int64, indices of classes.
        origins: what messages call them.
    """

    images: Sequence[StoredImage]
    names: Sequence[str]
    labels: Labels
    origins: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    def choose(self, indices: Sequence[int]) -> Files:
        """Returns the chosen files in the order of the indices."""
        return Files(
            [self.images[index] for index in indices],
            [self.names[index] for index in indices],
            self.labels[np.asarray(indices, dtype=np.int64)],
            [self.origins[index] for index in indices],
        )


class Unreadable:
    """Collects the files of a source that cannot be read, or raises the first.

    Attributes:
        skip: whether such files are left out; otherwise the first is an error.
    """

    def __init__(self, skip: bool) -> None:
        """Prepares to skip files, or not."""
        self.skip = skip
        self._found: dict[str, str] = {}

    def add(self, name: str, error: DataError) -> None:
        """Notes a file.

        Raises:
            DataError: the error itself, with the advice to skip such files, if they are not to be skipped.
        """
        if not self.skip:
            advice = f"{error.advice}; skip_unreadable = true leaves such images out" if error.advice else ""
            raise DataError(error.found, error.expected, advice) from error
        self._found.setdefault(name, error.found)

    def warnings(self, source: str) -> tuple[str, ...]:
        """Returns what to say about the files that were skipped."""
        if not self._found:
            return ()
        many = "images" if len(self._found) > 1 else "image"
        return (f"left out {len(self._found)} {many} of {source}, the first because munet {next(iter(self._found.values()))}",)


class Reader(Protocol):
    """Reads files. What cannot be read goes to an Unreadable."""

    def contents(self, files: Files) -> list[bytes | None]:
        """Returns the SHA-256 of each file, 32 bytes, or None where it is to be left out: it could not be read, or decoded.

        Raises:
            DataError: a file cannot be read and is not to be skipped, or the cache cannot be used.
        """
        ...

    def read(self, files: Files) -> tuple[list[int], Sequence[Pixels]]:
        """Returns the indices of the files that could be read, and the images of those.

        Raises:
            DataError: see `contents`.
        """
        ...


class MemoryReader:
    """A Reader that holds all images in memory: height * width * 3 bytes each."""

    def __init__(self, unreadable: Unreadable, tell: Callable[[], None]) -> None:
        """Prepares to read; `tell` is called after each file."""
        self._unreadable = unreadable
        self._tell = tell

    def contents(self, files: Files) -> list[bytes | None]:
        """See Reader.contents. Where files may be left out, they are decoded to find out."""
        return list(self._all(_decodable if self._unreadable.skip else hash_image, files))

    def read(self, files: Files) -> tuple[list[int], Sequence[Pixels]]:
        """See Reader.read."""
        images: list[Pixels] = []
        indices: list[int] = []
        for index, decoded in enumerate(self._all(read_image, files)):
            if decoded is not None:
                indices.append(index)
                images.append(decoded.pixels)
        return indices, images

    def _all(self, work: Callable[[tuple[StoredImage, str]], Result | DataError], files: Files) -> Iterator[Result | None]:
        pairs = zip(files.images, files.origins, strict=True)
        with contextlib.closing(in_threads(work, pairs)) as results:
            for name, result in zip(files.names, results, strict=True):
                if isinstance(result, DataError):
                    self._unreadable.add(name, result)
                yield None if isinstance(result, DataError) else result
                self._tell()


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
    """Yields what `work` gives for each item, in their order, with only a few items ahead of what was taken: memory stays bounded.

    Python's warnings are silent meanwhile: Pillow warns of much that decoding then survives.
    """
    waiting: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    # The filters are the whole process's: set around all threads, not in each.
    with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > THREADS + 2:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _decodable(image: tuple[StoredImage, str]) -> bytes | DataError:
    """Returns what `hash_image` does, or the error for an image that cannot be decoded."""
    decoded = read_image(image)
    return decoded if isinstance(decoded, DataError) else decoded.content
