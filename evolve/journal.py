"""The record of one search: append-only, one JSON object a line, each with a checksum, in the order in which things happened.

    {"crc32": "…", "sequence": 0, "type": "open", "format": 1, …}   what the search starts from: settings, data, the snapshot
    {"crc32": "…", "sequence": 1, "type": "generation", …}          the children sampled together: of each its parent, mutations,
                                                                    hyperparameters, where its layers come from, its seed
    {"crc32": "…", "sequence": 2, "type": "pack", …}                results of children that were trained together: of each its path,
                                                                    quality after each interval, score, whether it survived or the
                                                                    `reason` why not, layers, trained images, FLOPs, seconds;
                                                                    `diverged`, `stopped_after`, `batch_parts` if there is cause
    …
    {"crc32": "…", "sequence": n, "type": "close", …}               the path that became current, and its test accuracy

`crc32` (8 hex digits) is of the rest of the object in canonical JSON: keys sorted, no spaces. A line is written and synced whole
before anything that depends on it happens; a search that was killed leaves at most one torn line, the last, which is dropped when
the journal is opened again. Everything but `seconds` fields follows from the first line, so that a search can go on after the last
finished pack and end as if it had never stopped. Fields that came later (`reason` and those after it) are missing from older journals.

A closed journal may be compressed: `a-0001.jsonl.gz` instead of `a-0001.jsonl`. It is read under either name.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from evolve.errors import DamagedError, SystemFolderError
from munet.files import make_folder, sync_folder, write_atomically

FORMAT = 1
"""Version of the records."""

T = TypeVar("T")

_COMPRESSED = ".gz"
_NAME = re.compile(r"(.+)-([0-9]{4,})\.jsonl(?:\.gz)?")

Record = dict[str, Any]


class Journal:
    """One search's record, open for appending.

    Methods that write raise SystemFolderError if the folder cannot be written or the disk is full.
    """

    def __init__(self, file: pathlib.Path) -> None:
        """Opens a journal, made if missing; a torn last line is cut off, a compressed one unpacked.

        Raises:
            DamagedError: a line that was written whole is altered.
            SystemFolderError: a newer format, or the file cannot be opened for writing.
        """
        self.file = file
        try:
            _unpack(file)
        except OSError as error:
            raise _unwritable(file, error) from error
        self.records, self._length = _parse(file)
        try:
            make_folder(file.parent)
            self._descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            self._cut_off()
            sync_folder(file.parent)
        except OSError as error:
            raise _unwritable(file, error) from error

    def append(self, kind: str, fields: Mapping[str, Any]) -> Record:
        """Writes one record durably and returns it.

        Args:
            kind: its `type`.
            fields: JSON values.
        """
        record: Record = {"sequence": len(self.records), "type": kind, **fields}
        line = json.dumps({"crc32": _checksum(record), **record}, ensure_ascii=False) + "\n"
        data = line.encode()
        try:
            _write_all(self._descriptor, data)
            os.fsync(self._descriptor)
        except OSError as error:
            with contextlib.suppress(OSError):
                self._cut_off()
            raise _unwritable(self.file, error) from error
        self._length += len(data)
        # As it will be read back: tuples are lists in both.
        self.records.append(json.loads(line))
        return self.records[-1]

    def _cut_off(self) -> None:
        """Removes what stands behind the last whole record."""
        os.ftruncate(self._descriptor, self._length)
        os.lseek(self._descriptor, 0, os.SEEK_END)

    def of_type(self, kind: str) -> list[Record]:
        """Returns the records of one type, in order."""
        return [record for record in self.records if record["type"] == kind]

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def read_journal(file: pathlib.Path) -> list[Record]:
    """Returns the whole records of a journal without touching it; a torn last line is left out.

    Args:
        file: plain or compressed; if a plain one is gone, the compressed one of the same name is read.

    Raises:
        DamagedError: it cannot be read, or a line that was written whole is altered.
        SystemFolderError: a newer format.
    """
    return _parse(file)[0]


def journals_in(*folders: pathlib.Path) -> list[pathlib.Path]:
    """Returns the journals in some folders, in order of name; where one lies there plain and compressed, the plain one."""
    found = []
    for folder in folders:
        plain = set(folder.glob("*.jsonl"))
        found += sorted({*plain, *(file for file in folder.glob("*.jsonl.gz") if file.with_suffix("") not in plain)})
    return found


def search_journals(system: pathlib.Path) -> dict[tuple[str, int], pathlib.Path]:
    """Returns the journals of a system's searches by task and round, counted from 0, in that order; not those set aside.

    Args:
        system: its folder.
    """
    named = ((_NAME.fullmatch(file.name), file) for file in journals_in(system / "journal"))
    return dict(sorted(((match[1], int(match[2]) - 1), file) for match, file in named if match is not None))


def free_name_aside(removed: pathlib.Path, stem: str) -> pathlib.Path:
    """Returns the file that a journal, plain, is called once it is set aside: `<stem>.<number>.jsonl` of the lowest number above all there.

    Args:
        removed: where such journals are.
        stem: of the journal's name.
    """
    numbers = [
        int(number)
        for file in removed.glob(f"{stem}.*")
        if (number := file.name.removeprefix(f"{stem}.").split(".")[0]).isdigit()
    ]
    return removed / f"{stem}.{max(numbers, default=0) + 1}.jsonl"


def baseline_journals(system: pathlib.Path) -> list[pathlib.Path]:
    """Returns the journals of a system's baselines, plain and compressed, in order of method and task.

    Args:
        system: its folder.
    """
    return journals_in(*sorted((system / "baselines").glob("*/")))


def compressed_file(file: pathlib.Path) -> pathlib.Path:
    """Returns what a plain journal is called once it is compressed."""
    return file.with_name(f"{file.name}{_COMPRESSED}")


def compress_journal(file: pathlib.Path, *, write: bool = True) -> int:
    """Compresses a plain journal that nothing is appended to any more; killed at any moment, it can still be read.

    Args:
        file: the plain journal.
        write: False changes nothing.

    Returns:
        The bytes that it takes compressed.

    Raises:
        DamagedError: it cannot be read or is altered, and stays as it is.
        SystemFolderError: a newer format, or the folder cannot be written.
    """
    _parse(file)
    # The same bytes whenever it is done: no time in the header.
    data = gzip.compress(_read(file), compresslevel=9, mtime=0)
    if write:
        try:
            written = file.stat()
            write_atomically(compressed_file(file), data)
            # Who watches goes by the time of the last line.
            os.utime(compressed_file(file), ns=(written.st_atime_ns, written.st_mtime_ns))
            file.unlink()
            sync_folder(file.parent)
        except OSError as error:
            raise _unwritable(file, error) from error
    return len(data)


def cut_to_whole(file: pathlib.Path, keep: Callable[[], T]) -> T:
    """Cuts a journal in front of its first line that is altered or torn.

    Args:
        file: the plain journal; a compressed one of this name becomes plain.
        keep: is called before anything is changed, and not at all if nothing can be read.

    Returns:
        What `keep` returned.

    Raises:
        DamagedError: it cannot be read.
        SystemFolderError: a newer format, or the file cannot be written.
    """
    _, length, _ = _parse_whole(file)
    kept = keep()
    try:
        write_atomically(file, _read(file)[:length])
        compressed_file(file).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(file, error) from error
    return kept


def child_records(records: Sequence[Record]) -> Iterator[tuple[Record, Record]]:
    """Yields each finished child of a journal as what was planned and what came of it, in the order in which they finished."""
    plans = {
        (record["index"], child["index"]): child
        for record in records
        if record["type"] == "generation"
        for child in record["children"]
    }
    for record in records:
        if record["type"] == "pack":
            for child in record["children"]:
                yield plans[record["generation"], child["index"]], child


def _parse(file: pathlib.Path) -> tuple[list[Record], int]:
    """Returns the whole records and the number of bytes they take."""
    records, length, altered = _parse_whole(file)
    if altered is not None:
        raise DamagedError(
            f"found an altered line {altered} in {file}",
            "what was written",
            f"{_described(records)}: restore the file from a copy; without one, "
            "`munet-evolve run` with --recover keeps what is whole of an unfinished search and trains the rest again, "
            "--restart starts its round over; nothing else needs the journal of a closed search; a baseline starts over once its "
            "file is removed",
        )
    return records, length


def _parse_whole(file: pathlib.Path) -> tuple[list[Record], int, int | None]:
    """Returns the records up to the first altered or torn line, the bytes they take, and the altered line's number, counted from 1."""
    *lines, _torn = _read(file).split(b"\n")
    records: list[Record] = []
    length = 0
    altered = None
    for number, line in enumerate(lines):
        record = _parse_line(line, number)
        if record is None:
            # A write that was cut short never left its line break, the last byte, behind.
            altered = number + 1
            break
        records.append(record)
        length += len(line) + 1
    if records and records[0].get("format", FORMAT) != FORMAT:
        raise SystemFolderError(
            f"found a journal of format {records[0]['format']!r} in {file}",
            f"format {FORMAT}",
            "use the version of munet that wrote it",
        )
    return records, length, altered


