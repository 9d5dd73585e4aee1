"""A trainer without torch: whole searches in milliseconds, with qualities that a function of the plan decides."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from evolve.generation import ChildPlan, ChildResult, Examples, GenerationPlan, PackResult
from evolve.layer import CLASS_TOKEN, NORM, PATCH_EMBED, POS_EMBED, Layer, LayerKind, LayerSpec, Position, Tensors, block_position
from evolve.path import Path
from evolve.position_embedding import position_embedding_spec

WIDTH = 4


def tiny_root(num_blocks: int = 3, grid: int = 2, patch_size: int = 16) -> dict[Position, tuple[LayerSpec, Tensors]]:
    """Layers of a root whose weights stand for nothing but themselves."""
    generator = np.random.default_rng(0)

    def weights(*shape: int) -> Tensors:
        return {"weight": generator.normal(size=shape).astype(np.float32)}

    layers: dict[Position, tuple[LayerSpec, Tensors]] = {
        PATCH_EMBED: (LayerSpec.of(LayerKind.PATCH_EMBED, width=WIDTH, patch_size=patch_size, channels=3), weights(6)),
        CLASS_TOKEN: (LayerSpec.of(LayerKind.CLASS_TOKEN, width=WIDTH), weights(WIDTH)),
        POS_EMBED: (position_embedding_spec(WIDTH, grid, grid), weights(1 + grid * grid, WIDTH)),
    }
    for block in range(num_blocks):
        layers[block_position(block)] = (LayerSpec.of(LayerKind.BLOCK, width=WIDTH, heads=1), weights(10))
    layers[NORM] = (LayerSpec.of(LayerKind.NORM, width=WIDTH), weights(WIDTH))
    return layers


def hash_quality(plan: GenerationPlan, child: ChildPlan) -> float:
    """A quality that looks random and depends on nothing but the child."""
    digest = hashlib.sha256(f"{plan.task}/{plan.data_seed}/{child.seed}/{child.hyperparameters}".encode()).digest()
    return digest[0] / 256


class FakeTrainer:
    """Answers every plan at once.

    Attributes:
        plans: every generation received.
        examined: every path examined.
    """

    def __init__(
        self,
        quality: Callable[[GenerationPlan, ChildPlan], float] = hash_quality,
        packs: Callable[[Sequence[ChildPlan]], Sequence[Sequence[ChildPlan]]] = lambda children: [[c] for c in children],
        test_accuracy: float | None = 0.5,
    ) -> None:
        self.quality = quality
        self.packs = packs
        self.test_accuracy = test_accuracy
        self.plans: list[GenerationPlan] = []
        self.examined: list[Path] = []

    def train(self, plan: GenerationPlan) -> Iterator[PackResult]:
        self.plans.append(plan)
        for pack in self.packs(plan.children):
            yield PackResult(tuple(self._result(plan, child) for child in pack))

    def examine(self, path: Path) -> Examples:
        self.examined.append(path)
        size = path.hyperparameters.image_size
        return Examples(self.test_accuracy, np.zeros((2, size, size, 3), dtype=np.uint8))

    def _result(self, plan: GenerationPlan, child: ChildPlan) -> ChildResult:
        quality = self.quality(plan, child)
        trained = {
            layer.position: _weights(layer.spec, f"{child.seed}/{layer.position}") for layer in child.layers if layer.trainable
        }
        return ChildResult(child.index, (quality / 2, quality), 1, trained, 10, 1e3, 0.0, 0.0)


def _weights(spec: LayerSpec, name: str) -> Tensors:
    if spec.kind is LayerKind.HEAD:
        shape: tuple[int, ...] = (spec.integer("width") + 1, spec.integer("classes"))
    elif spec.kind is LayerKind.ADAPTER:
        shape = (spec.integer("width"), spec.integer("adapter_width"))
    elif spec.kind is LayerKind.POS_EMBED:
        shape = (1 + spec.integer("grid_height") * spec.integer("grid_width"), spec.integer("width"))
    else:
        shape = (5,)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return {"weight": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


class QuietObserver:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.opened: list[tuple[str, int, list[str], int, int]] = []
        self.generations: list[GenerationPlan] = []
        self.children: list[dict[str, object]] = []
        self.closed: list[str] = []

    def search_opened(self, task: str, round_number: int, seeds: Sequence[Path], num_children: int, reused: int) -> None:
        self.opened.append((task, round_number, [seed.id for seed in seeds], num_children, reused))

    def generation_planned(self, plan: GenerationPlan) -> None:
        self.generations.append(plan)

    def child_finished(self, plan: ChildPlan, record: dict[str, object]) -> None:
        self.children.append(record)

    def search_closed(self, task: str, path: Path, record: object) -> None:
        self.closed.append(path.id)


def trained_layers(path: Path, root: Path) -> list[Layer]:
    """Layers of a path that the root does not have."""
    return [layer for _, layer in path.layers if layer.id not in root.layer_ids]
