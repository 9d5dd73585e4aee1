"""Vision Transformers of random weights as a published system, and each task's whole model as one ONNX file beside it.

What a model answers is of no interest here, how long it takes is; so no pretrained weights are needed.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from unittest import mock

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

from benchmarks.published import Architecture, Own, Published, make_current
from benchmarks.published import System as Wanted
from evolve.adapter import initial_tensors
from evolve.documents import TaskRecord
from evolve.export.onnx import export_segment
from evolve.export.publish import export_system
from evolve.export.segments import segment_of, units_of
from evolve.export.settings import ExportSettings
from evolve.flops import forward_flops
from evolve.hyperparameters import Hyperparameters
from evolve.layer import HEAD, NORM, Layer, LayerKind, LayerSpec, Position, Tensors, block_position
from evolve.path import Path, PlacedLayer, ordered_positions
from evolve.specs import adapter_spec, head_spec
from evolve.store import System
from evolve.timm_models import decompose

NUM_CLASSES = 100


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


def publish(folder: pathlib.Path, wanted: Wanted) -> Published:
    """Builds a system of random weights and publishes all its generations with the real exporter.

    Routes are not compared with torch, which would take minutes: whoever measures compares both sides, and servers rehearse golden answers.

    Args:
        folder: for everything; made here.
        wanted: what to publish.
    """
    system = build(folder, wanted.architecture, {})
    repository = folder / "repository"
    with (
        mock.patch("evolve.export.publish._Publisher._check_routes"),
        mock.patch("evolve.export.publish.NUM_GOLDEN_IMAGES", wanted.golden_images),
        mock.patch("evolve.export.repository.KEPT_GENERATIONS", len(wanted.generations)),
    ):
        for number, tasks in enumerate(wanted.generations):
            add_tasks(system, tasks, number)
            export_system(system, repository)
    make_current(repository, 1)
    paths = {name: system.path(record.path_id) for name, record in system.tasks().items()}
    whole = {}
    if wanted.whole:
        (folder / "whole").mkdir()
        for name, path in paths.items():
            whole[name] = folder / "whole" / f"{name}.onnx"
            segment = segment_of(units_of(path), ExportSettings())
            whole[name].write_bytes(export_segment(segment, system.tensors, ExportSettings()))
    return Published(repository, whole, _shared_share(list(paths.values())), wanted.architecture.image_size)


def build(folder: pathlib.Path, architecture: Architecture, tasks: Mapping[str, Own]) -> System:
    """Builds a system of random weights.

    Args:
        folder: for everything; made here, the system within it.
        architecture: of the root.
        tasks: what each task has of its own.
    """
    system = System.create(folder / "system", random_layers(architecture), architecture.image_size)
    add_tasks(system, tasks)
    return system


def add_tasks(system: System, tasks: Mapping[str, Own], seed: int = 0) -> None:
    """Adds tasks to a system, or gives tasks it has another path.

    Args:
        system: whose.
        tasks: what each has of its own.
        seed: of these weights; another one gives others.
    """
    known = len(system.tasks())
    for index, (name, own) in enumerate(tasks.items()):
        record = system.task(name)
        _add_task(system, name, record.order if record is not None else known + index, own, seed)


def _add_task(system: System, name: str, order: int, own: Own, seed: int) -> None:
    random = np.random.default_rng([order, seed])
    root = dict(system.root.layers)
    width, size = root[NORM].spec.integer("width"), system.root.hyperparameters.image_size
    hyperparameters = Hyperparameters(num_blocks=system.root.num_blocks, image_size=size)
    private = {block_position(block) for block in own.blocks} | {NORM}

    def layer_at(position: Position) -> Layer:
        if position == HEAD:
            spec = head_spec(width, NUM_CLASSES)
            tensors = {"weight": np.zeros((NUM_CLASSES, width), np.float32), "bias": np.zeros(NUM_CLASSES, np.float32)}
        elif position.kind is LayerKind.ADAPTER:
            spec = adapter_spec(width, hyperparameters.adapter_width)
            tensors = initial_tensors(spec, 0)
        else:
            layer = root[position]
            if position not in private:
                return layer
            spec, tensors = layer.spec, system.tensors(layer.id)
        noisy = {
            tensor: values + 0.02 * random.standard_normal(values.shape, dtype=np.float32) for tensor, values in tensors.items()
        }
        return system.put_layer(spec, noisy)

    positions = ordered_positions(system.root.num_blocks, own.adapters)
    path = Path.of(
        task=name,
        layers=[PlacedLayer(position, layer_at(position)) for position in positions],
        hyperparameters=hyperparameters,
        parent_id=system.root.id,
        quality=0.0,
    )
    system.put_path(path)
    # Of the task alone: golden images that stay cost no reload anything.
    images = np.random.default_rng(order).integers(0, 256, (4, size, size, 3), dtype=np.uint8)
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
