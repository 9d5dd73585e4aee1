"""What a system is made of, in numbers and words: for `munet-evolve show`, for reports, and for whoever asks from Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from evolve.errors import SystemFolderError
from evolve.journal import child_records, read_journal
from evolve.layer import POS_EMBED
from evolve.outcomes import Outcomes
from evolve.path import Path
from evolve.scoring import accounted_parameters, others_of, sharing_counts
from evolve.store import System


@dataclasses.dataclass(frozen=True)
class TaskSummary:
    """One task.

    Attributes:
        name: of the task.
        path_id: its current path.
        parent: the task whose current path it descends from, or `root`.
        quality: validation accuracy, 0 to 1.
        test_accuracy: 0 to 1; None without a test split.
        rounds: rounds closed.
        private: whether other tasks are kept from using its layers.
        num_classes: classes.
        image_size: in pixels.
        num_blocks: blocks kept.
        dropped_blocks: blocks of the root that it leaves out, at the top.
        adapters: indices of the blocks with an adapter before them.
        own_layers: positions of layers that neither the root nor another task uses.
        root_layers: positions of layers of the root.
        borrowed_layers: positions of layers that are not the root's and that other tasks use too, with those tasks.
        num_parameters: of all its layers.
        own_parameters: of its own layers.
        accounted_parameters: each layer's divided by the number of tasks that use it.
        outcomes: what became of the children that were trained for it, as far as its journals are there; None if one cannot be read.
    """

    name: str
    path_id: str
    parent: str
    quality: float
    test_accuracy: float | None
    rounds: int
    private: bool
    num_classes: int
    image_size: int
    num_blocks: int
    dropped_blocks: int
    adapters: tuple[int, ...]
    own_layers: tuple[str, ...]
    root_layers: tuple[str, ...]
    borrowed_layers: dict[str, tuple[str, ...]]
    num_parameters: int
    own_parameters: int
    accounted_parameters: float
    outcomes: Outcomes | None

    def make_up(self, root_blocks: int) -> str:
        """Returns in words what the path changes: `from greek; trains block.1, norm, head; adapter before block 0; 2 of 3 blocks`."""
        parts = [f"from {self.parent}", f"trains {', '.join(self.own_layers) or 'nothing of its own'}"]
        if self.borrowed_layers:
            owners = sorted({task for tasks in self.borrowed_layers.values() for task in tasks})
            parts.append(f"shares {', '.join(self.borrowed_layers)} with {', '.join(owners)}")
        if self.adapters:
            parts.append(f"adapter before block {', '.join(map(str, self.adapters))}")
        blocks = f"{self.num_blocks} of {root_blocks} blocks"
        parts.append(blocks + (f" ({self.dropped_blocks} dropped)" if self.dropped_blocks else ""))
        return "; ".join(parts)


@dataclasses.dataclass(frozen=True)
class SystemSummary:
    """A whole system.

    Attributes:
        system_id: its id.
        root_blocks: blocks of the root.
        root_parameters: parameters of the root, without a head.
        tasks: in ascending order of name.
        num_layers: distinct layers that current paths use.
        num_parameters: parameters of those layers.
        separate_parameters: parameters of one separate model for each task.
    """

    system_id: str
    root_blocks: int
    root_parameters: int
    tasks: tuple[TaskSummary, ...]
    num_layers: int
    num_parameters: int
    separate_parameters: int


def summarise(system: System) -> SystemSummary:
    """Returns what a system is made of now.

    Raises:
        DamagedError: a path or a layer is missing or altered.
    """
    with system.locks.reading():
        records = system.tasks()
        paths = {name: system.path(record.path_id) for name, record in records.items()}
    owners = {record.path_id: name for name, record in records.items()}
    users: dict[str, list[str]] = {}
    for name, path in paths.items():
        for layer_id in path.layer_ids:
            users.setdefault(layer_id, []).append(name)
    # Resampled position embeddings belong to the root, whichever task came to need them.
    root_ids = system.root.layer_ids | {system.position_embedding(grid).id for grid in _grids(paths.values())}
    sharing = sharing_counts(paths.values())
    tasks = []
    for name, path in paths.items():
        record = records[name]
        placed = [(str(position), layer) for position, layer in path.layers]
        own = [(position, layer) for position, layer in placed if layer.id not in root_ids and users[layer.id] == [name]]
        tasks.append(
            TaskSummary(
                name=name,
                path_id=path.id,
                parent=owners.get(record.parent_id, "root"),
                quality=record.quality,
                test_accuracy=record.test_accuracy,
                rounds=record.rounds,
                private=record.private,
                num_classes=len(record.labels),
                image_size=path.hyperparameters.image_size,
                num_blocks=path.num_blocks,
                dropped_blocks=system.root.num_blocks - path.num_blocks,
                adapters=path.adapter_blocks,
                own_layers=tuple(position for position, _ in own),
                root_layers=tuple(position for position, layer in placed if layer.id in root_ids),
                borrowed_layers={
                    position: tuple(user for user in users[layer.id] if user != name)
                    for position, layer in placed
                    if layer.id not in root_ids and users[layer.id] != [name]
                },
                num_parameters=path.num_parameters,
                own_parameters=sum(layer.num_parameters for _, layer in own),
                accounted_parameters=accounted_parameters(path, others_of(path, sharing)),
                outcomes=_outcomes(system, name, record.rounds),
            )
        )
    distinct = {layer.id: layer.num_parameters for path in paths.values() for _, layer in path.layers}
    return SystemSummary(
        system_id=system.id,
        root_blocks=system.root.num_blocks,
        root_parameters=system.root.num_parameters,
        tasks=tuple(tasks),
        num_layers=len(distinct),
        num_parameters=sum(distinct.values()),
        separate_parameters=sum(path.num_parameters for path in paths.values()),
    )


def _outcomes(system: System, task: str, rounds: int) -> Outcomes | None:
    """Counts the children of all rounds, the one that is under way among them."""
    try:
        journals = [read_journal(system.journal_file(task, number)) for number in range(rounds + 1)]
    except SystemFolderError:
        # What the system is made of is known all the same.
        return None
    return Outcomes.of(child for records in journals for _, child in child_records(records))


def _grids(paths: Iterable[Path]) -> set[int]:
    specs = [path.layer(POS_EMBED).spec for path in paths]
    return {spec.integer("grid_height") for spec in specs if spec.integer("grid_height") == spec.integer("grid_width")}
