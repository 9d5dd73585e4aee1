"""A tiny root of random weights, a task that is easy to learn, and plans of generations for both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from evolve.adapter import initial_tensors
from evolve.data.task import ImageSet, TaskData
from evolve.generation import ChildPlan, ChildResult, GenerationPlan, TrainingLength, plan_root_child
from evolve.hyperparameters import Hyperparameters
from evolve.layer import (
    CLASS_TOKEN,
    HEAD,
    NORM,
    PATCH_EMBED,
    POS_EMBED,
    Layer,
    LayerKind,
    LayerSpec,
    Position,
    Tensors,
    adapter_position,
    block_position,
)
from evolve.path import Path, PlacedLayer
from evolve.position_embedding import position_embedding_spec

WIDTH, PATCH_SIZE, IMAGE_SIZE, NUM_BLOCKS, NUM_CLASSES = 16, 8, 16, 2, 3

PLAIN = Hyperparameters(num_blocks=NUM_BLOCKS, image_size=IMAGE_SIZE, crop_area_min=1.0, flip=False, adapter_width=8)
"""Nothing augmented."""


class TinyRoot:
    """Layers of a root in memory.

    Attributes:
        layers: by position.
        stored: weights by layer id.
    """

    def __init__(self) -> None:
        random = np.random.default_rng(0)

        def noise(*shape: int) -> Any:
            return (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

        def norm(prefix: str = "") -> dict[str, Any]:
            return {f"{prefix}weight": np.ones(WIDTH, np.float32), f"{prefix}bias": np.zeros(WIDTH, np.float32)}

        def linear(prefix: str, width_in: int, width_out: int) -> dict[str, Any]:
            return {f"{prefix}.weight": noise(width_out, width_in), f"{prefix}.bias": np.zeros(width_out, np.float32)}

        grid = IMAGE_SIZE // PATCH_SIZE
        block_spec = LayerSpec.of(
            LayerKind.BLOCK,
            width=WIDTH, heads=2, mlp_width=32, eps=1e-6, qkv_bias=True, layer_scale=False, activation="gelu",
        )  # fmt: skip
        described: dict[Position, tuple[LayerSpec, Tensors]] = {
            PATCH_EMBED: (
                LayerSpec.of(LayerKind.PATCH_EMBED, width=WIDTH, patch_size=PATCH_SIZE, channels=3, bias=True),
                {"proj.weight": noise(WIDTH, 3, PATCH_SIZE, PATCH_SIZE) / 4, "proj.bias": np.zeros(WIDTH, np.float32)},
            ),
            CLASS_TOKEN: (LayerSpec.of(LayerKind.CLASS_TOKEN, width=WIDTH), {"weight": noise(WIDTH)}),
            POS_EMBED: (position_embedding_spec(WIDTH, grid, grid), {"weight": noise(1 + grid * grid, WIDTH)}),
            NORM: (LayerSpec.of(LayerKind.NORM, width=WIDTH, eps=1e-6), norm()),
        }
        for index in range(NUM_BLOCKS):
            described[block_position(index)] = (
                block_spec,
                {
                    **norm("norm1."),
                    **linear("attn.qkv", WIDTH, 3 * WIDTH),
                    **linear("attn.proj", WIDTH, WIDTH),
                    **norm("norm2."),
                    **linear("mlp.fc1", WIDTH, 32),
                    **linear("mlp.fc2", 32, WIDTH),
                },
            )
        self.layers = {position: Layer.of(*layer) for position, layer in described.items()}
        self.stored: dict[str, Tensors] = {self.layers[position].id: tensors for position, (_, tensors) in described.items()}

    def child(
        self,
        index: int = 0,
        trainable: Callable[[Position], bool] = lambda position: position == HEAD,
        adapters: Sequence[int] = (),
        hyperparameters: Hyperparameters = PLAIN,
        seed: int = 5,
    ) -> ChildPlan:
        """Plans a child of the root; its head and adapters are new."""
        return plan_root_child(
            self.layers.__getitem__,
            hyperparameters,
            num_classes=NUM_CLASSES,
            trains=trainable,
            adapters=adapters,
            parent_id="root",
            index=index,
            seed=seed,
        )

    def path(self, child: ChildPlan, result: ChildResult) -> tuple[Path, Mapping[str, Tensors]]:
        """Returns the path that a trained child is, and the weights of all its layers."""
        stored = dict(self.stored)
        placed = []
        for plan in child.layers:
            if plan.position in result.trained:
                layer = Layer.of(plan.spec, result.trained[plan.position])
                stored[layer.id] = result.trained[plan.position]
            else:
                layer = self.layers[plan.position]
            placed.append(PlacedLayer(plan.position, layer))
        path = Path.of(
            task="easy", layers=placed, hyperparameters=child.hyperparameters, parent_id="root", quality=result.quality
        )
        return path, stored


def new_adapter(child: ChildPlan, block: int) -> Tensors:
    """Returns the weights that a child's new adapter starts with."""
    spec = next(layer.spec for layer in child.layers if layer.position == adapter_position(block))
    return initial_tensors(spec, [child.seed, block])


def generation(
    *children: ChildPlan, batch_size: int = 16, intervals: int = 2, batches: int = 5, data_seed: int = 9
) -> GenerationPlan:
    """Plans a generation of these children."""
    return GenerationPlan("easy", 0, 0, data_seed, TrainingLength(batch_size, intervals, batches, 10), children)


def easy_data(num_train: int = 90, num_test: int = 30) -> TaskData:
    """Makes a task of three classes, each with one colour that is brightest."""

    def images(count: int, seed: int) -> ImageSet:
        random = np.random.default_rng(seed)
        labels = random.permutation(count) % NUM_CLASSES
        pixels = random.integers(0, 120, (count, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
        for image, label in zip(pixels, labels, strict=True):
            image[..., label] += 130
        return ImageSet(list(pixels), labels.astype(np.int64), [str(index) for index in range(count)])

    return TaskData(
        "easy", ("red", "green", "blue"), images(num_train, 1), images(24, 2), images(num_test, 3) if num_test else None
    )
