"""The trainer that takes a generation pack by pack: what children that train on the same batches have in common is computed once."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from evolve.config import TrainingSettings
from evolve.data.task import TaskData
from evolve.errors import MemoryShortageError
from evolve.generation import ChildPlan, ChildResult, GenerationPlan, LayerPlan, PackResult
from evolve.layer import LayerKind, Tensors
from evolve.training.augmentation import NUM_DRAWS, augment, draws_nothing
from evolve.training.batches import BatchOrder, draws
from evolve.training.child import EVALUATION_BATCH
from evolve.training.device import repeatable, upload
from evolve.training.features import FeatureCache, Key
from evolve.training.images import DeviceImages
from evolve.training.memory import in_parts_that_fit
from evolve.training.one_by_one import IntervalObserver, OneByOneTrainer, TrainingRecord
from evolve.training.pack import PackModel, Start
from evolve.training.schedule import learning_rate

FEATURE_SHARE = 0.25
"""Share of a device's free memory that cached features may take."""

HOST_FEATURE_BYTES = 2**30
"""What they may take on the CPU."""

Features = dict[int, tuple[int, torch.Tensor]]
"""By child, how many layers its frozen prefix has and what they give for all images, [images, ...]."""


class TogetherTrainer(OneByOneTrainer):
    """A Trainer (evolve.generation) that trains the children of a generation together, evolve.training.pack.

    Packs are formed from the plan alone, in the order of its children, so that whoever trains them gets the same. A pack that does not
    fit into memory is halved until it does; a single child is then trained as evolve.training.one_by_one does it.
    """

    def __init__(
        self,
        data: TaskData,
        tensors: Callable[[str], Tensors],
        settings: TrainingSettings,
        observer: IntervalObserver | None = None,
        *,
        stacks: bool | None = None,
        feature_bytes: int | None = None,
    ) -> None:
        """Prepares to train paths of one task.

        Args:
            data: of the task.
            tensors: a stored layer's weights by its id, such as System.tensors.
            settings: device, precision, threads and pack size matter; lengths come with each plan.
            observer: told of every validation.
            stacks: whether trainable layers of one shape run as one batched operation; by default where that is faster, on CUDA.
            feature_bytes: how much cached features may take; by default FEATURE_SHARE of the device, or HOST_FEATURE_BYTES.

        Raises:
            SettingsError: the settings ask for a device that is not there, or a precision that it does not have.
        """
        super().__init__(data, tensors, settings, observer)
        self._stacks = self._device.type == "cuda" if stacks is None else stacks
        self._feature_bytes = feature_bytes

    @property
    def identity(self) -> Mapping[str, str]:
        """See Trainer.identity."""
        return {**super().identity, "trainer": "together"}

    def train(self, plan: GenerationPlan) -> Iterator[PackResult]:
        """See Trainer.train. Yields packs in the order of the plan.

        Raises:
            MemoryShortageError: a child does not fit into memory, not even alone and one image at a time.
            ValueError: the plan is of another task, or a child cannot be built.
        """
        self._check(plan)
        size = self._settings.pack_size
        for start in range(0, len(plan.children), size):
            yield from self._train_fitting(plan, plan.children[start : start + size])

    def _train_fitting(self, plan: GenerationPlan, children: Sequence[ChildPlan]) -> Iterator[PackResult]:
        """Trains children together, or in two halves if they do not fit into memory."""
        try:
            with repeatable(self._settings.threads):
                results = in_parts_that_fit(
                    lambda _parts: self._train_pack(plan, children), self._make_room, 1, f"a pack of {len(children)} children"
                )
        except MemoryShortageError:
            if len(children) == 1:
                # Its batches are computed in parts.
                yield PackResult((self._train_alone(plan, children[0]),))
                return
            middle = len(children) // 2
            for half in (children[:middle], children[middle:]):
                yield from self._train_fitting(plan, half)
        else:
            yield PackResult(tuple(results))

    @functools.cached_property
    def _cache(self) -> FeatureCache:
        # Not before it is needed: asking a GPU takes memory of it.
        num_bytes = self._feature_bytes
        if num_bytes is None and self._device.type == "cuda":
            num_bytes = int(FEATURE_SHARE * torch.cuda.mem_get_info(self._device)[0])
        return FeatureCache(HOST_FEATURE_BYTES if num_bytes is None else num_bytes)

    def _make_room(self) -> None:
        super()._make_room()
        self._cache.clear()

    def _train_pack(self, plan: GenerationPlan, children: Sequence[ChildPlan]) -> list[ChildResult]:
        length, size = plan.length, children[0].hyperparameters.image_size
        training = self._training_images(size)
        validation = self._validation_images(size, length.validation_batches * length.batch_size)
        model = PackModel(children, self._tensors, self._device, bf16=self._settings.precision == "bf16", stacks=self._stacks)
        held: set[Key] = set()
        validated = self._features_of(model, ("validation", size, len(validation)), validation, _as_they_are, held)
        trained: Features = {}
        if draws_nothing(children[0].hyperparameters):
            # Numbers that decide nothing.
            trained = self._features_of(
                model,
                ("train", size),
                training,
                lambda pixels, sizes: augment(pixels, sizes, torch.zeros(len(sizes), NUM_DRAWS), children[0].hyperparameters),
                held,
            )
        batches = _Batches(plan, training, trained)
        records = {child.index: TrainingRecord() for child in children}
        for interval in range(length.intervals):
            _train_interval(model, plan, batches, interval, records)
            self._validate(model, validation, validated, interval, records)
            for child in children:
                record = records[child.index]
                if len(record.qualities) == interval:
                    if record.finite:
                        # Stopped early.
                        continue
                    record.qualities.append(0.0)
                if self._observer is not None:
                    self._observer.on_interval(child.index, interval, record.qualities[-1])
                if child.index in model.children and plan.stops_after(child, record.qualities) is not None:
                    model.remove(child.index)
        return [records[child.index].result(child, self._tensors) for child in children]

    def _features_of(
        self,
        model: PackModel,
        which: tuple[object, ...],
        images: DeviceImages,
        prepare: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        held: set[Key],
    ) -> Features:
        """Returns what the frozen prefix of each child gives for all images, as far as there is room; the shortest prefixes first."""
        found: Features = {}
        for child in sorted(model.children.values(), key=lambda child: len(_frozen_prefix(child))):
            prefix = _frozen_prefix(child)
            if not prefix:
                continue

            def compute(
                known: int,
                before: torch.Tensor | None,
                rows: npt.NDArray[np.int64],
                prefix: tuple[LayerPlan, ...] = prefix,
            ) -> torch.Tensor:
                if before is None:
                    pixels, _, sizes = images.take(rows)
                    before = prepare(pixels, sizes)
                return model.run_frozen(prefix[known:], before)

            key = (which, tuple(layer.source.id for layer in prefix if layer.source is not None))
            image_bytes = _bytes_after(prefix, child.hyperparameters.image_size)
            values = self._cache.get(key, len(images), image_bytes, compute, EVALUATION_BATCH, held)
            if values is not None:
                found[child.index] = (len(prefix), values)
        return found

    def _validate(
        self,
        model: PackModel,
        validation: DeviceImages,
        features: Features,
        interval: int,
        records: Mapping[int, TrainingRecord],
    ) -> None:
        if not model.children:
            return
        started = time.perf_counter()
        correct = {child: torch.zeros((), dtype=torch.int64, device=self._device) for child in model.children}
        for start in range(0, len(validation), EVALUATION_BATCH):
            rows = np.arange(start, min(start + EVALUATION_BATCH, len(validation)))
            pixels, labels, _ = validation.take(rows)
            starts = _starts(model.children, features, torch.from_numpy(rows).to(self._device), functools.partial(_same, pixels))
            for child, logits in model.predict(starts).items():
                correct[child] += (logits.argmax(1) == labels).sum()
        qualities = {child: int(count.item()) / len(validation) for child, count in correct.items()}
        seconds = time.perf_counter() - started
        for child, quality in qualities.items():
            record = records[child]
            record.keep(interval, quality, functools.partial(model.trained, child))
            record.num_validated += len(validation)
            record.evaluate_seconds += seconds / len(qualities)


