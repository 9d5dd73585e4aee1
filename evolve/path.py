"""Paths: one model each, an ordered list of layers with hyperparameters, a parent and a quality."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from evolve.hyperparameters import Hyperparameters
from evolve.layer import (
    CLASS_TOKEN,
    HEAD,
    NORM,
    PATCH_EMBED,
    POS_EMBED,
    Layer,
    LayerKind,
    Position,
    adapter_position,
    block_position,
)


class PlacedLayer(NamedTuple):
    """A layer and where it stands in a path."""

    position: Position
    layer: Layer


@dataclasses.dataclass(frozen=True)
class Path:
    """One model. Immutable; its id is a hash of everything else it holds.

    Attributes:
        id: 32 hex digits.
        task: the task it was evolved for; None for the root.
        layers: from the patch embedding to the head; the root has no head.
        hyperparameters: what it was trained with.
        parent_id: the path it was sampled from; None for the root.
        quality: validation accuracy, 0 to 1; None for the root.
    """

    id: str
    task: str | None
    layers: tuple[PlacedLayer, ...]
    hyperparameters: Hyperparameters
    parent_id: str | None
    quality: float | None

    @staticmethod
    def of(
        *,
        task: str | None,
        layers: Iterable[PlacedLayer],
        hyperparameters: Hyperparameters,
        parent_id: str | None,
        quality: float | None,
    ) -> Path:
        """Returns the path that consists of these.

        Raises:
            ValueError: the layers do not chain; see `check_layers`.
        """
        placed = tuple(layers)
        check_layers(placed, with_head=task is not None)
        own_id = path_id(
            task=task,
            layers=[[str(position), layer.id] for position, layer in placed],
            hyperparameters=hyperparameters.to_dict(),
            parent_id=parent_id,
            quality=quality,
        )
        return Path(own_id, task, placed, hyperparameters, parent_id, quality)

    def find(self, position: Position) -> Layer | None:
        """Returns the layer at a position, or None."""
        return next((layer for at, layer in self.layers if at == position), None)

    def layer(self, position: Position) -> Layer:
        """Returns the layer at a position.

        Raises:
            KeyError: the path has none there.
        """
        found = self.find(position)
        if found is None:
            raise KeyError(str(position))
        return found

    @functools.cached_property
    def layer_ids(self) -> frozenset[str]:
        """Ids of its distinct layers."""
        return frozenset(layer.id for _, layer in self.layers)

    @property
    def num_blocks(self) -> int:
        """Number of its blocks."""
        return sum(position.kind is LayerKind.BLOCK for position, _ in self.layers)

    @property
    def adapter_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks with an adapter before them, ascending."""
        return tuple(p.block for p, _ in self.layers if p.kind is LayerKind.ADAPTER and p.block is not None)

    @property
    def num_parameters(self) -> int:
        """Parameters of its distinct layers."""
        return sum({layer.id: layer.num_parameters for _, layer in self.layers}.values())


def path_id(
    *,
    task: str | None,
    layers: Sequence[Sequence[str]],
    hyperparameters: Mapping[str, Any],
    parent_id: str | None,
    quality: float | None,
) -> str:
    """Returns the id of a path: 32 hex digits of SHA-256 over all that it is, as JSON values; layers as pairs of position and id."""
    content = [task, layers, hyperparameters, parent_id, quality]
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


def ordered_positions(num_blocks: int, adapter_blocks: Iterable[int], *, with_head: bool = True) -> tuple[Position, ...]:
    """Returns the positions of a path with so many blocks and adapters before these, in order."""
    adapters = frozenset(adapter_blocks)
    positions = [PATCH_EMBED, CLASS_TOKEN, POS_EMBED]
    for block in range(num_blocks):
        if block in adapters:
            positions.append(adapter_position(block))
        positions.append(block_position(block))
    positions.append(NORM)
    if with_head:
        positions.append(HEAD)
    return tuple(positions)


def check_layers(layers: tuple[PlacedLayer, ...], *, with_head: bool) -> None:
    """Checks that layers make a path.

    Raises:
        ValueError: a layer is missing, out of order or of another kind than its position, an adapter has no block, adapters differ
            in width, or widths do not chain.
    """
    blocks = sum(position.kind is LayerKind.BLOCK for position, _ in layers)
    adapters = [p.block for p, _ in layers if p.kind is LayerKind.ADAPTER and p.block is not None]
    expected = ordered_positions(blocks, adapters, with_head=with_head)
    found = tuple(position for position, _ in layers)
    if blocks < 1 or found != expected:
        raise ValueError(
            f"found layers at {[str(p) for p in found]}, expected {[str(p) for p in expected]} and at least one block"
        )
    for position, layer in layers:
        if layer.kind is not position.kind:
            raise ValueError(f"found a {layer.kind} at {position}")
    widths = {layer.spec.config.get("width") for _, layer in layers}
    if len(widths) > 1:
        raise ValueError(f"found layers of widths {sorted(map(str, widths))} in one path, expected one width")
    adapter_widths = {layer.spec.integer("adapter_width") for _, layer in layers if layer.kind is LayerKind.ADAPTER}
    if len(adapter_widths) > 1:
        raise ValueError(f"found adapters of widths {sorted(adapter_widths)} in one path, expected one width")
