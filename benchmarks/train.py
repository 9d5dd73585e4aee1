"""Children trained together beside the same children one by one: T1 to T4, and what images cost, T5.

    python -m benchmarks.train [--smoke] [--device auto|cpu|cuda] [--only T1 ...] [--results benchmarks/results]

Both sides are the same trainer with the same data and batches: packs of one child without cached features, and one pack.

T1  16 children that train a head only: one by one / together.
T2  the last block, final norm and head of 12 blocks, 16 children, 10 epochs without augmentation: the same, with the cache of features on
    the one side, as a share of what arithmetic allows.
T3  8 children at the published rate of mutation on 3 blocks at 32 px.
T4  the largest difference of a validation loss between the two sides in float32, and whether they have one winner.
T5  images a second from the trainer's own store, augmented, after the first epoch / from a torchvision DataLoader that decodes and
    augments JPEG files with as many processes as there are CPUs.

The bound of a case counts, layer by layer, floating point operations of evolve.flops: once for what is frozen below a child's lowest
trainable layer, twice for what is frozen above it, three times for what trains; frozen rows with the same input once for all children,
rows that are cached once for all epochs. Devices that a single child does not fill gain beyond it.

Prints JSON lines, the last one sums up; without --smoke it takes about 8 minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import pathlib
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from benchmarks.published import SMOKE, Architecture
from benchmarks.random_models import random_layers
from benchmarks.reporting import Ratio, Report, Target, add_arguments, rounded, seconds_of
from evolve.config import TrainingSettings
from evolve.data.task import ImageSet, TaskData
from evolve.flops import layer_flops
from evolve.generation import ChildPlan, ChildResult, GenerationPlan, LayerPlan, TrainingLength, plan_root_child
from evolve.hyperparameters import Hyperparameters
from evolve.layer import NORM, Layer, Position, Tensors, block_position
from evolve.training.augmentation import NUM_DRAWS, augment
from evolve.training.batches import BatchOrder, draws
from evolve.training.device import repeatable, resolve_device
from evolve.training.images import training_images
from evolve.training.one_by_one import OneByOneTrainer
from evolve.training.together import TogetherTrainer
from evolve.vit import build_module, run_layers

NUM_CLASSES = 10
CHARACTERS = Architecture("ViT-Ti/16, 3 blocks at 32 px", 192, 3, 3, 16, 32)
DEEP = Architecture("ViT-Ti/16, 12 blocks at 64 px", 192, 3, 12, 16, 64)


class Root:
    """Layers of random weights in memory.

    Attributes:
        layers: by position.
        stored: weights by layer id.
    """

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        made = random_layers(architecture)
        self.layers: dict[Position, Layer] = {position: Layer.of(*layer) for position, layer in made.items()}
        self.stored: dict[str, Tensors] = {self.layers[position].id: tensors for position, (_, tensors) in made.items()}

    def child(
        self, index: int, trains: Callable[[Position], bool], wanted: Hyperparameters, adapters: Sequence[int] = ()
    ) -> ChildPlan:
        """Plans a child of the root, with a new head and new adapters."""
        return plan_root_child(
            self.layers.__getitem__,
            wanted,
            num_classes=NUM_CLASSES,
            trains=trains,
            adapters=adapters,
            parent_id="root",
            index=index,
            seed=index,
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """Children to train both ways.

    Attributes:
        name: the id of its figure.
        root: what they start from.
        children: their plans.
        length: of each child's training.
        num_images: to train on.
    """

    name: str
    root: Root
    children: tuple[ChildPlan, ...]
    length: TrainingLength
    num_images: int

    @property
    def plan(self) -> GenerationPlan:
        """The generation that they are."""
        return GenerationPlan("random", 0, 0, 1, self.length, self.children)

    def data(self) -> TaskData:
        """Makes images that can be told apart: noise, brighter in a place that is the class."""
        size = self.root.architecture.image_size
        random = np.random.default_rng(0)

        def split(count: int) -> ImageSet:
            labels = np.arange(count) % NUM_CLASSES
            images = random.integers(0, 160, (count, size, size, 3), dtype=np.uint8)
            rows = size // NUM_CLASSES
            for image, label in zip(images, labels, strict=True):
                image[label * rows : (label + 1) * rows] += 90
            return ImageSet(list(images), labels.astype(np.int64), [str(number) for number in range(count)])

        return TaskData("random", tuple(map(str, range(NUM_CLASSES))), split(self.num_images), split(256), None)


def cases(smoke: bool) -> list[Case]:
    """Returns the cases of T1 to T3."""
    shallow, deep = (Root(SMOKE), Root(SMOKE)) if smoke else (Root(CHARACTERS), Root(DEEP))
    batch, steps = (8, 2) if smoke else (64, 20)

    def wanted(root: Root, **changes: object) -> Hyperparameters:
        size = root.architecture.image_size
        return Hyperparameters(num_blocks=root.architecture.blocks, image_size=size, flip=False).replace(**changes)

    augmented = wanted(shallow, crop_area_min=0.5)
    plain = wanted(deep, crop_area_min=1.0)
    last = (block_position(deep.architecture.blocks - 1), NORM)
    epochs, num_deep = (2, 16) if smoke else (10, 256)
    random = np.random.default_rng(3)
    mutated = []
    for index in range(8):
        cloned = {position for position in shallow.layers if random.random() < 0.1} | {NORM}
        adapters = [block for block in range(shallow.architecture.blocks) if random.random() < 0.1]
        mutated.append(shallow.child(index, cloned.__contains__, augmented, adapters))
    return [
        Case(
            "T1",
            shallow,
            tuple(shallow.child(index, lambda _: False, augmented) for index in range(16)),
            TrainingLength(batch, 1, 3 * steps, 1),
            16 * batch,
        ),
        Case(
            "T2",
            deep,
            tuple(deep.child(index, last.__contains__, plain) for index in range(16)),
            TrainingLength(batch, 1, epochs * num_deep // batch, 1),
            num_deep,
        ),
        Case("T3", shallow, tuple(mutated), TrainingLength(batch, 1, steps, 1), 16 * batch),
    ]


def cost(children: Iterable[ChildPlan], size: int, num_images: int, num_epochs: float, *, shared: bool, cached: bool) -> float:
    """Counts the operations of training, as the head of this file says.

    Args:
        children: what trains.
        size: of the images, in pixels.
        num_images: distinct images of an epoch.
        num_epochs: how often each is seen.
        shared: whether frozen rows with the same input are computed once for all children.
        cached: whether what is frozen below the lowest trainable layer is computed once for all epochs.
    """
    total = 0.0
    seen: set[tuple[str, ...]] = set()
    for child in children:
        patch = child.layers[0].spec.integer("patch_size")
        above, prefix = False, ()
        for layer in child.layers:
            above = above or layer.trainable
            once = layer_flops(layer.spec, size, patch) * num_images
            if above:
                total += once * num_epochs * (2 + layer.trainable)
                continue
            prefix = (*prefix, layer.source.id if layer.source else "")
            if not (shared and prefix in seen):
                total += once * (1 if cached else num_epochs)
            seen.add(prefix)
    return total


@contextlib.contextmanager
def utilisation(device: torch.device, settings: TrainingSettings, shares: list[float]) -> Iterator[None]:
    """Appends to `shares` how busy the device was within the block, 0 to 1.

    Of a CPU: this process's CPU time / (wall time x the threads it may use). Of a GPU: the mean of what nvidia-smi says, asked twice a
    second, which is the share of time in which any kernel ran, not how much of the device it filled.
    """
    if device.type != "cuda":
        started, cpu = time.perf_counter(), time.process_time()
        yield
        shares.append((time.process_time() - cpu) / ((time.perf_counter() - started) * settings.threads))
        return
    over = threading.Event()
    seen: list[float] = []
    query = ("nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", f"--id={device.index or 0}")

    def watch() -> None:
        while not over.wait(0.5):
            seen.append(float(subprocess.run(query, check=True, capture_output=True, text=True).stdout) / 100)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    if seen:
        shares.append(statistics.fmean(seen))


def measure(
    case: Case, settings: TrainingSettings, device: torch.device, repetitions: int, report: Report
) -> tuple[Ratio, float]:
    """Trains both ways, alternating, and returns one by one / together in seconds of training, and its bound."""
    data = case.data()
    alone, together = [], []
    busy_alone: list[float] = []
    busy_together: list[float] = []
    for _ in range(repetitions):
        for seconds, busy, trainer in (
            (
                alone,
                busy_alone,
                TogetherTrainer(
                    data, case.root.stored.__getitem__, settings.model_copy(update={"pack_size": 1}), feature_bytes=0
                ),
            ),
            (together, busy_together, TogetherTrainer(data, case.root.stored.__getitem__, settings)),
        ):
            started = time.perf_counter()
            with utilisation(device, settings, busy):
                results = [child for pack in trainer.train(case.plan) for child in pack.children]
            wall = time.perf_counter() - started
            # What is cached before the first step belongs to training too; validation does not.
            seconds.append(wall - sum(child.evaluate_seconds for child in results))
    length, size = case.length, case.root.architecture.image_size
    epochs = length.num_steps * length.batch_size / case.num_images
    plain = case.children[0].hyperparameters.crop_area_min >= 1
    costs = [
        cost(case.children, size, case.num_images, epochs, shared=shared, cached=shared and plain) for shared in (False, True)
    ]
    bound = costs[0] / costs[1]
    ratio = Ratio(alone, together)
    report.line(
        figure=case.name,
        model=case.root.architecture.name,
        children=len(case.children),
        images=length.num_steps * length.batch_size,
        one_by_one_seconds=rounded(min(alone)),
        together_seconds=rounded(min(together)),
        images_per_second=rounded(len(case.children) * length.num_steps * length.batch_size / min(together)),
        one_by_one_utilisation=rounded(statistics.median(busy_alone)) if busy_alone else None,
        together_utilisation=rounded(statistics.median(busy_together)) if busy_together else None,
        ratio=ratio.spread(),
        bound=rounded(bound),
        of_bound=rounded(ratio.median / bound),
    )
    return ratio, bound


def losses(case: Case, results: Sequence[ChildResult], device: torch.device) -> list[float]:
    """Returns the validation loss of each trained child."""
    validation = case.data().validation
    images = torch.from_numpy(np.stack(list(validation.images))).to(device)
    labels = torch.from_numpy(validation.labels).to(device)
    found = []
    for child, result in zip(case.children, results, strict=True):
        modules = [build_module(layer.spec, _weights(case.root, layer, result)).eval().to(device) for layer in child.layers]
        with torch.inference_mode():
            found.append(functional.cross_entropy(run_layers(modules, images), labels).item())
    return found


def _weights(root: Root, layer: LayerPlan, result: ChildResult) -> Mapping[str, np.ndarray]:
    if layer.position in result.trained:
        return result.trained[layer.position]
    if layer.source is None:
        raise RuntimeError(f"no weights of {layer.position}")
    return root.stored[layer.source.id]


def compare(case: Case, settings: TrainingSettings, device: torch.device) -> tuple[float, bool]:
    """Trains both ways and returns the largest difference of a validation loss, and whether both have one winner."""
    data = case.data()
    trainers = (
        OneByOneTrainer(data, case.root.stored.__getitem__, settings),
        TogetherTrainer(data, case.root.stored.__getitem__, settings),
    )
    both = [[child for pack in trainer.train(case.plan) for child in pack.children] for trainer in trainers]
    apart = np.abs(np.subtract(*(losses(case, results, device) for results in both)))
    winners = [max(results, key=lambda child: child.quality).index for results in both]
    return float(apart.max()), winners[0] == winners[1]


def feed(device: torch.device, num_images: int, size: int, batch: int, repetitions: int) -> Ratio:
    """Returns images a second into the device, of the trainer's store / of a DataLoader over JPEG files, after a first epoch of each.

    Both crop and mirror at random, and normalise.
    """
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(num_images)]
    wanted = Hyperparameters(num_blocks=1, image_size=size, crop_area_min=0.5, flip=True)
    stored = training_images(
        ImageSet(images, np.zeros(num_images, np.int64), [str(index) for index in range(num_images)]), size, device
    )
    order = BatchOrder(num_images, batch, 0)
    steps = num_images // batch

    def own(epoch: int) -> None:
        for step in range(epoch * steps, (epoch + 1) * steps):
            pixels, _, sizes = stored.take(order.indices(step))
            augment(pixels, sizes, torch.from_numpy(draws(0, step, batch, NUM_DRAWS)), wanted)
        finish(device)

    with tempfile.TemporaryDirectory() as folder:
        loader = _loader(pathlib.Path(folder), images, batch, device)

        def theirs(_epoch: int) -> None:
            for pixels, _ in loader:
                pixels.to(device)
            finish(device)

        for one in (own, theirs):
            one(0)
        rates: tuple[list[float], list[float]] = ([], [])
        for repetition in range(1, repetitions + 1):
            for one, found in zip((own, theirs), rates, strict=True):
                found.append(steps * batch / seconds_of(functools.partial(one, repetition)))
    return Ratio(*rates)


def _loader(
    folder: pathlib.Path, images: Sequence[np.ndarray], batch: int, device: torch.device
) -> torch.utils.data.DataLoader[Any]:
    """Writes images as JPEG files and returns what most people would read them with."""
    (folder / "only").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / "only" / f"{index}.jpg")
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(len(images[0]), scale=(0.5, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    return torch.utils.data.DataLoader(
        ImageFolder(folder, transform),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=len(os.sched_getaffinity(0)),
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )


def finish(device: torch.device) -> None:
    """Waits until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--only", nargs="+", choices=("T1", "T2", "T3", "T4", "T5"), default=("T1", "T2", "T3", "T4", "T5"))
    arguments = parser.parse_args()
    report = Report("train", arguments)
    settings = TrainingSettings(device=arguments.device, threads=len(os.sched_getaffinity(0)), pack_size=16)
    device = resolve_device(settings)
    smoke = arguments.smoke
    everything = cases(smoke)
    for case in everything:
        if case.name in arguments.only:
            ratio, bound = measure(case, settings, device, 1 if smoke else 3, report)
            if case.name == "T2":
                report.figure("T2", ratio.median / bound, Target(">=", 0.8), f"share of the bound {bound:.3g}")
            else:
                least = {"T1": 10.0, "T3": 3.0}[case.name]
                report.figure(case.name, ratio.median, Target(">=", least), f"bound {bound:.3g}")
    if "T4" in arguments.only:
        difference, same = compare(everything[2], settings, device)
        report.line(figure="T4", largest_loss_difference=difference, same_winner=same)
        report.figure("T4", difference if same else float("inf"), Target("<=", 1e-5))
    if "T5" in arguments.only:
        with repeatable(settings.threads):
            rates = feed(device, 64 if smoke else 4096, 32 if smoke else 64, 16 if smoke else 256, 2 if smoke else 7)
        own, theirs = statistics.median(rates.above), statistics.median(rates.below)
        report.line(
            figure="T5", images_per_second=rounded(own), data_loader_images_per_second=rounded(theirs), ratio=rates.spread()
        )
        report.figure("T5", rates.median, Target(">=", 5.0))
    report.finish(f"{everything[0].root.architecture.name}; T2 {everything[1].root.architecture.name}; random weights, float32")


if __name__ == "__main__":
    main()
