"""From the settings of a task to its data, whatever the source, checked."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from evolve.config import (
    ArraysTask,
    CharactersTask,
    CsvTask,
    DigitsTask,
    FolderTask,
    HuggingFaceTask,
    TaskSettings,
    TorchvisionTask,
)
from evolve.data.arrays import load_arrays
from evolve.data.characters import load_characters
from evolve.data.digits import load_digits
from evolve.data.folder import load_folder
from evolve.data.huggingface_source import load_huggingface
from evolve.data.listed import source_of
from evolve.data.splits import shuffled
from evolve.data.table import load_csv
from evolve.data.task import ImageSet, TaskData
from evolve.data.torchvision_source import load_torchvision
from evolve.errors import DataError

FEW_VALIDATION_IMAGES = 50
"""With fewer, one image moves quality by more than 2 %."""


def load_task(settings: TaskSettings, progress: Callable[[int, int], None] | None = None) -> TaskData:
    """Loads a task's data: into memory, or, where the task has a cache, so that images are read when they are asked for.

    The same settings and files give the same data, image by image, on every machine. Training images stay in the order of the source;
    those of validation and test are shuffled in a fixed order, so that the first few represent all.

    Args:
        settings: of the task.
        progress: is told now and then how many steps are done, and of how many; a step is an image, or, in a set that is still to be
            divided into splits, a look at one.

    Returns:
        The data; `warnings` says what is odd about them.

    Raises:
        DataError: a source that cannot be used; fewer than two classes; a class without training images; no validation images; labels
            outside the classes; a name that is not text.
    """
    data = _load(settings, progress)
    source = _described(settings)
    check(data, source)
    return dataclasses.replace(
        data,
        validation=shuffled(data.validation),
        test=None if data.test is None else shuffled(data.test),
        warnings=(*data.warnings, *oddities(data, source)),
    )


def _load(settings: TaskSettings, progress: Callable[[int, int], None] | None) -> TaskData:
    if isinstance(settings, FolderTask):
        return load_folder(settings, progress)
    if isinstance(settings, CsvTask):
        return load_csv(settings, progress)
    if isinstance(settings, ArraysTask):
        return load_arrays(settings, progress)
    if isinstance(settings, DigitsTask):
        return load_digits(settings)
    if isinstance(settings, TorchvisionTask):
        return load_torchvision(settings, progress)
    if isinstance(settings, HuggingFaceTask):
        return load_huggingface(settings, progress)
    return load_characters(settings, progress)


def oddities(data: TaskData, source: str) -> tuple[str, ...]:
    """Returns what is odd about data without being an error: images that are in two splits, classes that differ only in case.

    Args:
        data: of a task.
        source: where it comes from, for messages.
    """
    odd = []
    splits = {"training": data.train, "validation": data.validation, "test": data.test}
    hashes = {split: images.hashes for split, images in splits.items() if images is not None}
    for one, other in itertools.combinations(hashes, 2):
        known = set(hashes[one])
        num_shared = sum(image in known for image in hashes[other])
        if num_shared:
            odd.append(
                f"{num_shared} of {len(hashes[other])} {other} images of {source} are also {one} images, pixel by pixel: "
                f"accuracy on them shows memory, not skill"
            )
    by_case: dict[str, list[str]] = {}
    for label in data.labels:
        by_case.setdefault(label.casefold(), []).append(label)
    odd += [
        f"classes {' and '.join(map(repr, alike))} of {source} differ only in case"
        for alike in by_case.values()
        if len(alike) > 1
    ]
    return tuple(odd)


def doubts_about_quality(data: TaskData) -> tuple[str, ...]:
    """Returns why the task's quality should be taken with care: validation images that are few, or do not show every class.

    Args:
        data: of a task.
    """
    doubts = []
    number = len(data.validation)
    if number < FEW_VALIDATION_IMAGES:
        doubts.append(
            f"quality is measured on {number} validation image{'' if number == 1 else 's'} and moves in steps of {1 / number:.3f}: "
            "paths that differ little are told apart by chance; more images, or validation/ and test/ of your own, make it finer"
        )
    present = set(data.validation.labels.tolist())
    missing = [label for index, label in enumerate(data.labels) if index not in present]
    if missing:
        doubts.append(f"there are no validation images of {_listed(missing)}: quality says nothing about that")
    return tuple(doubts)


def check(data: TaskData, source: str) -> None:
    """Checks what must hold for the data of any task.

    Args:
        data: what a source gave.
        source: where it comes from, for messages.

    Raises:
        DataError: see `load_task`.
    """
    if len(data.labels) < 2:
        classes = f"one class only, {data.labels[0]!r}," if data.labels else "no class"
        raise DataError(f"found {classes} in {source}", "two or more classes")
    for label in data.labels:
        if not label or label != label.encode("utf-8", "replace").decode():
            raise DataError(f"found class name {label!r} in {source}", "text that UTF-8 can hold", "rename the class")
    for split, images in (("training", data.train), ("validation", data.validation), ("test", data.test)):
        if images is not None:
            _check_labels(images, len(data.labels), f"{split} images of {source}")
    if not len(data.validation):
        raise DataError(f"found no validation images in {source}", "one or more", "quality is measured on them")
    present = set(data.train.labels.tolist())
    missing = [label for index, label in enumerate(data.labels) if index not in present]
    if missing:
        raise DataError(
            f"found no training images of {_listed(missing)} in {source}",
            "one or more of each class",
            "add some, or take it away",
        )


def _check_labels(images: ImageSet, num_classes: int, what: str) -> None:
    if len(images.labels) != len(images):
        raise DataError(f"found {len(images.labels)} labels for {len(images)} {what}", "one label for each image")
    outside = np.flatnonzero((images.labels < 0) | (images.labels >= num_classes))
    if len(outside):
        first = int(outside[0])
        raise DataError(
            f"found label {int(images.labels[first])} for {images.names[first]!r} among the {what}",
            f"0 to {num_classes - 1}, the indices of its {num_classes} classes",
        )


def _listed(classes: list[str], limit: int = 5) -> str:
    shown = ", ".join(repr(name) for name in classes[:limit])
    more = f" and {len(classes) - limit} more" if len(classes) > limit else ""
    return f"class{'es' * (len(classes) > 1)} {shown}{more}"


def _described(settings: TaskSettings) -> str:
    if isinstance(settings, FolderTask | CsvTask | TorchvisionTask | HuggingFaceTask):
        return source_of(settings)
    if isinstance(settings, ArraysTask):
        return f"arrays {settings.file}"
    if isinstance(settings, CharactersTask):
        return f"script {settings.script!r}"
    return "scikit-learn's digits"
