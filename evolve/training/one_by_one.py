"""The simplest trainer: children one after another, each a pack of its own.

A child that needs more memory than there is is trained again from its beginning: first with all images in the host's memory, which changes
no bit, then with its batches computed in parts, evolve.training.memory.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch

from evolve.config import TrainingSettings
from evolve.data.task import ImageSet, TaskData
from evolve.flops import forward_flops, training_flops
from evolve.generation import ChildPlan, ChildResult, Examples, GenerationPlan, PackResult
from evolve.layer import Position, Tensors
from evolve.path import Path
from evolve.training.augmentation import NUM_DRAWS, augment
from evolve.training.batches import BatchOrder, draws
from evolve.training.child import EVALUATION_BATCH, ChildModel, accuracy, initial_weights
from evolve.training.device import repeatable, resolve_device
from evolve.training.images import DeviceImages, evaluation_images, training_images
from evolve.training.memory import in_parts_that_fit
from evolve.training.schedule import learning_rate
from evolve.vit import build_path

NUM_EXAMPLES = 8
"""Validation images that `examine` picks."""

TEST_CHUNK = 1024
"""Test images in memory at a time."""


class IntervalObserver(Protocol):
    """What wants to know how training goes."""

    def on_interval(self, child_index: int, interval: int, quality: float) -> None:
        """Is called after every validation; from the first on again if a child is trained again for want of memory.

        Args:
            child_index: the child's number within its generation.
            interval: counted from 0.
            quality: validation accuracy, 0 to 1.
        """
        ...


@dataclasses.dataclass
class TrainingRecord:
    """What has been seen of a child's training so far."""

    qualities: list[float] = dataclasses.field(default_factory=list)
    best: Mapping[Position, Tensors] | None = None
    best_interval: int = 0
    finite: bool = True
    batch_parts: int = 1
    num_trained: int = 0
    num_validated: int = 0
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0

    def keep(self, interval: int, quality: float, trained: Callable[[], Mapping[Position, Tensors]]) -> None:
        """Notes an interval's quality, and its weights, which `trained` gives, if no earlier interval was as good."""
        if self.best is None or quality > self.qualities[self.best_interval]:
            self.best, self.best_interval = trained(), interval
        self.qualities.append(quality)

    def result(self, child: ChildPlan, tensors: Callable[[str], Tensors]) -> ChildResult:
        """Returns what training gave; the weights it started with if none were ever finite."""
        trained = self.best
        if trained is None:
            trained = {layer.position: initial_weights(child, layer, tensors) for layer in child.layers if layer.trainable}
        size = child.hyperparameters.image_size
        flops = self.num_trained * training_flops([(layer.spec, layer.trainable) for layer in child.layers], size)
        flops += self.num_validated * forward_flops([layer.spec for layer in child.layers], size)
        return ChildResult(
            index=child.index,
            interval_qualities=tuple(self.qualities),
            best_interval=self.best_interval,
            trained=trained,
            num_trained_images=self.num_trained,
            flops=float(flops),
            train_seconds=self.train_seconds,
            evaluate_seconds=self.evaluate_seconds,
            diverged=not self.finite,
            batch_parts=self.batch_parts,
        )


