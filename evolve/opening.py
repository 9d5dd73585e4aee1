"""Opening a search: the snapshot it works on, and the journal that an unfinished one left behind."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from evolve.closing import ActiveTask
from evolve.config import DefaultSettings, SearchSettings, TrainingSettings
from evolve.errors import DataError, SettingsError
from evolve.journal import FORMAT, Journal
from evolve.snapshot import Snapshot
from evolve.store import System, TaskRecord


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
        DataError: the task's data are not those that its current path was evolved on.
        SettingsError: the unfinished search was begun with other settings.
        DamagedError: its journal, or a path it needs, is altered or missing.
        SystemFolderError: the folder cannot be written, or its journal is of a newer format.
    """
    system.remove_unfinished()
    with system.publishing():
        snapshot = Snapshot.of(system)
    record = snapshot.records.get(task.name)
    _check_data(task, record)
    round_number = record.rounds if record is not None else 0
    identity = _identity(system, task, round_number, settings, trainer)
    journal = Journal(system.journal_file(task.name, round_number))
    try:
        begun = journal.of_type("open")
        if begun:
            _check_identity(journal.file, _with_defaults(begun[0]), identity)
            snapshot = Snapshot.from_list(system, begun[0]["snapshot"])
        else:
            journal.append("open", {**identity, "resolved_settings": settings, "snapshot": snapshot.to_list()})
    except BaseException:
        journal.close()
        raise
    return OpenedSearch(round_number, snapshot, journal)


def _identity(
    system: System, task: ActiveTask, round_number: int, settings: Mapping[str, Any], trainer: Mapping[str, str]
) -> dict[str, Any]:
    """Returns what must be the same for a search to go on."""
    deciding = {name: _deciding(name, value) if isinstance(value, Mapping) else value for name, value in settings.items()}
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
        "settings": deciding,
    }


def _with_defaults(begun: Mapping[str, Any]) -> dict[str, Any]:
    """Returns an identity with the defaults of settings that its search did not know yet: it searched as they say."""
    settings = begun["settings"]
    kinds = {"search": SearchSettings, "training": TrainingSettings, "defaults": DefaultSettings}
    filled = {name: _deciding(name, kind().model_dump(mode="json")) | settings[name] for name, kind in kinds.items()}
    return {**begun, "settings": {**settings, **filled}}


def _deciding(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a section that shape the decisions of one search."""
    # The number of rounds may grow, it shapes no decision of this one; the trainer says which device was really used.
    other = {"search": "rounds", "training": "device"}.get(section)
    return {name: value for name, value in values.items() if name != other}


def _check_data(task: ActiveTask, record: TaskRecord | None) -> None:
    if record is not None and record.data_fingerprint != task.data_fingerprint:
        raise DataError(
            f"found data of task {task.name!r} with fingerprint {task.data_fingerprint}",
            f"{record.data_fingerprint}, what its current path was evolved on",
            "use the same data, another task name, or `munet-evolve remove` the task first",
        )


def _check_identity(file: pathlib.Path, begun: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    differences = [
        f"{name} = {old!r} then and {new!r} now" for name, old, new in _differences({n: begun.get(n) for n in identity}, identity)
    ]
    if differences:
        raise SettingsError(
            f"found an unfinished search of task {identity['task']!r} begun otherwise: {'; '.join(differences)}",
            "what it began with",
            f"go back to that, or remove {file} to start this round over",
        )


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields the dotted name and both values of everything that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif old != new:
        yield name, old, new
