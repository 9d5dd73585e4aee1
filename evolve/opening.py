"""Opening a search: the snapshot it works on, and the journal that an unfinished one left behind, to go on with, mend or set aside."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from evolve.closing import ActiveTask
from evolve.config import NO_PART_OF_THE_RESULT, with_defaults
from evolve.documents import TaskRecord
from evolve.errors import DamagedError, DataError, SettingsError
from evolve.journal import FORMAT, Journal, cut_to_whole, read_journal
from evolve.snapshot import Snapshot
from evolve.store import JournalFile, System


@dataclasses.dataclass(frozen=True)
class OpenedSearch:
    """What a search starts from.

    Attributes:
        round: counted from 0 over the life of the task.
        snapshot: the system as this search sees it to its end.
        journal: its record, with what an earlier process of the same search has done already.
    """

    round: int
    snapshot: Snapshot
    journal: Journal


def open_search(system: System, task: ActiveTask, settings: Mapping[str, Any], trainer: Mapping[str, str]) -> OpenedSearch:
    """Opens the next round of a task, or goes on with the one that an earlier process left unfinished.

    Args:
        system: the system; the caller holds the task's lock.
        task: the active task.
        settings: the resolved settings, JSON values.
        trainer: what else the results depend on, see Trainer.identity.

    Raises:
        DataError: the task's data are not those that its current path was evolved on, or that the unfinished search began with.
        SettingsError: the unfinished search was begun with other settings.
        DamagedError: its journal, or a path it needs, is altered or missing, or the journal belongs elsewhere.
        SystemFolderError: the folder cannot be written, or its journal is of a newer format.
        ConflictError: another machine has begun the same round meanwhile.
    """
    system.remove_unfinished()
    # From the look at the system until the journal names what was seen.
    with system.locks.storing():
        with system.locks.publishing():
            records = system.tasks()
        # What they name is read beside those who publish: paths never change, and stay while this is storing.
        snapshot = Snapshot.of(system, records)
        record = snapshot.records.get(task.name)
        _check_data(task, record)
        round_number = record.rounds if record is not None else 0
        identity = _identity(system, task, round_number, settings, trainer)
        journal = Journal(system.journal_file(task.name, round_number))
        try:
            begun = journal.of_type("open")
            if begun:
                _check_begun(system, JournalFile(task.name, round_number, journal.file, is_closed=False), begun[0], identity)
                snapshot = Snapshot.from_list(system, begun[0]["snapshot"])
            else:
                journal.append("open", {**identity, "resolved_settings": settings, "snapshot": snapshot.to_list()})
            system.share(journal)
        except BaseException:
            journal.close()
            raise
    return OpenedSearch(round_number, snapshot, journal)


def unfinished_search(system: System, task: str) -> JournalFile | None:
    """Returns the journal of a task's round that is not closed yet; None if there is none."""
    return next((journal for journal in system.journals(task) if not journal.is_closed), None)


def check_unfinished(system: System, task: str, settings: Mapping[str, Any]) -> None:
    """Checks what can be checked of a task's unfinished search before its data are loaded, which may take hours.

    Args:
        system: the system.
        task: name of the task.
        settings: the resolved settings, JSON values.

    Raises:
        SettingsError, DamagedError, SystemFolderError: see `open_search`.
    """
    journal = unfinished_search(system, task)
    begun = read_journal(journal.file) if journal is not None else []
    if journal is not None and begun:
        _check_begun(system, journal, begun[0], {"settings": _deciding(settings)})


def restart_search(system: System, task: str) -> pathlib.Path | None:
    """Sets the journal of a task's unfinished search aside, so that its round starts over; the caller holds the task's lock.

    Returns:
        Where the journal is now; None if there was none.

    Raises:
        SystemFolderError: the folder cannot be written.
    """
    with system.locks.publishing():
        journal = unfinished_search(system, task)
        return system.set_journal_aside(journal) if journal is not None else None


def recover_search(system: System, task: str) -> pathlib.Path | None:
    """Keeps what is whole of an altered journal of a task's unfinished search; what is lost of it will be trained again, alike.

    The caller holds the task's lock.

    Returns:
        Where a copy of the altered journal is; None if nothing was altered.

    Raises:
        DamagedError: nothing of it can be read.
        SystemFolderError: the folder cannot be written, or the journal is of a newer format.
    """
    journal = unfinished_search(system, task)
    if journal is None:
        return None
    try:
        read_journal(journal.file)
    except DamagedError:
        with system.locks.publishing():
            file = system.journal_file(task, journal.round)
            return cut_to_whole(file, keep=lambda: system.set_journal_aside(journal, copy=True))
    return None


def _identity(
    system: System, task: ActiveTask, round_number: int, settings: Mapping[str, Any], trainer: Mapping[str, str]
) -> dict[str, Any]:
    """Returns what must be the same for a search to go on."""
    return {
        "format": FORMAT,
        "system": system.id,
        "root": system.root.id,
        "task": task.name,
        "round": round_number,
        "data_fingerprint": task.data_fingerprint,
        "labels": list(task.labels),
        "private": task.private,
        "trainer": dict(trainer),
        "settings": _deciding(settings),
    }


def _deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that shape a search's decisions."""
    # The number of rounds may grow, it shapes no decision of this one.
    left_out = {"search": ("rounds",), "training": NO_PART_OF_THE_RESULT}
    complete = with_defaults(settings)
    deciding = {
        group: {name: value for name, value in complete[group].items() if name not in names} for group, names in left_out.items()
    }
    return {**complete, **deciding}


def _check_data(task: ActiveTask, record: TaskRecord | None) -> None:
    if record is not None and record.data_fingerprint != task.data_fingerprint:
        raise DataError(
            f"found data of task {task.name!r} with fingerprint {task.data_fingerprint}",
            f"{record.data_fingerprint}, what its current path was evolved on",
            "use the same data, another task name, or `munet-evolve remove` the task first",
        )


def _check_begun(system: System, journal: JournalFile, begun: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Checks that a search may go on from its journal.

    Args:
        system: the system.
        journal: of the unfinished search.
        begun: its first record.
        identity: what must be the same now.
    """
    system.check_journal(journal, begun)
    then = {name: _deciding(value) if name == "settings" else value for name, value in begun.items() if name in identity}
    found = list(differences(then, identity))
    if not found:
        return
    what = f"found an unfinished search of task {journal.task!r} begun otherwise: {describe(found)}"
    if any(name in ("data_fingerprint", "labels") for name, _, _ in found):
        raise DataError(what, "the data it began with", "use those, or add --restart to start this round over with the new ones")
    raise SettingsError(what, "what it began with", "go back to that, or add --restart to start this round over")


def describe(found: Iterable[tuple[str, Any, Any]]) -> str:
    """Returns in words what `differences` found between then and now."""
    return "; ".join(f"{name} = {_short(old)} then and {_short(new)} now" for name, old, new in found)


def differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields the dotted name and both values of everything that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new


def _short(value: object, most: int = 200) -> str:
    """Returns a value as it is written, cut where it would fill the screen: there may be thousands of labels."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
