"""Images where they lie: files, encoded bytes, pixels, and what has to be fetched first. Read only when somebody asks."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import os
import pathlib
import stat
import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

from evolve.data.task import hash_of
from evolve.errors import DataError
from munet.preprocessing import FORMATS, ImageError, ImageLimits, Pixels, decode

LIMITS = ImageLimits(max_bytes=256 * 1024 * 1024)
"""One's own files may be larger than what a server takes from a stranger."""

LIMITS_WITH_PPM = dataclasses.replace(LIMITS, formats=(*FORMATS, "PPM"))
"""For published sets that come as PPM files."""


class Stamp(NamedTuple):
    """Changes when an image does. A file has its size and times; what has no times, its size and two parts of a hash of its content.

    Attributes:
        size: in bytes, as stored.
        mtime_ns: when the content was changed last, in nanoseconds; or the first 8 bytes of the hash, as a signed number.
        ctime_ns: when anything about the file was changed last, its name included, in nanoseconds; or the next 8 bytes.
    """

    size: int
    mtime_ns: int
    ctime_ns: int


@dataclasses.dataclass(frozen=True)
class Decoded:
    """An image that was read.

    Attributes:
        pixels: [height, width, 3] uint8.
        content: SHA-256 of the file or of the encoded bytes, or what `hash_of` gives for pixels; 32 bytes.
        stamp: of what was read.
    """

    pixels: Pixels
    content: bytes
    stamp: Stamp


class StoredImage(Protocol):
    """One image where it lies. Any thread may ask."""

    def stamp(self) -> Stamp:
        """Returns what changes when the image does.

        Raises:
            OSError: it cannot be read.
        """
        ...

    def read(self) -> Decoded:
        """Returns the image.

        Raises:
            OSError: it cannot be read.
            ImageError: it cannot be decoded.
        """
        ...

    def content(self) -> bytes:
        """Returns what `read` calls its content, without decoding it where that can be.

        Raises:
            OSError: it cannot be read.
            ImageError: it cannot be decoded.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class FileImage:
    """An image in a file of its own.

    Attributes:
        path: of the file.
        limits: what is accepted.
    """

    path: pathlib.Path
    limits: ImageLimits = LIMITS

    def stamp(self) -> Stamp:
        """See StoredImage.stamp."""
        return _stamp_of(self.path.stat())

    def read(self) -> Decoded:
        """See StoredImage.read."""
        with self._open() as opened:
            status = os.fstat(opened.fileno())
            if status.st_size > self.limits.max_bytes:
                raise ImageError(f"found {status.st_size} bytes, expected at most {self.limits.max_bytes}")
            encoded = opened.read()
        return Decoded(decode(encoded, self.limits), hashlib.sha256(encoded).digest(), _stamp_of(status))

    def content(self) -> bytes:
        """See StoredImage.content."""
        with self._open() as opened:
            return hashlib.file_digest(opened, "sha256").digest()

    def _open(self) -> io.BufferedReader:
        # A pipe or device could keep us waiting for ever.
        if not stat.S_ISREG(self.path.stat().st_mode):
            raise OSError(errno.EINVAL, "a pipe or device, no regular file")
        return self.path.open("rb")


@dataclasses.dataclass(frozen=True, slots=True)
class EncodedImage:
    """An image as the bytes of a file.

    Attributes:
        encoded: those bytes.
    """

    encoded: bytes

    def stamp(self) -> Stamp:
        """See StoredImage.stamp."""
        return _stamp_of_content(len(self.encoded), self.content())

    def read(self) -> Decoded:
        """See StoredImage.read."""
        return Decoded(decode(self.encoded, LIMITS), self.content(), self.stamp())

    def content(self) -> bytes:
        """See StoredImage.content."""
        return hashlib.sha256(self.encoded).digest()


@dataclasses.dataclass(frozen=True, slots=True)
class PixelImage:
    """An image as pixels.

    Attributes:
        pixels: [height, width, 3] uint8, RGB.
    """

    pixels: Pixels

    def stamp(self) -> Stamp:
        """See StoredImage.stamp."""
        return _stamp_of_content(self.pixels.nbytes, self.content())

    def read(self) -> Decoded:
        """See StoredImage.read."""
        content = self.content()
        return Decoded(self.pixels, content, _stamp_of_content(self.pixels.nbytes, content))

    def content(self) -> bytes:
        """See StoredImage.content."""
        return hash_of(self.pixels)


@dataclasses.dataclass(frozen=True, slots=True)
class FetchedImage:
    """An image that a larger whole, such as a table, gives by its number.

    Attributes:
        fetch: gives the image of a number, from any thread; may raise OSError or ImageError.
        index: the number.
    """

    fetch: Callable[[int], StoredImage]
    index: int

    def stamp(self) -> Stamp:
        """See StoredImage.stamp."""
        try:
            return self.fetch(self.index).stamp()
        except ImageError as error:
            raise OSError(errno.EINVAL, str(error)) from error

    def read(self) -> Decoded:
        """See StoredImage.read."""
        return self.fetch(self.index).read()

    def content(self) -> bytes:
        """See StoredImage.content."""
        return self.fetch(self.index).content()


def read_image(image: tuple[StoredImage, str]) -> Decoded | DataError:
    """Reads and decodes an image.

    Args:
        image: where it lies, and what a message calls it.

    Returns:
        What was read, or the error for an image that cannot be.
    """
    stored, origin = image
    try:
        return stored.read()
    except OSError as error:
        return _unreadable_file(origin, error)
    except ImageError as error:
        return _unreadable_image(origin, error)


def hash_image(image: tuple[StoredImage, str]) -> bytes | DataError:
    """Returns an image's content, 32 bytes, or the error for one that cannot be read; see `read_image`."""
    stored, origin = image
    try:
        return stored.content()
    except OSError as error:
        return _unreadable_file(origin, error)
    except ImageError as error:
        return _unreadable_image(origin, error)


def _stamp_of(status: os.stat_result) -> Stamp:
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _stamp_of_content(size: int, content: bytes) -> Stamp:
    return Stamp(size, *struct.unpack("<qq", content[:16]))


def _unreadable_file(origin: str, error: OSError) -> DataError:
    return DataError(f"could not read {origin} ({error.strerror})", "a file that can be read", "mend it, or take it away")


def _unreadable_image(origin: str, error: ImageError) -> DataError:
    return DataError(f"could not read the image {origin}: {error}", "a whole image", "mend it, or take it away")
