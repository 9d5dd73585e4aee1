"""Segments: runs of layers that no task's path enters or leaves midway, and the routes that tasks take through them.

Nodes are units (what is never cut apart), edges say "followed by, in some path". Where a unit has exactly one follower, and that one
exactly one unit before it, both belong to one segment, except that

- the final norm and the head are always a segment of their own;
- a cut that a kept generation published stays, so that a published segment is at most split, never merged into another.

Two paths may share a segment without sharing what comes before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Collection, Iterable, Mapping

from evolve.export.settings import ExportSettings, exporter_version
from evolve.layer import Layer, LayerKind
from evolve.path import Path
from munet.v1 import generation_pb2

UnitIds = tuple[str, ...]
"""Ids of a unit's layers in order: what a unit is."""

Cut = tuple[UnitIds, UnitIds]
"""The last unit of a segment and the first unit of the one that follows it in some route."""

_UNIT_BEGINNINGS = (LayerKind.PATCH_EMBED, LayerKind.ADAPTER, LayerKind.BLOCK, LayerKind.NORM)


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is never cut apart: the stem, a block with the adapter before it, or the final norm with the head.

    Attributes:
        layers: in the order in which they compute.
    """

    layers: tuple[Layer, ...]

    @property
    def layer_ids(self) -> UnitIds:
        """Ids of its layers in order."""
        return tuple(layer.id for layer in self.layers)

    @property
    def is_stem(self) -> bool:
        """Whether it takes the image."""
        return self.layers[0].kind is LayerKind.PATCH_EMBED

    @property
    def is_head(self) -> bool:
        """Whether it gives the logits."""
        return self.layers[-1].kind is LayerKind.HEAD


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of units that becomes one ONNX model.

    Attributes:
        name: `seg-` and 12 hex digits of a hash over its layer ids by unit, the export settings and the exporter's version.
        units: in the order in which they compute.
    """

    name: str
    units: tuple[Unit, ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All its layers in order."""
        return tuple(layer for unit in self.units for layer in unit.layers)

    @property
    def num_parameters(self) -> int:
        """Parameters of its distinct layers."""
        return sum({layer.id: layer.num_parameters for layer in self.layers}.values())


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """All segments of a system and the routes through them.

    Attributes:
        segments: by name, in ascending order.
        routes: by task, in ascending order: names of the segments in the order they run.
    """

    segments: Mapping[str, Segment]
    routes: Mapping[str, tuple[str, ...]]


def units_of(path: Path) -> tuple[Unit, ...]:
    """Returns the units of a task's path, from the stem to the final norm with the head."""
    units: list[list[Layer]] = []
    for _, layer in path.layers:
        follows_its_adapter = layer.kind is LayerKind.BLOCK and units[-1][-1].kind is LayerKind.ADAPTER
        if layer.kind in _UNIT_BEGINNINGS and not follows_its_adapter:
            units.append([])
        units[-1].append(layer)
    return tuple(Unit(tuple(layers)) for layers in units)


def find_segments(paths: Mapping[str, Path], published: Collection[Cut], settings: ExportSettings) -> Segmentation:
    """Divides paths into segments.

    Args:
        paths: current paths by task, none of them the root.
        published: cuts that stay, see `published_cuts`.
        settings: part of the names.

    Returns:
        The segments and routes. The order of `paths` does not matter.
    """
    chains = {task: units_of(paths[task]) for task in sorted(paths)}
    cuts = _cuts(chains.values(), published)
    segments: dict[str, Segment] = {}
    routes: dict[str, tuple[str, ...]] = {}
    for task, chain in chains.items():
        runs = [segment_of(units, settings) for units in _split(chain, cuts)]
        segments.update((segment.name, segment) for segment in runs)
        routes[task] = tuple(segment.name for segment in runs)
    return Segmentation(dict(sorted(segments.items())), routes)


def segment_of(units: Iterable[Unit], settings: ExportSettings) -> Segment:
    """Returns the segment that consists of these units."""
    run = tuple(units)
    told = dataclasses.asdict(settings)
    if not (settings.response_cache and run[0].is_stem):
        # It changes nothing of the others, and whoever does not use it need not export anew.
        del told["response_cache"]
    content = [exporter_version(), told, [unit.layer_ids for unit in run]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    return Segment(f"seg-{digest.hexdigest()[:12]}", run)


def published_cuts(generations: Iterable[generation_pb2.Generation]) -> frozenset[Cut]:
    """Returns every cut between two consecutive segments of some route of these generations."""
    cuts: set[Cut] = set()
    for generation in generations:
        units = {segment.name: [tuple(unit.layer_ids) for unit in segment.units] for segment in generation.segments}
        for task in generation.tasks:
            cuts.update((units[before][-1], units[after][0]) for before, after in itertools.pairwise(task.route))
    return frozenset(cuts)


def _cuts(chains: Iterable[tuple[Unit, ...]], published: Collection[Cut]) -> frozenset[Cut]:
    edges = {(before, after) for chain in chains for before, after in itertools.pairwise(chain)}
    followers: dict[Unit, int] = {}
    forerunners: dict[Unit, int] = {}
    for before, after in edges:
        followers[before] = followers.get(before, 0) + 1
        forerunners[after] = forerunners.get(after, 0) + 1
    between = {
        (before.layer_ids, after.layer_ids)
        for before, after in edges
        if followers[before] > 1 or forerunners[after] > 1 or after.is_head
    }
    return frozenset(between.union(published))


def _split(chain: tuple[Unit, ...], cuts: frozenset[Cut]) -> list[list[Unit]]:
    runs = [[chain[0]]]
    for before, after in itertools.pairwise(chain):
        if (before.layer_ids, after.layer_ids) in cuts:
            runs.append([])
        runs[-1].append(after)
    return runs
