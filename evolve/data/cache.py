"""A cache of decoded images on disk, for sets that are larger than the memory: built once, read through a memory map.

    CACHE/photos-3f5a90c1d2e4/    one folder per folder of images, told apart by its own path
        pixels                    decoded images one after another, each height * width * 3 bytes, as they were decoded
        index                     a header, then one record for each image: RECORD
        digests/                  hashes of whole splits, so that a second start need not read all pixels again
        lock                      held by the process that adds images

Both files only grow, and a record is written once its pixels are safe on disk: whatever kills the building process, what the index
lists is whole, and the next process goes on from there. A file whose size or times of change differ from its record is read again, and
keeps its pixels if its content is the same. (The times are those of its content and of its entry, which a rename moves: files of equal size
and date may take each other's place. Images without times have two parts of a hash in their place: stored.Stamp.) Pixels are hashed each
time they are read. What is no longer needed stays until somebody deletes the folder, which is always safe while nothing runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from evolve.data.mapped import MappedImages
from evolve.data.reading import Files, Unreadable, in_threads
from evolve.data.stored import Decoded, Stamp, StoredImage, read_image
from evolve.data.task import hash_of
from evolve.errors import DataError
from munet.preprocessing import VERSION, Pixels

FORMAT = 1
"""Version of the files' layout."""

RECORD = np.dtype(
    [
        ("name", "V16"),  # BLAKE2b of the file's name
        ("size", "<i8"),  # of the file, in bytes
        ("mtime_ns", "<i8"),
        ("offset", "<i8"),  # of the pixels, in bytes
        ("height", "<i4"),
        ("width", "<i4"),
        ("content", "V32"),  # SHA-256 of the file
        ("hash", "V32"),  # task.hash_of the pixels
        ("ctime_ns", "<i8"),
        ("spare", "V4"),
        ("check", "<u4"),  # CRC-32 of all before
    ]
)
"""What the index says of an image, 128 bytes."""

HEADER_BYTES = 128
COMMIT_BYTES = 64 * 1024 * 1024
"""The index is brought up to date after so many bytes of pixels: at most so much work is lost to a kill."""

Records = npt.NDArray[np.void]
"""[images] of RECORD."""

_UNREADABLE = -1


