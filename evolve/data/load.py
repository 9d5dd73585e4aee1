"""From the settings of a task to its data, whatever the source, checked."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from evolve.config import CharactersTask, DigitsTask, FolderTask, TaskSettings
from evolve.data.characters import load_characters
from evolve.data.digits import load_digits
from evolve.data.folder import load_folder
from evolve.data.splits import shuffled
from evolve.data.task import ImageSet, TaskData
from evolve.errors import DataError


def load_task(settings: TaskSettings, progress: Callable[[int, int], None] | None = None) -> TaskData:
    """Loads a task's data into memory. The same settings and files give the same data, image by image, on every machine.

    Training images stay in the order of the source; those of validation and test are shuffled in a fixed order, so that the first few
    represent all.

    Args:
        settings: of the task.
        progress: is told now and then how many images are done, and of how many.

    Raises:
        DataError: a source that cannot be used; fewer than two classes; a class without training images; no validation images; labels
            outside the classes.
    """
    if isinstance(settings, FolderTask):
        data = load_folder(settings, progress)
    elif isinstance(settings, DigitsTask):
        data = load_digits(settings)
    else:
        data = load_characters(settings, progress)
    check(data, _described(settings))
    return TaskData(
        data.name,
        data.labels,
        data.train,
        shuffled(data.validation),
        None if data.test is None else shuffled(data.test),
    )


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
    if isinstance(settings, FolderTask):
        return f"folder {settings.folder}"
    if isinstance(settings, CharactersTask):
        return f"script {settings.script!r}"
    return "scikit-learn's digits"
