"""The record of one search: append-only, one JSON object a line, each with a checksum, in the order in which things happened.

    {"crc32": "…", "sequence": 0, "type": "open", "format": 1, …}   what the search starts from: settings, data, the snapshot
    {"crc32": "…", "sequence": 1, "type": "generation", …}          the children sampled together, with parents and mutations
    {"crc32": "…", "sequence": 2, "type": "pack", …}                results of children that were trained together
    …
    {"crc32": "…", "sequence": n, "type": "close", …}               the path that became current, and its test accuracy

`crc32` (8 hex digits) is of the rest of the object in canonical JSON: keys sorted, no spaces. A line is written and synced whole
before anything that depends on it happens; a search that was killed leaves at most one torn line, the last, which is dropped when
the journal is opened again. Everything but `seconds` fields follows from the first line, so that a search can go on after the last
finished pack and end as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from evolve.errors import DamagedError, SystemFolderError
from munet.files import make_folder, sync_folder

FORMAT = 1
"""Version of the records."""

Record = dict[str, Any]


class Journal:
    """One search's record, open for appending.

    Methods that write raise SystemFolderError if the folder cannot be written or the disk is full.
    """

    def __init__(self, file: pathlib.Path) -> None:
        """Opens a journal, made if missing; a torn last line is cut off.

        Raises:
            DamagedError: a line that was written whole is altered.
            SystemFolderError: a newer format, or the file cannot be opened for writing.
        """
        self.file = file
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

    Raises:
        DamagedError: it cannot be read, or a line that was written whole is altered.
        SystemFolderError: a newer format.
    """
    return _parse(file)[0]


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
    try:
        *lines, _torn = file.read_bytes().split(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return [], 0
    except OSError as error:
        raise DamagedError(f"could not read {file} ({error.strerror})", "a journal that can be read") from error
    records: list[Record] = []
    length = 0
    for number, line in enumerate(lines):
        record = _parse_line(line, number)
        if record is None:
            # A write that was cut short never left its line break, the last byte, behind.
            raise DamagedError(
                f"found an altered line {number + 1} in {file}",
                "what was written",
                "restore the file, or remove it to start over",
            )
        records.append(record)
        length += len(line) + 1
    if records and records[0].get("format", FORMAT) != FORMAT:
        raise SystemFolderError(
            f"found a journal of format {records[0]['format']!r} in {file}",
            f"format {FORMAT}",
            "use the version of munet that wrote it",
        )
    return records, length


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
