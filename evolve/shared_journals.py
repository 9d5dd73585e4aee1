"""Journals of a working copy, as versions in its store: brought up to date, created, and kept aside where another machine went on.

The greatest number holds (evolve.working_copy). Beside each journal here stands which version it goes on from, and how long that was
(`….stored`), so that what is longer has results that were not shared yet.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Callable, Iterable

from evolve.errors import ConflictError, DamagedError, SystemFolderError
from evolve.journal import free_name_aside
from evolve.locks import Locks
from evolve.objects import Objects
from munet.files import sync_folder

_MOST_LOOKS = 100
_LOOK_SECONDS = 1.0
"""So often, after so many seconds each, an object is looked for that a store lists."""


class SharedJournals:
    """The journals of a system in a store, on one machine.

    Args:
        folder: of the working copy.
        objects: the store.
        locks: of the processes of this machine.
        write: puts a file into the folder, whole or not at all.
    """

    def __init__(
        self, folder: pathlib.Path, objects: Objects, locks: Locks, write: Callable[[pathlib.Path, bytes], None]
    ) -> None:
        self._folder = folder
        self._objects = objects
        self._locks = locks
        self._write = write

    def pull_all(self) -> None:
        """Brings every journal up to date that no process of this machine is at work on."""
        for folder in ("journal", "baselines"):
            for name, number in newest_versions(self._objects.names(folder)).items():
                self._pull(self._folder / f"{name}.jsonl", number)

    def pull(self, file: pathlib.Path) -> None:
        """Brings a journal up to date, unless a process of this machine is at work on it."""
        self._pull(file, self._newest_number(file))

    def _pull(self, file: pathlib.Path, number: int) -> None:
        if number == self.stored(file)[0]:
            return
        is_search = file.parent.name == "journal"
        task, baseline = (file.stem.rpartition("-")[0], None) if is_search else (file.stem, file.parent.name)
        # What a process of this machine is at work on is at least as new, and only that process may touch it.
        with self._locks.unless_busy(task, baseline) as is_free:
            if is_free:
                self.catch_up(file)

    def catch_up(self, file: pathlib.Path) -> None:
        """Brings a journal to the version in the store, unless it is that, with results that were not shared yet. Its lock is held."""
        number, data = self._newest(file)
        if number == self.stored(file)[0]:
            return
        if number == 0:
            # Somebody has taken it out of the store: what is here is put there again.
            self._note_stored(file, 0, 0)
            return
        own = file.read_bytes() if file.exists() else b""
        if not (own.startswith(data) and (data or not own)):
            whole = own[: own.rfind(b"\n") + 1]
            if whole and not (data and data.startswith(whole)):
                self._keep(file)
            if data:
                self._write(file, data)
            else:
                file.unlink(missing_ok=True)
        self._note_stored(file, number, len(data))

    def _newest(self, file: pathlib.Path) -> tuple[int, bytes]:
        """Returns number and content of a journal's newest version; no content if it is the one here, and 0 if there is none.

        Raises:
            DamagedError: one is listed, time and again, and is not there.
        """
        for _ in range(_MOST_LOOKS):
            number = self._newest_number(file)
            if number in (0, self.stored(file)[0]):
                return number, b""
            data = self._objects.get(self._version_of(file, number))
            if data is not None:
                return number, data
            # It was superseded meanwhile, or a share lists for a while what is gone.
            time.sleep(_LOOK_SECONDS)
        raise DamagedError(
            f"found {self._version_of(file, number)} listed in {self._objects.url}, and no such object",
            "what is listed",
            "restore it, or remove what is left of it",
        )

    def stored(self, file: pathlib.Path) -> tuple[int, int]:
        """Returns the number of the version in the store that a journal here goes on from, and its length; 0, 0 before the first."""
        try:
            number, length = self._stored_file(file).read_text().split()
            return int(number), int(length)
        except (OSError, ValueError):
            # It will be compared with the store's.
            return 0, 0

    def create(self, file: pathlib.Path, number: int, data: bytes) -> None:
        """Creates the next version of a journal in the store; those before it go.

        Args:
            file: the journal.
            number: of the version.
            data: the whole of it.

        Raises:
            ConflictError: another machine has.
        """
        created = self._objects.create(self._version_of(file, number), data)
        there = _version_numbers(self._objects.names(self._name_of(file)))
        # One that was superseded may be gone, so that its number was free.
        if not created or any(later > number for later in there):
            raise self.conflict(file)
        self._note_stored(file, number, len(data))
        self._objects.remove([self._version_of(file, old) for old in there if old < number])

    def conflict(self, file: pathlib.Path) -> ConflictError:
        """Returns what tells that another machine has gone on with a journal; that of this machine is kept aside."""
        kept = self._keep(file)
        return ConflictError(
            f"found that another machine has gone on with {self._name_of(file)} of {self._objects.url}",
            "one machine at a time at work on a round of a task",
            f"this machine's results since are no part of the system; their journal is kept{f' as {kept}' if kept else ''}; "
            "run again once the other has ended, to go on from what it published",
        )

    def _keep(self, file: pathlib.Path) -> pathlib.Path | None:
        """Moves a journal aside, with no word to the store; None if there is none."""
        removed = self._folder / "journal" / "removed"
        stem = file.stem if file.parent.name == "journal" else f"{file.parent.name}-{file.stem}"
        try:
            self._stored_file(file).unlink(missing_ok=True)
            if not file.exists():
                return None
            removed.mkdir(exist_ok=True, parents=True)
            target = free_name_aside(removed, stem)
            file.rename(target)
            sync_folder(removed)
        except OSError as error:
            raise SystemFolderError(
                f"could not write in {removed} ({error.strerror})", "a writable folder with free space"
            ) from error
        return target

    def _newest_number(self, file: pathlib.Path) -> int:
        return max(_version_numbers(self._objects.names(self._name_of(file))), default=0)

    def _name_of(self, file: pathlib.Path) -> str:
        return file.relative_to(self._folder).as_posix().removesuffix(".jsonl")

    def _version_of(self, file: pathlib.Path, number: int) -> str:
        return f"{self._name_of(file)}/{number}.jsonl"

    def _stored_file(self, file: pathlib.Path) -> pathlib.Path:
        return file.with_suffix(".stored")

    def _note_stored(self, file: pathlib.Path, number: int, length: int) -> None:
        self._write(self._stored_file(file), f"{number} {length}\n".encode())


def newest_versions(names: Iterable[str]) -> dict[str, int]:
    """Returns the greatest number in each folder of versions, by its name."""
    newest: dict[str, int] = {}
    for name in names:
        folder = name.rpartition("/")[0]
        newest[folder] = max([newest.get(folder, 0), *_version_numbers([name])])
    return {folder: number for folder, number in newest.items() if number}


def _version_numbers(names: Iterable[str]) -> list[int]:
    stems = (name.rpartition("/")[2].partition(".")[0] for name in names)
    return [int(stem) for stem in stems if stem.isdigit()]
