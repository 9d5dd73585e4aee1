"""What a trainer receives and answers: a generation of children planned together, and results by pack.

All children of a generation train on the very same batches. A trainer answers in packs, children that it finished together, in any
order of packs; the search never depends on how children were packed.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from evolve.config import TrainingSettings
from evolve.hyperparameters import Hyperparameters
from evolve.judgement import intervals_until_hopeless
from evolve.layer import HEAD, PATCH_EMBED, Layer, LayerKind, LayerSpec, Position, Tensors
from evolve.path import Path, ordered_positions
from evolve.specs import adapter_spec, head_spec
from munet.preprocessing import Pixels


class Origin(enum.StrEnum):
    """Where a child's layer comes from."""

    SHARED = "shared"
    """Frozen, used as it is."""
    CLONED = "cloned"
    """Frozen for everyone else, copied and trained."""
    CONTINUED = "continued"
    """The task's own, copied and trained on."""
    NEW = "new"
    """Freshly initialised and trained."""


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """One layer of a child before training.

    Attributes:
        position: where it stands.
        spec: kind and configuration.
        origin: where it comes from.
        source: the layer whose weights it starts from (or simply is, if shared); None if new.
    """

    position: Position
    spec: LayerSpec
    origin: Origin
    source: Layer | None

    @property
    def trainable(self) -> bool:
        """Whether training changes it."""
        return self.origin is not Origin.SHARED


@dataclasses.dataclass(frozen=True)
class ChildPlan:
    """A child before training.

    Attributes:
        index: its number within the generation, from 0.
        parent_id: the path it was sampled from.
        hyperparameters: all of them; those of data are the same for the whole generation.
        layers: in order, from the patch embedding to the head.
        mutations: what was changed from the parent, in words such as `learning_rate: 0.01 -> 0.02`, `adapter.1: insert`,
            `block.2: clone`, in the order drawn.
        seed: seeds the initial weights of its new layers, 0 to 2**63 - 1.
        quality_to_beat: it survives only with more, 0 to 1; None: it survives whatever it reaches, or is not judged early.
    """

    index: int
    parent_id: str
    hyperparameters: Hyperparameters
    layers: tuple[LayerPlan, ...]
    mutations: tuple[str, ...]
    seed: int
    quality_to_beat: float | None = None


def plan_root_child(
    layer_at: Callable[[Position], Layer],
    hyperparameters: Hyperparameters,
    *,
    num_classes: int,
    trains: Callable[[Position], bool],
    adapters: Iterable[int] = (),
    parent_id: str,
    index: int = 0,
    seed: int,
) -> ChildPlan:
    """Plans a child of the root without a search: with a new head and new adapters, and all else cloned or shared.

    Args:
        layer_at: the root's layer at a position, of the patch embedding, blocks and all between them and the final norm.
        hyperparameters: of the child; as many blocks as they say.
        num_classes: of the head.
        trains: tells of the position of a root's layer whether the child trains a copy of it.
        adapters: blocks that get one.
        parent_id: of the root.
        index: number within the generation.
        seed: of the new layers.
    """
    width = layer_at(PATCH_EMBED).spec.integer("width")
    layers = []
    for position in ordered_positions(hyperparameters.num_blocks, adapters):
        if position == HEAD:
            layers.append(LayerPlan(position, head_spec(width, num_classes), Origin.NEW, None))
        elif position.kind is LayerKind.ADAPTER:
            layers.append(LayerPlan(position, adapter_spec(width, hyperparameters.adapter_width), Origin.NEW, None))
        else:
            layer = layer_at(position)
            layers.append(LayerPlan(position, layer.spec, Origin.CLONED if trains(position) else Origin.SHARED, layer))
    return ChildPlan(index, parent_id, hyperparameters, tuple(layers), (), seed)


