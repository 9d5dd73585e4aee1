"""What the multitask model of a system is made of: each layer once, who trained it, who uses it, and where to draw it. Torch-free."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from evolve.layer import POS_EMBED, LayerKind
from evolve.path import Path, ordered_positions
from evolve.report.searches import ROOT, Search
from evolve.store import System

UNKNOWN = ""
"""What the trainer of a layer is called if no task of the system trained it: one that was removed."""


@dataclasses.dataclass(frozen=True)
class SharedLayer:
    """A layer that current paths use, one node of the graph.

    Attributes:
        position: where it stands, such as `block.2`.
        layer_id: its id.
        trained_by: the task that trained it, `root`, or UNKNOWN.
        tasks: that use it, in the order of their lanes.
        num_parameters: of the layer.
        first_lane: lane of the first task in its row, from 0; its tasks lie side by side.
    """

    position: str
    layer_id: str
    trained_by: str
    tasks: tuple[str, ...]
    num_parameters: int
    first_lane: int


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the graph: every task has a lane, whether it has a layer there or passes by.

    Attributes:
        position: of all layers in it.
        lanes: the tasks from left to right.
        layers: in it, from left to right.
    """

    position: str
    lanes: tuple[str, ...]
    layers: tuple[SharedLayer, ...]


@dataclasses.dataclass(frozen=True)
class InCommon:
    """What two tasks have in common.

    Attributes:
        task: one.
        other: the other, or the same: then everything that it uses.
        num_layers: layers in both paths.
        num_trained: of these, layers that are not the root's.
        num_parameters: of the layers in both.
    """

    task: str
    other: str
    num_layers: int
    num_trained: int
    num_parameters: int


@dataclasses.dataclass(frozen=True)
class Structure:
    """The multitask model.

    Attributes:
        tasks: those that share much, side by side; so they lie in the lowest row, too, as far as its layers allow.
        rows: from bottom to top.
        in_common: of each pair of tasks, each with itself included, in the order of `tasks`.
    """

    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    in_common: tuple[InCommon, ...]


def structure_of(system: System, searches: Sequence[Search]) -> Structure:
    """Returns what the multitask model of a system is made of now.

    Args:
        system: the system.
        searches: of which it is known what they trained.

    Raises:
        DamagedError: a path or layer is missing or altered.
    """
    paths = {name: system.path(record.path_id) for name, record in system.tasks().items()}
    root_ids = set(system.root.layer_ids)
    for path in paths.values():
        spec = path.layer(POS_EMBED).spec
        if spec.integer("grid_height") == spec.integer("grid_width"):
            # Resampled position embeddings belong to the root, whichever task came to need them.
            root_ids.add(system.position_embedding(spec.integer("grid_height")).id)
    trainers = _trainers(searches, root_ids)
    searched = {search.task for search in searches}
    users: dict[str, list[str]] = {}
    for name, path in paths.items():
        for layer_id in path.layer_ids - trainers.keys():
            users.setdefault(layer_id, []).append(name)
    for layer_id, names in users.items():
        # A task without journals trained what it alone uses; what no journal knows otherwise came from a task that was removed.
        trainers[layer_id] = names[0] if len(names) == 1 and names[0] not in searched else UNKNOWN
    return arrange(paths, trainers, root_ids)


def arrange(paths: Mapping[str, Path], trainers: Mapping[str, str], root_ids: Iterable[str]) -> Structure:
    """Returns the multitask model that paths make.

    Args:
        paths: current paths by task.
        trainers: who trained each layer, by its id.
        root_ids: ids of the layers that are the root's.
    """
    tasks = order_tasks(paths)
    return Structure(tuple(tasks), tuple(_rows(tasks, paths, trainers)), tuple(_in_common(tasks, paths, root_ids)))


def order_tasks(paths: Mapping[str, Path]) -> list[str]:
    """Returns the tasks so that each follows the one before it with which, of those left, it has most layers in common.

    The first is one that shares most of all; ties go by name.

    Args:
        paths: current paths by task.
    """
    layers = {name: path.layer_ids for name, path in paths.items()}

    def alike(one: str, other: str) -> int:
        return len(layers[one] & layers[other])

    left = sorted(paths)
    ordered: list[str] = []
    while left:
        if ordered:
            following = max(left, key=lambda name: alike(ordered[-1], name))
        else:
            following = max(left, key=lambda name: sum(alike(name, other) for other in left if other != name))
        left.remove(following)
        ordered.append(following)
    return ordered


def _trainers(searches: Iterable[Search], root_ids: Iterable[str]) -> dict[str, str]:
    """Returns who trained each layer, by its id."""
    trainers: dict[str, str] = {}
    for search in searches:
        for child in search.children:
            for layer_id in child.trained_layers:
                trainers.setdefault(layer_id, search.task)
    return trainers | dict.fromkeys(root_ids, ROOT)


def _rows(tasks: Sequence[str], paths: Mapping[str, Path], trainers: Mapping[str, str]) -> Iterable[Row]:
    """Yields the rows that hold a layer, from bottom to top.

    In each row the users of a layer lie side by side, and layers go by where their users lie in the row below: lines that need not
    part are straight.
    """
    num_blocks = max((path.num_blocks for path in paths.values()), default=0)
    lanes = list(tasks)
    for position in ordered_positions(num_blocks, range(num_blocks)):
        place = {task: lane for lane, task in enumerate(lanes)}
        # A task without a layer there passes by in a lane of its own.
        found = {task: paths[task].find(position) for task in lanes}
        users: dict[str, list[str]] = {}
        for task, layer in found.items():
            users.setdefault(layer.id if layer else f"past {task}", []).append(task)
        if position.kind is LayerKind.ADAPTER and not any(found.values()):
            continue
        groups = sorted(users.values(), key=lambda group: sum(place[task] for task in group) / len(group))
        lanes = [task for group in groups for task in group]
        layers = [
            SharedLayer(str(position), layer.id, trainers[layer.id], tuple(group), layer.num_parameters, lanes.index(group[0]))
            for group in groups
            if (layer := found[group[0]]) is not None
        ]
        yield Row(str(position), tuple(lanes), tuple(layers))


def _in_common(tasks: Sequence[str], paths: Mapping[str, Path], root_ids: Iterable[str]) -> Iterable[InCommon]:
    root = frozenset(root_ids)
    sizes = {layer.id: layer.num_parameters for path in paths.values() for _, layer in path.layers}
    for task, other in itertools.product(tasks, repeat=2):
        both = paths[task].layer_ids & paths[other].layer_ids
        yield InCommon(task, other, len(both), len(both - root), sum(sizes[layer_id] for layer_id in both))
