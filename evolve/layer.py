"""Layers: the smallest units with weights, shared, cloned and counted each on its own, and named by their content."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Tensors = Mapping[str, npt.NDArray[Any]]
"""A layer's weights by name. Shapes and names are those that evolve.vit and evolve.adapter state for each kind."""

Value = int | float | bool | str
"""What a layer's configuration may hold."""


class LayerKind(enum.StrEnum):
    """What a layer is; the order is the order along a path, with each adapter before its block."""

    PATCH_EMBED = "patch_embed"
    CLASS_TOKEN = "class_token"
    POS_EMBED = "pos_embed"
    ADAPTER = "adapter"
    BLOCK = "block"
    NORM = "norm"
    HEAD = "head"


@dataclasses.dataclass(frozen=True)
class Position:
    """Where in a path a layer stands.

    Attributes:
        kind: what stands there.
        block: index of the block, counted from 0, for a block or the adapter before it; else None.
    """

    kind: LayerKind
    block: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError unless exactly blocks and adapters have an index."""
        if (self.block is not None) != (self.kind in (LayerKind.BLOCK, LayerKind.ADAPTER)):
            raise ValueError(f"position {self.kind} with block index {self.block!r}: only blocks and adapters have one")

    def __str__(self) -> str:
        return self.kind.value if self.block is None else f"{self.kind.value}.{self.block}"

    @staticmethod
    def parse(text: str) -> Position:
        """Returns the position that `str` writes this way.

        Raises:
            ValueError: not such a text.
        """
        kind, _, block = text.partition(".")
        return Position(LayerKind(kind), int(block) if block else None)


PATCH_EMBED = Position(LayerKind.PATCH_EMBED)
CLASS_TOKEN = Position(LayerKind.CLASS_TOKEN)
POS_EMBED = Position(LayerKind.POS_EMBED)
NORM = Position(LayerKind.NORM)
HEAD = Position(LayerKind.HEAD)


@functools.cache
def block_position(index: int) -> Position:
    """Returns the position of block `index`, counted from 0."""
    return Position(LayerKind.BLOCK, index)


@functools.cache
def adapter_position(index: int) -> Position:
    """Returns the position of the adapter before block `index`."""
    return Position(LayerKind.ADAPTER, index)


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """Kind and configuration: two layers with equal specs have weights of equal names and shapes and compute alike.

    Attributes:
        kind: what it is.
        items: the configuration (widths, heads, eps ...) as pairs in ascending order of name.
    """

    kind: LayerKind
    items: tuple[tuple[str, Value], ...]

    @staticmethod
    def of(kind: LayerKind, **config: Value) -> LayerSpec:
        """Returns the spec with this configuration."""
        return LayerSpec(kind, tuple(sorted(config.items())))

    @property
    def config(self) -> dict[str, Value]:
        """The configuration by name."""
        return dict(self.items)

    def integer(self, name: str) -> int:
        """Returns an integer of the configuration.

        Raises:
            KeyError: it has none of that name.
        """
        return int(self.config[name])


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer with weights. Immutable; two with the same id have the same bytes.

    Attributes:
        id: 32 hex digits of a hash over kind, configuration and tensors.
        spec: kind and configuration.
        num_parameters: number of scalars in its tensors.
    """

    id: str
    spec: LayerSpec
    num_parameters: int

    @property
    def kind(self) -> LayerKind:
        """What it is."""
        return self.spec.kind

    @staticmethod
    def of(spec: LayerSpec, tensors: Tensors) -> Layer:
        """Returns the layer that these tensors make."""
        return Layer(layer_id(spec, tensors), spec, sum(int(tensor.size) for tensor in tensors.values()))


def layer_id(spec: LayerSpec, tensors: Tensors) -> str:
    """Returns the id of a layer: 32 hex digits of SHA-256 over its kind, configuration and tensors."""
    digest = hashlib.sha256(json.dumps([spec.kind.value, spec.config], sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(json.dumps([name, tensor.dtype.str, list(tensor.shape)]).encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()[:32]
