"""Closing a search: a path becomes its task's current one; the parents of all current paths are current ones, or the root."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from evolve.documents import TaskRecord
from evolve.journal import Record
from evolve.path import Path
from evolve.store import System


@dataclasses.dataclass(frozen=True)
class ActiveTask:
    """The task being searched, as far as the search core needs to know it.

    Attributes:
        name: see munet.names.
        labels: class names in the order of the logits.
        num_train_images: size of the training split.
        data_fingerprint: hash of images, labels and splits.
        private: whether other tasks are kept from using its layers.
    """

    name: str
    labels: tuple[str, ...]
    num_train_images: int
    data_fingerprint: str
    private: bool = False


def publish_task(
    system: System,
    task: ActiveTask,
    *,
    path: Path,
    ancestors: Sequence[Path],
    closed: Record,
    rounds: int,
    settings: Mapping[str, Any],
) -> TaskRecord:
    """Makes a path its task's current one and keeps every parent current.

    Args:
        system: the system.
        task: the task.
        path: its new current path, stored already.
        ancestors: of the path, from near to far.
        closed: what the journal says of the search's end.
        rounds: rounds closed, this one counted in.
        settings: the resolved settings of the run.

    Returns:
        The task's new record.

    Raises:
        ConflictError: another machine has closed or removed the task meanwhile.
    """
    with system.locks.publishing():
        system.pull()
        records = system.tasks()
        old = records.pop(task.name, None)
        current = {record.path_id for record in records.values()} | {system.root.id}
        record = TaskRecord(
            name=task.name,
            path_id=path.id,
            parent_id=next((ancestor.id for ancestor in ancestors if ancestor.id in current), system.root.id),
            num_children=closed["num_children"],
            rounds=rounds,
            order=1 + max((other.order for other in (*records.values(), *filter(None, [old]))), default=0),
            private=task.private,
            labels=task.labels,
            quality=path.quality or 0.0,
            test_accuracy=closed["test_accuracy"],
            examples=closed["examples"],
            data_fingerprint=task.data_fingerprint,
            settings=settings,
        )
        return system.publish(record, [ancestor.id for ancestor in ancestors])
