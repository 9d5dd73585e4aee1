"""A tiny system on disk, made of random weights: every way in which paths leave and rejoin what they share, without any search."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

import numpy as np

from evolve.documents import TaskRecord
from evolve.hyperparameters import Hyperparameters
from evolve.layer import (
    HEAD,
    PATCH_EMBED,
    POS_EMBED,
    Layer,
    LayerKind,
    LayerSpec,
    Position,
    Tensors,
    block_position,
)
from evolve.path import Path, PlacedLayer, ordered_positions
from evolve.position_embedding import position_embedding_spec
from evolve.specs import adapter_spec, head_spec
from evolve.store import System

WIDTH = 16
PATCH_SIZE = 8
IMAGE_SIZE = 16
NUM_BLOCKS = 3
ADAPTER_WIDTH = 8


@dataclasses.dataclass(frozen=True)
class TaskSketch:
    """What a task's path has of its own; all else is the root's.

    Attributes:
        classes: number of classes.
        cloned: positions of layers of its own.
        adapters: indices of blocks with an adapter before them.
        blocks: number of blocks.
        image_size: height and width of its images, in pixels.
    """

    classes: int = 3
    cloned: tuple[Position, ...] = ()
    adapters: tuple[int, ...] = ()
    blocks: int = NUM_BLOCKS
    image_size: int = IMAGE_SIZE


SKETCHES: Mapping[str, TaskSketch] = {
    "plain": TaskSketch(classes=3),
    "cloned": TaskSketch(classes=4, cloned=(block_position(1),)),
    "adapted": TaskSketch(classes=5, adapters=(1,)),
    "short": TaskSketch(classes=3, blocks=2),
    "large": TaskSketch(classes=3, image_size=24),
}
"""Head only; a cloned block in the middle; an adapter; fewer blocks; another image size."""


def build_system(
    folder: pathlib.Path, sketches: Mapping[str, TaskSketch] = SKETCHES, *, width: int = WIDTH, heads: int = 2
) -> System:
    """Makes a system with these tasks in a new folder; the same weights and images every time."""
    random = np.random.default_rng(0)
    specs = root_specs(width, heads)
    layers = {position: (spec, random_tensors(spec, random)) for position, spec in specs.items()}
    system = System.create(folder, layers, IMAGE_SIZE, {"source": "test"})
    for name, sketch in sketches.items():
        add_task(system, name, sketch)
    return system


def root_specs(width: int = WIDTH, heads: int = 2) -> dict[Position, LayerSpec]:
    """Returns the specs of a root's layers by position."""
    block = LayerSpec.of(
        LayerKind.BLOCK,
        width=width,
        heads=heads,
        mlp_width=2 * width,
        activation="gelu",
        qkv_bias=True,
        layer_scale=False,
        eps=1e-6,
    )
    grid = IMAGE_SIZE // PATCH_SIZE
    by_kind = {
        LayerKind.PATCH_EMBED: LayerSpec.of(LayerKind.PATCH_EMBED, width=width, patch_size=PATCH_SIZE, channels=3, bias=True),
        LayerKind.CLASS_TOKEN: LayerSpec.of(LayerKind.CLASS_TOKEN, width=width),
        LayerKind.POS_EMBED: position_embedding_spec(width, grid, grid),
        LayerKind.BLOCK: block,
        LayerKind.NORM: LayerSpec.of(LayerKind.NORM, width=width, eps=1e-6),
    }
    return {position: by_kind[position.kind] for position in ordered_positions(NUM_BLOCKS, (), with_head=False)}


