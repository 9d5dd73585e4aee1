"""A trainer without torch: whole searches in milliseconds, with qualities that a function of the plan decides."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from evolve.generation import ChildPlan, ChildResult, Examples, GenerationPlan, PackResult
from evolve.layer import CLASS_TOKEN, HEAD, NORM, PATCH_EMBED, POS_EMBED, LayerKind, LayerSpec, Position, Tensors, block_position
from evolve.path import Path, PlacedLayer, ordered_positions
from evolve.position_embedding import position_embedding_spec
from evolve.specs import adapter_spec, head_spec
from evolve.store import System

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
    """A quality that looks random and, like real training, follows from the child's plan and the generation's batches."""
    return hashlib.sha256(_training_of(plan, child).encode()).digest()[0] / 256


def _training_of(plan: GenerationPlan, child: ChildPlan) -> str:
    """What decides the outcome: two children alike in all of this train alike. The seed matters to new layers alone."""
    layers = [
        (str(layer.position), layer.origin.value, layer.source.id if layer.source else child.seed) for layer in child.layers
    ]
    return f"{plan.task}/{plan.data_seed}/{child.hyperparameters}/{layers}"


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
        self.versions = {"device": "none"}
        self.plans: list[GenerationPlan] = []
        self.examined: list[Path] = []

    @property
    def identity(self) -> dict[str, str]:
        return self.versions

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
        training = _training_of(plan, child)
        trained = {
            layer.position: _weights(layer.spec, f"{training}/{layer.position}") for layer in child.layers if layer.trainable
        }
        return ChildResult(child.index, (quality / 3, quality, quality / 2), 1, trained, 10, 1e3, 2.0, 1.0)


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


def derive_path(system: System, parent: Path, task: str, own: Mapping[Position, float], **changes) -> Path:
    """A path that has layers of its own at some positions; the number tells their weights apart."""
    hyperparameters = parent.hyperparameters.replace(**changes)
    adapters = {p.block for p in own if p.kind is LayerKind.ADAPTER} | {
        b for b in parent.adapter_blocks if b < hyperparameters.num_blocks
    }
    placed = []
    for position in ordered_positions(hyperparameters.num_blocks, adapters):
        layer = parent.find(position)
        if position in own:
            if position == HEAD:
                spec = head_spec(WIDTH, 5)
            elif position.kind is LayerKind.ADAPTER:
                spec = adapter_spec(WIDTH, hyperparameters.adapter_width)
            else:
                spec = system.root.layer(position).spec
            layer = system.put_layer(spec, {"weight": np.full(7, own[position], dtype=np.float32)})
        placed.append(PlacedLayer(position, layer))
    return Path.of(task=task, layers=placed, hyperparameters=hyperparameters, parent_id=parent.id, quality=0.5)
