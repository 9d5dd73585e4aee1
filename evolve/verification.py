"""Verification of a system: every file is hashed again and every reference followed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from evolve.documents import TaskRecord
from evolve.errors import DamagedError
from evolve.journal import read_journal
from evolve.store import JournalFile, System

T = TypeVar("T")


def verify(system: System) -> list[str]:
    """Hashes every layer, path, task and example again, reads every journal and follows every reference.

    Args:
        system: may be searched and exported meanwhile.

    Returns:
        One sentence for each thing that is wrong; empty if all is well.
    """
    with system.locks.reading():
        # A damaged layer is found again in each path that uses it.
        return list(dict.fromkeys(_findings(system)))


def _findings(system: System) -> Iterator[str]:
    for file in sorted((system.folder / "layers").glob("*/*.safetensors")):
        yield from _finding(system.check_layer, file.stem)
    for file in sorted((system.folder / "paths").glob("*.json")):
        yield from _finding(system.path, file.stem)
    yield from system.findings()
    current = {system.root.id}
    for task in system.task_names():
        yield from _finding(lambda name: _verify_task(system, name, current), task)
    for journal in system.journals():
        yield from _finding(lambda journal: _verify_journal(system, journal), journal)
    for kept in (*system.removed_journals(), *system.baseline_journals()):
        yield from _finding(read_journal, kept)


def _finding(check: Callable[[T], object], subject: T) -> Iterator[str]:
    try:
        check(subject)
    except DamagedError as error:
        yield str(error)


def _verify_journal(system: System, journal: JournalFile) -> None:
    records = read_journal(journal.file)
    if records:
        system.check_journal(journal, records[0])
        if journal.is_closed and records[-1]["type"] != "close":
            raise DamagedError(
                f"found no last record in {journal.file}, though its round is closed",
                "what was written",
                "restore the file from a copy; nothing else needs the journal of a closed search",
            )
    if not journal.is_closed:
        for record in records:
            for child in record["children"] if record["type"] == "pack" else ():
                if child["survived"]:
                    system.path(child["path_id"])


def _verify_task(system: System, name: str, current: set[str]) -> None:
    record = system.task(name)
    while record is not None:
        try:
            return _verify_record(system, record, current)
        except DamagedError:
            # Others may publish meanwhile: only what stays as it was found is a finding.
            again = system.task(name)
            if again == record:
                raise
            record = again
    return None


def _verify_record(system: System, record: TaskRecord, current: set[str]) -> None:
    """Checks a task's record; `current` are ids of paths that are known to be current, those of all tasks once they are asked for."""
    path = system.path(record.path_id)
    if path.task != record.name:
        raise DamagedError(f"found path {path.id} of task {path.task!r} current for {record.name!r}", "one of its own")
    if record.parent_id not in current:
        # Not for each task: all of them are read.
        current.update(other.path_id for other in system.tasks().values())
    if record.parent_id not in current:
        raise DamagedError(f"found path {record.parent_id} as the parent of task {record.name!r}", "a current path or the root")
    images = system.examples(record)
    found = hashlib.sha256((system.folder / "examples" / record.examples).read_bytes()).hexdigest()[:16]
    if f"{found}.npy" != record.examples or images.dtype != np.uint8:
        raise DamagedError(f"found altered example images {record.examples}", "what was written", "restore the file")