class OneByOneTrainer:
    """A Trainer (evolve.generation) that trains one child at a time."""

    def __init__(
        self,
        data: TaskData,
        tensors: Callable[[str], Tensors],
        settings: TrainingSettings,
        observer: IntervalObserver | None = None,
    ) -> None:
        """Prepares to train paths of one task.

        Args:
            data: of the task.
            tensors: a stored layer's weights by its id, such as System.tensors.
            settings: device, precision and threads matter; lengths come with each plan.
            observer: told of every validation.

        Raises:
            SettingsError: the settings ask for a device that is not there, or a precision that it does not have.
        """
        self._data = data
        self._tensors = tensors
        self._settings = settings
        self._observer = observer
        self._device = resolve_device(settings)
        # Only the sizes in use last are kept: images of one size can fill a device.
        self._training: tuple[int, DeviceImages] | None = None
        self._validation: tuple[tuple[int, int], DeviceImages] | None = None
        # Once memory ran short, images no longer lie on the device: no bit of any result depends on where they lie.
        self._stay_on_host = False

    @property
    def identity(self) -> Mapping[str, str]:
        """See Trainer.identity."""
        return {"device": self._device.type, "torch": torch.__version__}

    def train(self, plan: GenerationPlan) -> Iterator[PackResult]:
        """See Trainer.train. Yields the children in the order of the plan.

        Raises:
            MemoryShortageError: a child does not fit into memory, not even one image at a time.
            ValueError: the plan is of another task, or a child cannot be built.
        """
        self._check(plan)
        for child in plan.children:
            yield PackResult((self._train_alone(plan, child),))

    def examine(self, path: Path) -> Examples:
        """See Trainer.examine.

        Raises:
            MemoryShortageError: the path does not fit into memory, not even for one image.
        """
        test_accuracy = None
        if self._data.test is not None:
            with repeatable(self._settings.threads):
                test_accuracy = in_parts_that_fit(
                    functools.partial(self._test_accuracy, path, self._data.test),
                    self._make_room,
                    EVALUATION_BATCH,
                    f"the test of {self._data.name} on {self._device}",
                )
        return Examples(test_accuracy, self._data.validation.resized(path.hyperparameters.image_size, NUM_EXAMPLES))

    def _check(self, plan: GenerationPlan) -> None:
        if plan.task != self._data.name:
            raise ValueError(f"found a plan for task {plan.task!r}, expected one for {self._data.name!r}")

    def _train_alone(self, plan: GenerationPlan, child: ChildPlan) -> ChildResult:
        with repeatable(self._settings.threads):
            return in_parts_that_fit(
                functools.partial(self._train_child, plan, child),
                self._make_room,
                max(plan.length.batch_size, EVALUATION_BATCH),
                f"child {child.index} of {plan.task}, generation {plan.index}, with images of "
                f"{child.hyperparameters.image_size} pixels a side, on {self._device}",
            )

    def _make_room(self) -> None:
        """Drops the images that are held; from now on they are loaded to the host's memory."""
        self._training = self._validation = None
        self._stay_on_host = True

    def _test_accuracy(self, path: Path, test: ImageSet, parts: int) -> float:
        # In float32, as the path will be served, and piece by piece: a whole test split can be larger than the memory.
        model = build_path(path, self._tensors).to(self._device)
        correct = 0.0
        for start in range(0, len(test), TEST_CHUNK):
            rows = slice(start, start + TEST_CHUNK)
            chunk = ImageSet(test.images[rows], test.labels[rows], test.names[rows])
            size = path.hyperparameters.image_size
            images = evaluation_images(chunk, size, len(chunk), self._device, stay_on_host=self._stay_on_host)
            correct += accuracy(model, images, parts) * len(chunk)
        return round(correct) / len(test)

    def _train_child(self, plan: GenerationPlan, child: ChildPlan, parts: int) -> ChildResult:
        length, size = plan.length, child.hyperparameters.image_size
        training = self._training_images(size)
        validation = self._validation_images(size, length.validation_batches * length.batch_size)
        bf16 = self._settings.precision == "bf16"
        model = ChildModel(child, self._tensors, self._device, bf16=bf16, batch_parts=parts)
        order = BatchOrder(len(training), length.batch_size, plan.data_seed)
        record = TrainingRecord(batch_parts=parts)
        for interval in range(length.intervals):
            # Weights that are not finite stay so: nothing is gained by training on.
            if record.finite:
                started = time.perf_counter()
                _train_interval(model, training, order, plan, child, interval)
                record.finite = model.is_finite()
                record.num_trained += length.batches_per_interval * length.batch_size
                record.train_seconds += time.perf_counter() - started
            if record.finite:
                started = time.perf_counter()
                record.keep(interval, accuracy(model.predict, validation, parts), model.trained)
                record.num_validated += len(validation)
                record.evaluate_seconds += time.perf_counter() - started
            else:
                record.qualities.append(0.0)
            if self._observer is not None:
                self._observer.on_interval(child.index, interval, record.qualities[-1])
            if record.finite and plan.stops_after(child, record.qualities) is not None:
                break
        return record.result(child, self._tensors)

    def _training_images(self, size: int) -> DeviceImages:
        if self._training is None or self._training[0] != size:
            self._training = None
            self._training = (size, training_images(self._data.train, size, self._device, stay_on_host=self._stay_on_host))
        return self._training[1]

    def _validation_images(self, size: int, count: int) -> DeviceImages:
        key = (size, count)
        if self._validation is None or self._validation[0] != key:
            self._validation = None
            self._validation = (
                key,
                evaluation_images(self._data.validation, *key, self._device, stay_on_host=self._stay_on_host),
            )
        return self._validation[1]


def _train_interval(
    model: ChildModel, training: DeviceImages, order: BatchOrder, plan: GenerationPlan, child: ChildPlan, interval: int
) -> None:
    length = plan.length
    first = interval * length.batches_per_interval
    for step in range(first, first + length.batches_per_interval):
        pixels, labels, sizes = training.take(order.indices(step))
        numbers = torch.from_numpy(draws(plan.data_seed, step, length.batch_size, NUM_DRAWS))
        images = augment(pixels, sizes, numbers, child.hyperparameters)
        model.step(images, labels, learning_rate(child.hyperparameters, length, step))
