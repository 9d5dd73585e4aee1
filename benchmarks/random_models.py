"""Vision Transformers of random weights as a published system, and each task's whole model as one ONNX file beside it.

What a model answers is of no interest here, how long it takes is; so no pretrained weights are needed.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from benchmarks.published import Published
from evolve.documents import TaskRecord
from evolve.export.onnx import export_segment
from evolve.export.publish import export_system
from evolve.export.segments import segment_of, units_of
from evolve.export.settings import ExportSettings
from evolve.flops import forward_flops
from evolve.hyperparameters import Hyperparameters
from evolve.layer import HEAD, NORM, Layer, LayerSpec, Position, Tensors, block_position
from evolve.path import Path, PlacedLayer, ordered_positions
from evolve.specs import head_spec
from evolve.store import System
from evolve.timm_models import decompose

NUM_CLASSES = 100


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A Vision Transformer.

    Attributes:
        name: for people.
        width: of the hidden states.
        heads: of each block's attention.
        blocks: how many.
        patch_size: in pixels.
        image_size: in pixels.
    """

    name: str
    width: int
    heads: int
    blocks: int
    patch_size: int
    image_size: int


SMALL = Architecture("ViT-S/16 at 224 px", 384, 6, 12, 16, 224)
CHARACTERS = Architecture("the bundled root: ViT-Ti/16, 3 blocks, 32 px", 192, 3, 3, 16, 32)
TINY = Architecture("ViT-Ti/16 at 224 px", 192, 3, 12, 16, 224)
SMOKE = Architecture("smoke: width 16, 3 blocks, 16 px", 16, 2, 3, 8, 16)


def random_layers(architecture: Architecture) -> dict[Position, tuple[LayerSpec, Tensors]]:
    """Returns the layers of a root of random weights by position, the same each time."""
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=architecture.image_size,
        patch_size=architecture.patch_size,
        embed_dim=architecture.width,
        depth=architecture.blocks,
        num_heads=architecture.heads,
        num_classes=0,
    )
    return dict(decompose(vit, architecture.image_size))


def publish(folder: pathlib.Path, architecture: Architecture, tasks: Mapping[str, Sequence[int]]) -> Published:
    """Builds a system of random weights and exports it with the real exporter; see `build` for what it takes."""
    system = build(folder, architecture, tasks)
    export_system(system, folder / "repository")
    (folder / "whole").mkdir(parents=True)
    paths = {name: system.path(record.path_id) for name, record in system.tasks().items()}
    whole = {}
    for name, path in paths.items():
        whole[name] = folder / "whole" / f"{name}.onnx"
        segment = segment_of(units_of(path), ExportSettings())
        whole[name].write_bytes(export_segment(segment, system.tensors, ExportSettings()))
    return Published(folder / "repository", whole, _shared_share(list(paths.values())), architecture.image_size)


def build(folder: pathlib.Path, architecture: Architecture, tasks: Mapping[str, Sequence[int]]) -> System:
    """Builds a system of random weights.

    Args:
        folder: for everything; made here, the system within it.
        architecture: of the root.
        tasks: for each task, the blocks of its own; final norm and head are always its own, all else is the root's.
    """
    system = System.create(folder / "system", random_layers(architecture), architecture.image_size)
    for order, (name, own_blocks) in enumerate(tasks.items()):
        _add_task(system, name, order, {block_position(block) for block in own_blocks} | {NORM})
    return system


def _add_task(system: System, name: str, order: int, own: set[Position]) -> None:
    random = np.random.default_rng(order)
    layers = dict(system.root.layers)

    def layer_at(position: Position) -> Layer:
        if position == HEAD:
            width = layers[NORM].spec.integer("width")
            weight = 0.02 * random.standard_normal((NUM_CLASSES, width), dtype=np.float32)
            return system.put_layer(head_spec(width, NUM_CLASSES), {"weight": weight, "bias": np.zeros(NUM_CLASSES, np.float32)})
        layer = layers[position]
        if position not in own:
            return layer
        noisy = {
            tensor: values + 0.01 * random.standard_normal(values.shape, dtype=np.float32)
            for tensor, values in system.tensors(layer.id).items()
        }
        return system.put_layer(layer.spec, noisy)

    size = system.root.hyperparameters.image_size
    path = Path.of(
        task=name,
        layers=[PlacedLayer(position, layer_at(position)) for position in ordered_positions(system.root.num_blocks, ())],
        hyperparameters=Hyperparameters(num_blocks=system.root.num_blocks, image_size=size),
        parent_id=system.root.id,
        quality=0.0,
    )
    system.put_path(path)
    images = random.integers(0, 256, (4, size, size, 3), dtype=np.uint8)
    system.put_task(
        TaskRecord(
            name=name,
            path_id=path.id,
            parent_id=system.root.id,
            num_children=0,
            rounds=1,
            order=order,
            private=False,
            labels=tuple(f"class {number}" for number in range(NUM_CLASSES)),
            quality=0.0,
            test_accuracy=None,
            examples=system.put_examples(images),
            data_fingerprint="0" * 32,
            settings={},
        )
    )


def _shared_share(paths: Sequence[Path]) -> float:
    common = frozenset.intersection(*(path.layer_ids for path in paths))
    specs = [layer.spec for _, layer in paths[0].layers]
    size = paths[0].hyperparameters.image_size
    shared = [layer.spec for _, layer in paths[0].layers if layer.id in common]
    return forward_flops(shared, size) / forward_flops(specs, size)
