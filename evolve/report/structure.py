"""What the multitask model of a system is made of: each layer once, who trained it, who uses it, and where to draw it. Torch-free."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

from evolve.layer import POS_EMBED, Layer, LayerKind, Position
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
        tasks: in the order in which they are best drawn: those that share much, side by side.
        rows: from bottom to top.
        in_common: of each pair of tasks, each with itself included, in the order of `tasks`.
    """

    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    in_common: tuple[InCommon, ...]


def structure_of(system: System, searches: Iterable[Search]) -> Structure:
    """Returns what the multitask model of a system is made of now.

    Args:
        system: the system.
        searches: of which it is known what they trained.

    Raises:
        DamagedError: a path or layer is missing or altered.
    """
    records = system.tasks()
    paths = {name: system.path(record.path_id) for name, record in records.items()}
    root_ids = set(system.root.layer_ids)
    for path in paths.values():
        spec = path.layer(POS_EMBED).spec
        if spec.integer("grid_height") == spec.integer("grid_width"):
            # Resampled position embeddings belong to the root, whichever task came to need them.
            root_ids.add(system.position_embedding(spec.integer("grid_height")).id)
    trainers = _trainers(searches, root_ids)
    for name in sorted(records, key=lambda name: records[name].order):
        # Without its journal, the task that took a layer up first may have trained it; one whose parent had it did not.
        for layer_id in paths[name].layer_ids:
            if layer_id not in trainers:
                users = [other for other in paths if layer_id in paths[other].layer_ids]
                trainers[layer_id] = name if len(users) == 1 else UNKNOWN
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

    In each row the users of a layer lie side by side, and layers go by the middle of their users: lines cross as little as such an
    order allows, and where nothing parts they are straight.
    """
    num_blocks = max((path.num_blocks for path in paths.values()), default=0)
    place = {task: index for index, task in enumerate(tasks)}
    for position in ordered_positions(num_blocks, range(num_blocks)):
        users: dict[str, list[str]] = {}
        for task in tasks:
            layer = paths[task].find(position)
            # A task without a layer there passes by in a lane of its own.
            users.setdefault(layer.id if layer else f"past {task}", []).append(task)
        groups = sorted(users.items(), key=lambda group: (_middle([place[task] for task in group[1]]), group[0]))
        if position.kind is LayerKind.ADAPTER and all(key.startswith("past ") for key in users):
            continue
        lane = 0
        layers = []
        for layer_id, group in groups:
            layer = paths[group[0]].find(position)
            if layer is not None:
                layers.append(_shared_layer(position, layer, trainers[layer_id], group, lane))
            lane += len(group)
        yield Row(str(position), tuple(itertools.chain.from_iterable(group for _, group in groups)), tuple(layers))


def _shared_layer(position: Position, layer: Layer, trained_by: str, tasks: Sequence[str], lane: int) -> SharedLayer:
    return SharedLayer(str(position), layer.id, trained_by, tuple(tasks), layer.num_parameters, lane)


def _middle(places: Sequence[int]) -> float:
    return sum(places) / len(places)


def _in_common(tasks: Sequence[str], paths: Mapping[str, Path], root_ids: Iterable[str]) -> Iterable[InCommon]:
    root = frozenset(root_ids)
    sizes = {layer.id: layer.num_parameters for path in paths.values() for _, layer in path.layers}
    for task, other in itertools.product(tasks, repeat=2):
        both = paths[task].layer_ids & paths[other].layer_ids
        yield InCommon(task, other, len(both), len(both - root), sum(sizes[layer_id] for layer_id in both))