def tensor_shapes(spec: LayerSpec) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a layer's tensors by name."""
    width = spec.integer("width")
    if spec.kind is LayerKind.PATCH_EMBED:
        patch = spec.integer("patch_size")
        return {"proj.weight": (width, 3, patch, patch), "proj.bias": (width,)}
    if spec.kind is LayerKind.CLASS_TOKEN:
        return {"weight": (width,)}
    if spec.kind is LayerKind.POS_EMBED:
        return {"weight": (1 + spec.integer("grid_height") * spec.integer("grid_width"), width)}
    if spec.kind is LayerKind.NORM:
        return {"weight": (width,), "bias": (width,)}
    if spec.kind is LayerKind.HEAD:
        return {"weight": (spec.integer("classes"), width), "bias": (spec.integer("classes"),)}
    hidden = spec.integer("adapter_width" if spec.kind is LayerKind.ADAPTER else "mlp_width")
    if spec.kind is LayerKind.ADAPTER:
        linears = {"down": (hidden, width), "up": (width, hidden)}
        norms = ("norm",)
    else:
        linears = {
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (hidden, width),
            "mlp.fc2": (width, hidden),
        }
        norms = ("norm1", "norm2")
    shapes: dict[str, tuple[int, ...]] = {}
    for name in norms:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    for name, (rows, columns) in linears.items():
        shapes |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    return shapes


_STRENGTH = {LayerKind.CLASS_TOKEN: 0.1, LayerKind.POS_EMBED: 0.3, LayerKind.PATCH_EMBED: 2, LayerKind.HEAD: 2}
"""So that what is in an image, more than where, moves the logits."""


def random_tensors(spec: LayerSpec, random: np.random.Generator) -> Tensors:
    """Draws a layer's weights: scales of norms around one, matrices so that hidden states keep their size."""
    tensors = {}
    for name, shape in tensor_shapes(spec).items():
        draw = random.standard_normal(shape) / np.sqrt(np.prod(shape[1:], dtype=float))
        draw *= _STRENGTH.get(spec.kind, 1) if "weight" in name else 0.1
        is_scale = "norm" in f"{spec.kind}.{name}" and name.endswith("weight")
        tensors[name] = (1 + 0.1 * draw if is_scale else draw).astype(np.float32)
    return tensors


def add_task(system: System, name: str, sketch: TaskSketch) -> TaskRecord:
    """Adds a task, or gives one a new path; its weights and images are drawn by its name."""
    random = np.random.default_rng(list(name.encode()))
    path = path_of(system, name, sketch, random)
    system.put_path(path)
    images = random.integers(0, 256, (6, sketch.image_size, sketch.image_size, 3), dtype=np.uint8)
    order = 1 + max((record.order for record in system.tasks().values()), default=0)
    record = TaskRecord(
        name=name,
        path_id=path.id,
        parent_id=system.root.id,
        num_children=0,
        rounds=1,
        order=order,
        private=False,
        labels=tuple(f"{name} {number}" for number in range(sketch.classes)),
        quality=0.5,
        test_accuracy=0.25 if order % 2 else None,
        examples=system.put_examples(images),
        data_fingerprint="0" * 32,
        settings={},
    )
    system.put_task(record)
    return record


def path_of(system: System, name: str, sketch: TaskSketch, random: np.random.Generator) -> Path:
    """Returns a task's path; the layers of its own are written to the system."""
    width = system.root.layer(PATCH_EMBED).spec.integer("width")
    inherited = {position: layer for position, layer in system.root.layers if position.kind is not LayerKind.POS_EMBED}
    inherited[POS_EMBED] = system.position_embedding(sketch.image_size // PATCH_SIZE)

    def layer_at(position: Position) -> Layer:
        if position == HEAD:
            spec = head_spec(width, sketch.classes)
        elif position.kind is LayerKind.ADAPTER:
            spec = adapter_spec(width, ADAPTER_WIDTH)
        elif position in sketch.cloned:
            spec = inherited[position].spec
        else:
            return inherited[position]
        return system.put_layer(spec, random_tensors(spec, random))

    positions = ordered_positions(sketch.blocks, sketch.adapters)
    return Path.of(
        task=name,
        layers=[PlacedLayer(position, layer_at(position)) for position in positions],
        hyperparameters=Hyperparameters(num_blocks=sketch.blocks, image_size=sketch.image_size, adapter_width=ADAPTER_WIDTH),
        parent_id=system.root.id,
        quality=0.5,
    )