class CacheReader:
    """A Reader (evolve.data.reading) that keeps decoded images on disk."""

    def __init__(self, cache: pathlib.Path, source: pathlib.Path, unreadable: Unreadable, tell: Callable[[], None]) -> None:
        """Opens the cache of a source if there is one.

        Args:
            cache: folder of caches; made when the first image is written.
            source: the folder that names of files are relative to.
            unreadable: collects what cannot be read.
            tell: is called after each file.

        Raises:
            DataError: the cache cannot be read, is damaged, or was written by another version.
        """
        resolved = source.resolve()
        told_apart = hashlib.sha256(os.fsencode(resolved)).hexdigest()[:12]
        self.folder = cache / f"{resolved.name[:40]}-{told_apart}"
        self._unreadable = unreadable
        self._tell = tell
        self._rows: dict[str, int] = {}
        self._open_index()

    def contents(self, files: Files) -> list[bytes | None]:
        """See Reader.contents. Files that the cache does not have are decoded into it."""
        rows = self._complete(files)
        contents = self._records["content"]
        return [None if row == _UNREADABLE else contents[row].tobytes() for row in rows]

    def read(self, files: Files) -> tuple[list[int], Sequence[Pixels]]:
        """See Reader.read. The images are read from disk when they are asked for."""
        rows = self._complete(files)
        indices = [index for index, row in enumerate(rows) if row != _UNREADABLE]
        return indices, MappedImages(self.folder / "pixels", self._records[[rows[index] for index in indices]])

    def _complete(self, files: Files) -> list[int]:
        """Returns the index's row for each file, after adding what is missing."""
        missing = []
        for index, name in enumerate(files.names):
            if name not in self._rows and not self._find(name, files.images[index]):
                missing.append(index)
            else:
                self._tell()
        if missing:
            self._build(files.choose(missing))
        return [self._rows[name] for name in files.names]

    def _find(self, name: str, image: StoredImage) -> bool:
        """Looks an image up in the index and notes its row if it is as it was when it was decoded."""
        row = self._by_name.get(_key(name))
        if row is None:
            return False
        try:
            stamp = image.stamp()
        except OSError:
            return False
        record = self._records[row]
        if stamp != Stamp(int(record["size"]), int(record["mtime_ns"]), int(record["ctime_ns"])):
            return False
        self._rows[name] = row
        return True

    def _build(self, files: Files) -> None:
        with self._locked():
            # Another process may have added them meanwhile.
            self._open_index()
            left = [index for index, name in enumerate(files.names) if not self._find(name, files.images[index])]
            for _ in range(len(files) - len(left)):
                self._tell()
            self._add(files.choose(left))
            self._open_index()
        for name in files.names:
            if name not in self._rows:
                self._rows[name] = self._by_name[_key(name)]

    def _add(self, files: Files) -> None:
        pairs = zip(files.images, files.origins, strict=True)
        with _Writer(self.folder, self._records) as writer, contextlib.closing(in_threads(read_image, pairs)) as results:
            for name, result in zip(files.names, results, strict=True):
                if isinstance(result, DataError):
                    self._unreadable.add(name, result)
                    self._rows[name] = _UNREADABLE
                else:
                    writer.add(name, result)
                self._tell()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock of the folder, which is made if missing; waits for another process that holds it."""
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((self.folder / "lock").open("ab"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError as error:
                raise _unwritable(self.folder, error) from error
            yield

    def _open_index(self) -> None:
        try:
            self._records = _read_index(self.folder)
        except OSError as error:
            raise DataError(f"could not read the cache {self.folder} ({error.strerror})", "a folder that can be read") from error
        self._by_name = {name: row for row, name in enumerate(self._records["name"].tolist())}


class _Writer:
    """Adds images to a cache; what was committed stays, whatever happens."""

    def __init__(self, folder: pathlib.Path, records: Records) -> None:
        self._folder = folder
        self._pending: list[bytes] = []
        self._num_committed = len(records)
        self._end = _end(records)
        self._committed_end = self._end
        self._by_content = dict(zip(records["content"].tolist(), records, strict=True))

    def __enter__(self) -> Self:
        try:
            self._pixels = os.open(self._folder / "pixels", os.O_RDWR | os.O_CREAT, 0o644)
            self._index = os.open(self._folder / "index", os.O_RDWR | os.O_CREAT, 0o644)
            self._rollback()
        except OSError as error:
            raise _unwritable(self._folder, error) from error
        return self

    def add(self, name: str, image: Decoded) -> None:
        """Adds an image.

        Raises:
            DataError: the cache cannot be written; what was committed before is whole.
        """
        known = self._by_content.get(image.content)
        record = np.zeros((), dtype=RECORD) if known is None else known.copy()
        record["name"] = _key(name)
        record["size"], record["mtime_ns"], record["ctime_ns"] = image.stamp
        if known is None:
            record["offset"] = self._end
            record["height"], record["width"] = image.pixels.shape[:2]
            record["content"], record["hash"] = image.content, hash_of(image.pixels)
        record["check"] = zlib.crc32(record.tobytes()[:-4])
        with self._guarded():
            if known is None:
                self._end += _write(self._pixels, np.ascontiguousarray(image.pixels).data.cast("B"))
                self._by_content[image.content] = record
            self._pending.append(record.tobytes())
            if self._end - self._committed_end >= COMMIT_BYTES:
                self._commit()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            # Whatever ended the building, images that were decoded are kept.
            with self._guarded():
                self._commit()
        finally:
            os.close(self._pixels)
            os.close(self._index)

    def _commit(self) -> None:
        os.fsync(self._pixels)
        _write(self._index, memoryview(b"".join(self._pending)))
        os.fsync(self._index)
        self._num_committed += len(self._pending)
        self._committed_end = self._end
        self._pending.clear()

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._pending.clear()
            with contextlib.suppress(OSError):
                self._rollback()
            raise _unwritable(self._folder, error) from error

    def _rollback(self) -> None:
        """Cuts off what was not committed, here or by a process that was killed."""
        self._end = self._committed_end
        os.ftruncate(self._pixels, self._end)
        os.lseek(self._pixels, 0, os.SEEK_END)
        if not self._num_committed:
            os.ftruncate(self._index, 0)
            os.lseek(self._index, 0, os.SEEK_SET)
            _write(self._index, memoryview(_header()))
        os.ftruncate(self._index, HEADER_BYTES + self._num_committed * RECORD.itemsize)
        os.lseek(self._index, 0, os.SEEK_END)


def _key(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def _header() -> bytes:
    return json.dumps({"format": FORMAT, "preprocessing": VERSION}).encode().ljust(HEADER_BYTES - 1) + b"\n"


def _end(records: Records) -> int:
    """Returns where the pixels of all records end, in bytes."""
    if not len(records):
        return 0
    last = records[int(records["offset"].argmax())]
    return int(last["offset"]) + 3 * int(last["height"]) * int(last["width"])


def _write(descriptor: int, data: memoryview) -> int:
    """Writes all of the data and returns its length."""
    written = 0
    while written < len(data):
        written += os.write(descriptor, data[written:])
    return written


def _read_index(folder: pathlib.Path) -> Records:
    """Returns the records of a cache, checked; none if there is no cache."""
    index = folder / "index"
    if not index.exists():
        return np.zeros(0, dtype=RECORD)
    raw = index.read_bytes()
    if len(raw) < HEADER_BYTES:
        return np.zeros(0, dtype=RECORD)
    if raw[:HEADER_BYTES] != _header():
        raise DataError(
            f"found a cache of another version, {raw[:HEADER_BYTES].strip()!r}, in {folder}",
            f"{_header().decode().strip()}",
            "delete that folder: it is built again; or set another cache",
        )
    num_records = (len(raw) - HEADER_BYTES) // RECORD.itemsize
    records: Records = np.frombuffer(raw, dtype=RECORD, count=num_records, offset=HEADER_BYTES)
    whole = [zlib.crc32(record.tobytes()[:-4]) == int(record["check"]) for record in records]
    # A crash of the machine can leave an end that was never written.
    num_whole = whole.index(False) if False in whole else num_records
    records = records[:num_whole]
    pixels = folder / "pixels"
    size = pixels.stat().st_size if pixels.exists() else 0
    if any(whole[num_whole:]) or size < _end(records):
        raise DataError(f"found a damaged cache in {folder}", "what was written there", "delete that folder: it is built again")
    return records


def _unwritable(folder: pathlib.Path, error: OSError) -> DataError:
    return DataError(
        f"could not write the cache {folder} ({error.strerror})",
        "a folder that can be written, with room for height * width * 3 bytes of each image",
        "make room or set another cache; what was written before is kept, and the same command goes on",
    )