class _Batches:
    """The batches of a generation, each as the values that children start with."""

    def __init__(self, plan: GenerationPlan, training: DeviceImages, features: Features) -> None:
        self._plan = plan
        self._training = training
        self._features = features
        self._order = BatchOrder(len(training), plan.length.batch_size, plan.data_seed)

    def take(self, step: int, children: Mapping[int, ChildPlan]) -> tuple[dict[int, Start], torch.Tensor]:
        """Returns where each child starts, and the labels."""
        indices = self._order.indices(step)
        rows = upload(torch.from_numpy(indices), self._training.device)
        wanted = next(iter(children.values())).hyperparameters

        def images() -> torch.Tensor:
            pixels, _, sizes = self._training.take(indices)
            numbers = torch.from_numpy(draws(self._plan.data_seed, step, len(indices), NUM_DRAWS))
            return augment(pixels, sizes, numbers, wanted)

        return _starts(children, self._features, rows, images), self._training.labels.index_select(0, rows)


def _starts(
    children: Iterable[int], features: Features, rows: torch.Tensor, images: Callable[[], torch.Tensor]
) -> dict[int, Start]:
    """Returns where children start: after their frozen prefixes if what those give is known, else at the images."""
    starts: dict[int, Start] = {}
    taken: dict[int, torch.Tensor] = {}
    for child in children:
        layers, values = features.get(child, (0, None))
        if id(values) not in taken:
            taken[id(values)] = images() if values is None else values.index_select(0, rows)
        starts[child] = Start(layers, taken[id(values)])
    return starts


def _as_they_are(pixels: torch.Tensor, _sizes: torch.Tensor) -> torch.Tensor:
    return pixels


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def _train_interval(
    model: PackModel, plan: GenerationPlan, batches: _Batches, interval: int, records: Mapping[int, TrainingRecord]
) -> None:
    if not model.children:
        return
    length = plan.length
    started = time.perf_counter()
    trained = list(model.children)
    first = interval * length.batches_per_interval
    for step in range(first, first + length.batches_per_interval):
        starts, labels = batches.take(step, model.children)
        model.step(
            starts, labels, {index: learning_rate(of.hyperparameters, length, step) for index, of in model.children.items()}
        )
    finite = model.finite_children()
    seconds = time.perf_counter() - started
    for child in trained:
        record = records[child]
        record.num_trained += length.batches_per_interval * length.batch_size
        record.train_seconds += seconds / len(trained)
        record.finite = child in finite
        if not record.finite:
            # Weights that are not finite stay so: nothing is gained by training on.
            model.remove(child)


def _bytes_after(prefix: Sequence[LayerPlan], image_size: int) -> int:
    """Returns what is kept of an image after these layers, in bytes, as float32."""
    patches = (image_size // prefix[0].spec.integer("patch_size")) ** 2
    last = prefix[-1].spec
    rows = {LayerKind.PATCH_EMBED: patches, LayerKind.NORM: 1}.get(last.kind, patches + 1)
    return 4 * rows * last.integer("width")


def _frozen_prefix(child: ChildPlan) -> tuple[LayerPlan, ...]:
    first = next(index for index, layer in enumerate(child.layers) if layer.trainable)
    return child.layers[:first]
