"""What one search sees of the system, taken when it opens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from evolve.documents import TaskRecord
from evolve.path import Path
from evolve.store import System


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What a search sees of the system, taken when it opens; later changes by others do not touch it.

    Attributes:
        current: current paths of all tasks by name, the active task's among them if it has one.
        records: records of all tasks by name.
        root: the root path.
    """

    current: Mapping[str, Path]
    records: Mapping[str, TaskRecord]
    root: Path

    @staticmethod
    def of(system: System, records: Mapping[str, TaskRecord]) -> Snapshot:
        """Returns the system as its records say, which were read while nobody published."""
        return Snapshot({name: system.path(record.path_id) for name, record in records.items()}, records, system.root)

    def others(self, task: str) -> list[Path]:
        """Returns the current paths of all other tasks, newest first; of those that were published at once, by name."""
        names = sorted((name for name in self.records if name != task), key=lambda name: (-self.records[name].order, name))
        return [self.current[name] for name in names]

    def seeds(self, task: str, limit: int) -> tuple[Path, ...]:
        """Returns the current paths of the newest other tasks that are not private, then the root; `limit` in all."""
        open_to_all = [path for path in self.others(task) if not self.records[path.task or ""].private]
        return (*open_to_all[: limit - 1], self.root)

    def parents(self) -> dict[str, str]:
        """Returns the parent's id of each current path by its id."""
        return {record.path_id: record.parent_id for record in self.records.values()}

    def to_list(self) -> list[dict[str, Any]]:
        """Returns the records as JSON values, for the journal; what no decision depends on is empty: each journal has all tasks."""
        # Emptied first: settings are large, and asdict copies all that it is given.
        emptied = (dataclasses.replace(record, labels=(), examples="", settings={}) for record in self.records.values())
        return [dataclasses.asdict(record) | {"labels": []} for record in emptied]

    @staticmethod
    def from_list(system: System, rows: Sequence[Mapping[str, Any]]) -> Snapshot:
        """Returns the snapshot that `to_list` wrote.

        Raises:
            DamagedError: a path of it is missing.
        """
        records = {row["name"]: TaskRecord.from_dict(row) for row in rows}
        return Snapshot({name: system.path(record.path_id) for name, record in records.items()}, records, system.root)
