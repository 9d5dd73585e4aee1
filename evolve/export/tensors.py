"""What goes into and comes out of a segment: names, types and shapes, as ONNX, Triton and the generation state them. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from evolve.export.segments import Segment, Unit
from evolve.export.settings import ExportSettings, Precision
from evolve.layer import LayerKind
from munet.v1 import generation_pb2

BATCH = "batch"
TOKENS = "tokens"
"""Names of the axes of any size."""

_DATA_TYPES = {
    np.dtype(np.uint8): generation_pb2.DATA_TYPE_UINT8,
    np.dtype(np.float32): generation_pb2.DATA_TYPE_FLOAT32,
    np.dtype(np.float16): generation_pb2.DATA_TYPE_FLOAT16,
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A segment's input or output.

    Attributes:
        name: `image`, `hidden`, `next_hidden` or `logits`.
        data_type: uint8, float32 or float16.
        shape: without the batch; None where any number of tokens goes.
    """

    name: str
    data_type: np.dtype[Any]
    shape: tuple[int | None, ...]

    def to_proto(self) -> generation_pb2.TensorSpec:
        """Returns it as a generation states it."""
        shape = [-1 if size is None else size for size in self.shape]
        return generation_pb2.TensorSpec(name=self.name, data_type=_DATA_TYPES[self.data_type], shape=shape)


def input_of(units: Sequence[Unit], precision: Precision) -> Tensor:
    """Returns what a run of units takes: the image if it starts with a stem, else hidden states of any number of tokens."""
    first = units[0]
    if not first.is_stem:
        return Tensor("hidden", np.dtype(precision), (None, first.layers[0].spec.integer("width")))
    patch_size = first.layers[0].spec.integer("patch_size")
    rows, columns = _grid(first)
    return Tensor("image", np.dtype(np.uint8), (rows * patch_size, columns * patch_size, 3))


def output_of(units: Sequence[Unit], precision: Precision) -> Tensor:
    """Returns what a run of units gives: the logits if it ends with a head, else hidden states.

    The number of tokens is fixed behind a stem: ONNX Runtime finds it out, and Triton wants the configuration to say the same.
    """
    last = units[-1].layers[-1].spec
    if units[-1].is_head:
        return Tensor("logits", np.dtype(np.float32), (last.integer("classes"),))
    tokens = None
    if units[0].is_stem:
        rows, columns = _grid(units[0])
        tokens = 1 + rows * columns
    return Tensor("next_hidden", np.dtype(precision), (tokens, last.integer("width")))


def segment_to_proto(segment: Segment, settings: ExportSettings) -> generation_pb2.Segment:
    """Returns a segment as a generation states it."""
    return generation_pb2.Segment(
        name=segment.name,
        units=[generation_pb2.Unit(layer_ids=unit.layer_ids) for unit in segment.units],
        input=input_of(segment.units, settings.precision).to_proto(),
        output=output_of(segment.units, settings.precision).to_proto(),
        max_batch_size=settings.max_batch_size,
        num_parameters=segment.num_parameters,
    )


def _grid(stem: Unit) -> tuple[int, int]:
    """Returns rows and columns of patches that a stem's position embedding is for."""
    embedding = next(layer.spec for layer in stem.layers if layer.kind is LayerKind.POS_EMBED)
    return embedding.integer("grid_height"), embedding.integer("grid_width")