def _read(file: pathlib.Path) -> bytes:
    """Returns what is in a journal, plain; nothing if there is none."""
    # Others may compress or unpack it meanwhile; they write the one before they remove the other.
    for candidate in (file, compressed_file(file), file):
        try:
            data = candidate.read_bytes()
            return gzip.decompress(data) if candidate.suffix == _COMPRESSED else data
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, EOFError, zlib.error) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise DamagedError(
                f"could not read {candidate} ({reason})",
                "a journal that can be read",
                "restore the file from a copy; --restart starts the round of an unfinished search over; nothing else needs the journal "
                "of a closed one",
            ) from error
    return b""


def _unpack(file: pathlib.Path) -> None:
    """Makes a compressed journal plain again, for whoever wants to append."""
    packed = compressed_file(file)
    if packed.exists():
        if not file.exists():
            write_atomically(file, _read(file))
        packed.unlink(missing_ok=True)


def _described(records: Sequence[Record]) -> str:
    """Says what stands before an altered line."""
    generations = sum(record["type"] == "generation" for record in records)
    children = sum(len(record.get("children", ())) for record in records if record["type"] == "pack")
    lines = "the line before it is" if len(records) == 1 else f"the {len(records)} lines before it are"
    planned = f"{generations} generation{'s' * (generations != 1)} planned, {children} child{'ren' * (children != 1)} finished"
    return f"{lines} whole ({planned})" if records else "no line before it is whole"


def _parse_line(line: bytes, number: int) -> Record | None:
    try:
        record = json.loads(line)
        checksum = record.pop("crc32")
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    if checksum != _checksum(record) or record.get("sequence") != number:
        return None
    return {"crc32": checksum, **record}


def _checksum(record: Mapping[str, Any]) -> str:
    canonical = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(canonical.encode()):08x}"


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _unwritable(file: pathlib.Path, error: OSError) -> SystemFolderError:
    return SystemFolderError(f"could not write {file} ({error.strerror})", "a writable folder with free space")
