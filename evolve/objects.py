"""Objects in a store that many machines share, by name: in a folder (`file://`) or in whatever else fsspec knows, such as `s3://`.

Little is asked of a store: it gives what was put, lists what is there, and can create an object only if there is none of its name. Nothing
is locked, no clock is asked, and an object is there whole or not at all.

A store that does not answer is asked again, with growing pauses, for PATIENCE_VARIABLE seconds; each time a warning is logged, which
Python prints to standard error unless it is told otherwise.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard, TypeVar

from evolve.errors import StoreError
from munet.files import make_folder, sync_folder

PATIENCE_VARIABLE = "MUNET_STORE_PATIENCE"
"""Environment variable: for so many seconds a store that does not answer is asked again; 600 by default."""

LANDMARK = "system.json"
"""An object that each store has once it is in use."""

_MOST_PAUSE = 30.0
"""Seconds."""

_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN, errno.EAGAIN)
"""Errors of shared folders that may pass."""

_HOPELESS = (PermissionError, NotADirectoryError, IsADirectoryError, NotImplementedError, ImportError, ValueError, TypeError)
_HOPELESS_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound", "NoRegionError")
"""Errors of libraries that need not be there, which asking again does not mend."""

_log = logging.getLogger(__name__)

T = TypeVar("T")


class Objects(Protocol):
    """The objects of one store. Names are relative, with slashes.

    All methods raise StoreError if the store cannot be used, or has not answered for too long.
    """

    @property
    def url(self) -> str:
        """Of the store, without a slash at its end."""
        ...

    def prepare(self) -> None:
        """Makes the place for objects, where one has to be made."""
        ...

    def get(self, name: str) -> bytes | None:
        """Returns an object; None if there is none."""
        ...

    def get_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """Returns objects by name, those that are there."""
        ...

    def has(self, name: str) -> bool:
        """Tells whether there is an object."""
        ...

    def names(self, folder: str) -> list[str]:
        """Returns the names of all objects below a folder."""
        ...

    def sizes(self, folder: str) -> dict[str, int]:
        """Returns the bytes of all objects below a folder by name, and of what killed writers left there, whose names begin with a dot."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Writes an object whose name stands for what it holds: whoever writes it at the same time writes the same."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Writes an object unless there is one. Returns whether there is this one now: it may have been there, alike."""
        ...

    def remove(self, names: Sequence[str]) -> None:
        """Removes objects that nobody needs any more, as far as that can be done; never waits."""
        ...


def is_url(location: str | os.PathLike[str]) -> TypeGuard[str]:
    """Tells whether a location is the URL of a store, not a folder."""
    return isinstance(location, str) and "://" in location


def open_objects(url: str) -> Objects:
    """Returns the objects below a URL; nothing is asked yet.

    Raises:
        StoreError: there is no such kind of store, or a package is missing for it.
    """
    url = url.rstrip("/")
    parts = urllib.parse.urlsplit(url)
    if parts.scheme in ("file", "local"):
        if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
            raise StoreError(f"found {url}", f"{parts.scheme}:///absolute/path", "three slashes")
        return _Folder(url, pathlib.Path(urllib.request.url2pathname(parts.path)))
    if parts.scheme == "memory":
        raise StoreError(f"found {url}", "a store that other processes see too", "use file:// or object storage")
    return _Fsspec(url)


class _Folder:
    """Objects as files of a folder that every machine sees."""

    def __init__(self, url: str, folder: pathlib.Path) -> None:
        self.url = url
        self._folder = folder
        self._was_seen = False

    def prepare(self) -> None:
        self._try(lambda: make_folder(self._folder))

    def get(self, name: str) -> bytes | None:
        def read() -> bytes:
            try:
                data = (self._folder / name).read_bytes()
            except FileNotFoundError:
                self._check_mounted()
                raise
            self._was_seen |= name == LANDMARK
            return data

        return self._try(read, missing=None)

    def get_all(self, names: Sequence[str]) -> dict[str, bytes]:
        return {name: data for name in names if (data := self.get(name)) is not None}

    def has(self, name: str) -> bool:
        def look() -> bool:
            if (self._folder / name).exists():
                return True
            self._check_mounted()
            return False

        return self._try(look)

    def names(self, folder: str) -> list[str]:
        start = len(str(self._folder)) + 1

        def find() -> list[str]:
            if not (self._folder / folder).exists():
                self._check_mounted()
                return []
            # What begins with a dot is being written, or was when its writer was killed.
            walked = os.walk(self._folder / folder, onerror=_raise)
            return [f"{inner[start:]}/{file}" for inner, _, files in walked for file in files if not file.startswith(".")]

        return self._try(find)

    def sizes(self, folder: str) -> dict[str, int]:
        def find() -> dict[str, int]:
            self._check_mounted()
            files = [file for file in (self._folder / folder).rglob("*") if file.is_file()]
            return {file.relative_to(self._folder).as_posix(): file.stat().st_size for file in files}

        return self._try(find)

    def put(self, name: str, data: bytes) -> None:
        self._write(name, data, lambda temporary, target: temporary.replace(target))

    def create(self, name: str, data: bytes) -> bool:
        def place(temporary: pathlib.Path, target: pathlib.Path) -> None:
            # Whole at once, and only if there is none.
            target.hardlink_to(temporary)

        def create() -> bool:
            try:
                self._write_once(name, data, place)
            except FileExistsError:
                return _is_same((self._folder / name).read_bytes, data)
            return True

        return self._try(create)

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):
                (self._folder / name).unlink()

    def _write(self, name: str, data: bytes, place: Callable[[pathlib.Path, pathlib.Path], object]) -> None:
        self._try(lambda: self._write_once(name, data, place))

    def _write_once(self, name: str, data: bytes, place: Callable[[pathlib.Path, pathlib.Path], object]) -> None:
        """Writes a file beside where it belongs and has it placed there. Not munet.files: not every share has its locks."""
        self._check_mounted()
        if not self._folder.is_dir():
            raise _away(self._folder)
        target = self._folder / name
        make_folder(target.parent)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            pathlib.Path(temporary).chmod(0o644)
            place(pathlib.Path(temporary), target)
            sync_folder(target.parent)
        finally:
            pathlib.Path(temporary).unlink(missing_ok=True)

    def _check_mounted(self) -> None:
        """Raises OSError if the store was seen and is not any more: then nothing is missing. Where it was mounted may be a folder still."""
        if self._was_seen and not (self._folder / LANDMARK).exists():
            raise _away(self._folder / LANDMARK)

    def _try(self, action: Callable[[], T], **missing: T) -> T:
        return _patiently(self.url, action, lambda error: getattr(error, "errno", None) not in _PASSING, **missing)


def _away(what: pathlib.Path) -> OSError:
    return OSError(errno.EHOSTDOWN, f"found no {what}")


def _raise(error: OSError) -> None:
    raise error


class _Fsspec:
    """Objects of a store that fsspec knows."""

    def __init__(self, url: str) -> None:
        self.url = url
        scheme = url.partition("://")[0]
        try:
            import fsspec

            # What others write has to be seen at once.
            self._system, self._root = fsspec.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            advice = "pip install '.[s3]'" if scheme in ("s3", "s3a") else "install the package that it names"
            raise StoreError(f"found no package for {url} ({error})", "the package of this kind of store", advice) from error
        except (ValueError, TypeError) as error:
            raise StoreError(f"could not use {url} ({error})", "a URL such as s3://bucket/folder") from error

    def prepare(self) -> None:
        """Nothing: buckets belong to administrators, and folders are but names in them."""

    def get(self, name: str) -> bytes | None:
        return self._try(lambda: bytes(self._system.cat_file(self._path(name))), missing=None)

    def get_all(self, names: Sequence[str]) -> dict[str, bytes]:
        if not names:
            return {}
        found = self._try(lambda: self._cat([self._path(name) for name in names]))
        return {name: found[path] for name in names if (path := self._path(name)) in found}

    def _cat(self, paths: list[str]) -> dict[str, bytes]:
        """Gets several at once; one that is missing is left out, any other error raised."""
        answers = self._system.cat(paths, on_error="return")
        for answer in answers.values():
            if isinstance(answer, Exception) and not isinstance(answer, FileNotFoundError):
                raise answer
        return {path: bytes(answer) for path, answer in answers.items() if not isinstance(answer, Exception)}

    def has(self, name: str) -> bool:
        return self._try(lambda: bool(self._system.info(self._path(name))), missing=False)

    def names(self, folder: str) -> list[str]:
        found: list[str] = self._try(lambda: self._system.find(self._path(folder.rstrip("/"))), missing=[])
        return [path[len(self._root) + 1 :] for path in found]

    def sizes(self, folder: str) -> dict[str, int]:
        found: dict[str, Any] = self._try(lambda: self._system.find(self._path(folder.rstrip("/")), detail=True), missing={})
        return {path[len(self._root) + 1 :]: int(of["size"]) for path, of in found.items()}

    def put(self, name: str, data: bytes) -> None:
        self._try(lambda: self._system.pipe_file(self._path(name), data))

    def create(self, name: str, data: bytes) -> bool:
        def create() -> bool:
            with contextlib.suppress(FileExistsError):
                self._system.pipe_file(self._path(name), data, mode="create")
                return True
            return _is_same(lambda: bytes(self._system.cat_file(self._path(name))), data)

        return self._try(create)

    def remove(self, names: Sequence[str]) -> None:
        for name in names:
            # Of a kind that only the library of this store knows; what stays is in nobody's way.
            with contextlib.suppress(Exception):
                self._system.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _try(self, action: Callable[[], T], **missing: T) -> T:
        def is_hopeless(error: Exception) -> bool:
            return isinstance(error, _HOPELESS) or type(error).__name__ in _HOPELESS_NAMES

        return _patiently(self.url, action, is_hopeless, **missing)


def _is_same(read: Callable[[], bytes], data: bytes) -> bool:
    """Tells whether what is there already is what was to be written: an earlier attempt may have left it, whose answer was lost."""
    try:
        return read() == data
    except FileNotFoundError:
        # Another machine's, which has removed it since.
        return False


def _patiently(url: str, action: Callable[[], T], is_hopeless: Callable[[Exception], bool], **missing: T) -> T:
    """Acts, again and again while the store does not answer; `missing` is returned if there is no such object."""
    patience = patience_seconds()
    ends = time.monotonic() + patience
    pause = 0.5
    while True:
        try:
            return action()
        # Libraries of stores raise errors of their own, of no common kind.
        except Exception as error:
            is_missing = isinstance(error, FileNotFoundError)
            if is_missing and "missing" in missing:
                return missing["missing"]
            if is_missing or is_hopeless(error):
                raise StoreError(
                    f"could not use {url} ({_reason(error)})",
                    "a store that is there, lets this user read and write, and has room",
                    "check its name, its endpoint, the credentials, and the clock of this machine: requests are signed with the time",
                ) from error
            pause = min(2 * pause, _MOST_PAUSE)
            if time.monotonic() + pause > ends:
                raise StoreError(
                    f"{url} did not answer for {patience:.0f} seconds ({_reason(error)})",
                    "a store that can be reached",
                    f"run again once it can be: nothing that was finished is lost; {PATIENCE_VARIABLE} says how long to wait for it",
                ) from error
            _log.warning("%s does not answer (%s); trying again in %.0f s", url, _reason(error), pause)
            time.sleep(pause)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    number = f"{errno.errorcode.get(error.errno, error.errno)} " if isinstance(error, OSError) and error.errno else ""
    return f"{number}{text}" if text else type(error).__name__


def patience_seconds() -> float:
    """Returns how long a store that does not answer is asked again and again."""
    text = os.environ.get(PATIENCE_VARIABLE, "600")
    try:
        return max(0.0, float(text))
    except ValueError:
        raise StoreError(f"found {PATIENCE_VARIABLE}={text}", "a number of seconds") from None