@dataclasses.dataclass(frozen=True)
class TrainingLength:
    """How long each child trains.

    Attributes:
        batch_size: images a batch.
        intervals: how often a child is validated.
        batches_per_interval: batches between two validations: min(ceil(training images / batch size), the setting's limit).
        validation_batches: at most so many batches of the validation split are looked at; the same images each time.
    """

    batch_size: int
    intervals: int
    batches_per_interval: int
    validation_batches: int

    @staticmethod
    def of(training: TrainingSettings, num_train_images: int, intervals: int | None = None) -> TrainingLength:
        """Returns what the settings say for a task of so many training images; `intervals` instead of theirs if given."""
        return TrainingLength(
            batch_size=training.batch_size,
            intervals=intervals or training.intervals,
            batches_per_interval=min(-(-num_train_images // training.batch_size), training.batches_per_interval),
            validation_batches=training.validation_batches,
        )

    @property
    def num_steps(self) -> int:
        """Optimiser steps of a child."""
        return self.intervals * self.batches_per_interval


@dataclasses.dataclass(frozen=True)
class GenerationPlan:
    """A batch of children to train.

    Attributes:
        task: the active task.
        round: counted from 0 over the life of the task.
        index: number of the generation within the round, from 0.
        data_seed: seeds the order of the images and all augmentation, 0 to 2**63 - 1.
        length: how long each child trains.
        children: what to train.
        gains: the largest gain after each interval that a finished child of this search has shown, for evolve.judgement; empty
            if there is none, or if nothing is judged early.
    """

    task: str
    round: int
    index: int
    data_seed: int
    length: TrainingLength
    children: tuple[ChildPlan, ...]
    gains: tuple[float, ...] = ()

    def stops_after(self, child: ChildPlan, qualities: Sequence[float]) -> int | None:
        """Returns after how many intervals a child of this generation stops, see evolve.judgement; None if it goes on.

        Args:
            child: the child.
            qualities: after each interval it has had so far.
        """
        return intervals_until_hopeless(qualities, child.quality_to_beat, self.gains, self.length.intervals)


@dataclasses.dataclass(frozen=True)
class ChildResult:
    """What training a child gave.

    Attributes:
        index: the child's number within the generation.
        interval_qualities: validation accuracy after each interval, 0 to 1; of the first few if it stopped early.
        best_interval: index of the interval whose weights were kept: the best, the earliest on ties.
        trained: weights after that interval of every layer that was trainable, float32.
        num_trained_images: images seen in training, counted with repetition.
        flops: estimated floating point operations of training and validation (a multiply-add counts as two).
        train_seconds: wall time spent training.
        evaluate_seconds: wall time spent validating.
        diverged: whether a loss or a weight became infinite or no number; then the child scores nothing.
        batch_parts: parts in which each batch of training and validation was computed one after another, because the whole did not
            fit into memory.
    """

    index: int
    interval_qualities: tuple[float, ...]
    best_interval: int
    trained: Mapping[Position, Tensors]
    num_trained_images: int
    flops: float
    train_seconds: float
    evaluate_seconds: float
    diverged: bool = False
    batch_parts: int = 1

    @property
    def quality(self) -> float:
        """Validation accuracy of the weights that were kept, 0 to 1; 0 if it diverged."""
        return 0.0 if self.diverged else self.interval_qualities[self.best_interval]


@dataclasses.dataclass(frozen=True)
class PackResult:
    """Results of children that were trained together."""

    children: tuple[ChildResult, ...]


@dataclasses.dataclass(frozen=True)
class Examples:
    """What is measured once of a path that has become current.

    Attributes:
        test_accuracy: 0 to 1; None if the task has no test split.
        images: a few of the first validation images as the path sees them, uint8 [images, size, size, 3].
    """

    test_accuracy: float | None
    images: Pixels


class Trainer(Protocol):
    """Trains and measures the paths of one task.

    The same plan gives the same results, bit by bit, on one device type with one number of threads, however the children are packed
    and however often they are trained. A trainer never changes a stored layer.
    """

    @property
    def identity(self) -> Mapping[str, str]:
        """What its results depend on beside plan, data and settings, such as the device type and versions of libraries.

        A search that was begun with one identity is not gone on with under another.
        """
        ...

    def train(self, plan: GenerationPlan) -> Iterator[PackResult]:
        """Trains every child of a generation and yields each once, in packs, as they finish.

        A child that diverges (a loss or weight that is not finite) fails nobody else: it says so, answers quality 0 from that interval
        on, and scores nothing.

        A child that `plan.stops_after` says to stop may be trained on, but what it reaches then does not count.

        Want of memory costs no child: it is trained in smaller parts, always from its beginning. If it fits in no way, an EvolveError
        says what to lower; children that were yielded before are kept.
        """
        ...

    def examine(self, path: Path) -> Examples:
        """Measures test accuracy, looking at the test split for this alone, and picks example images."""
        ...
