"""Tasks of torchvision's data sets, by the name of their class in torchvision.datasets, read from the files that torchvision reads.

- SETS says which can be used, what their splits are called and which arguments may be set. Sets without one label for each image cannot.
- Classes are those that the set declares, in its order.
- Sets of image files are read as every other file is, images in their sorted order. Sets that lie in archives of pixels come as torchvision
  gives them.
- A split that the set does not have: in archives of pixels, whose order is part of what was published, the first 5 % of the training
  images for each missing one, the test first, as the published experiments have it. Image files have no order but that of their names,
  which is the order of the classes: each goes by its own content, as in any folder (see splits.pinned).
- Nothing is downloaded unless the task says so.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import http.client
import lzma
import os
import pathlib
import pickle
import re
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from evolve.config import FolderTask, TorchvisionTask
from evolve.data.classes import declared_classes, normalised
from evolve.data.folder import load_folder
from evolve.data.listed import load_listed, source_of
from evolve.data.reading import Files, Unreadable
from evolve.data.splits import SHARE, Labels
from evolve.data.stored import LIMITS_WITH_PPM, FetchedImage, FileImage, PixelImage, StoredImage
from evolve.data.task import TaskData
from evolve.errors import DataError
from munet.names import similar_names
from munet.preprocessing import ImageError, to_rgb

Listed = tuple[Sequence[pathlib.Path] | None, Any]
"""Where the images of a set lie, None if they are no files of their own; and their labels."""

_Arguments = Mapping[str, str | bool]


def _from_loader(dataset: Any) -> Listed:
    """Lists a set that was opened with pathlib.Path as its loader: what it then gives for an image is where it lies."""
    pairs = [dataset[index] for index in range(len(dataset))]
    return [path for path, _ in pairs], [label for _, label in pairs]


def _from_samples(dataset: Any) -> Listed:
    return [pathlib.Path(path) for path, _ in dataset._samples], [label for _, label in dataset._samples]


def _from_pets(dataset: Any) -> Listed:
    return list(dataset._images), list(dataset._labels)


def _from_characters(dataset: Any) -> Listed:
    """Lists Omniglot, whose classes come in the order of the file system, by the order of their names."""
    paths, labels = _from_loader(dataset)
    place = {name: index for index, name in enumerate(sorted(dataset._characters))}
    return paths, [place[dataset._characters[label]] for label in labels]


def _from_caltech_101(dataset: Any) -> Listed:
    folder = pathlib.Path(dataset.root, "101_ObjectCategories")
    numbered = zip(dataset.y, dataset.index, strict=True)
    return [folder / dataset.categories[label] / f"image_{number:04}.jpg" for label, number in numbered], list(dataset.y)


def _from_caltech_256(dataset: Any) -> Listed:
    folder = pathlib.Path(dataset.root, "256_ObjectCategories")
    numbered = zip(dataset.y, dataset.index, strict=True)
    return [folder / dataset.categories[label] / f"{label + 1:03}_{number:04}.jpg" for label, number in numbered], list(dataset.y)


def _from_pixels(dataset: Any) -> Listed:
    """Lists a set that torchvision holds in memory: its labels are there as a whole, under one of two names."""
    labels = np.asarray(dataset.targets if hasattr(dataset, "targets") else dataset.labels)
    # QMNIST says more of an image than its digit.
    return None, labels[:, 0] if labels.ndim == 2 else labels


def _from_items(dataset: Any) -> Listed:
    return None, [dataset[index][1] for index in range(len(dataset))]


def _own_classes(dataset: Any) -> Sequence[Any]:
    return list(dataset.classes)


@dataclasses.dataclass(frozen=True)
class PublishedSet:
    """How one class of torchvision.datasets is used.

    Attributes:
        splits: what the class is called with for each of our splits; `train` is among them.
        arguments: of the class, that a task may set.
        listing: gives images and labels of an opened set.
        classes: gives the names of the classes of an opened set, each a name or several.
        first_label: what the first class is called among the labels of an opened set.
        is_ordered: whether the order of the images is part of what was published, and is that of no class.
        downloads: whether torchvision can download it.
    """

    splits: Mapping[str, _Arguments]
    arguments: tuple[str, ...] = ()
    listing: Callable[[Any], Listed] = _from_loader
    classes: Callable[[Any], Sequence[Any]] = _own_classes
    first_label: Callable[[Any], int] = lambda _: 0
    is_ordered: bool = False
    downloads: bool = True


def _splits(train: str = "train", validation: str | None = None, test: str | None = None) -> dict[str, _Arguments]:
    named = {"train": train, "validation": validation, "test": test}
    return {split: {"split": name} for split, name in named.items() if name is not None}


def _pixels(splits: Mapping[str, _Arguments], *arguments: str, **others: Any) -> PublishedSet:
    return PublishedSet(splits, arguments, **{"listing": _from_pixels, "is_ordered": True, **others})


def _digits(_: Any) -> Sequence[str]:
    return [str(digit) for digit in range(10)]


_TRAIN_OR_NOT: dict[str, _Arguments] = {"train": {"train": True}, "test": {"train": False}}
_ALL_IN_ONE: dict[str, _Arguments] = {"train": {}}
_EMOTIONS = ("angry", "disgust", "fear", "happy", "sad", "surprise", "neutral")

SETS: Mapping[str, PublishedSet] = {
    "Caltech101": PublishedSet(_ALL_IN_ONE, listing=_from_caltech_101, classes=lambda dataset: dataset.categories),
    "Caltech256": PublishedSet(_ALL_IN_ONE, listing=_from_caltech_256, classes=lambda dataset: dataset.categories),
    "CIFAR10": _pixels(_TRAIN_OR_NOT),
    "CIFAR100": _pixels(_TRAIN_OR_NOT),
    # The labels are numbers of objects, 3 to 10; the test has none.
    "CLEVRClassification": PublishedSet(
        _splits(validation="val"), classes=lambda _: [str(number) for number in range(3, 11)], first_label=lambda _: 3
    ),
    "Country211": PublishedSet(_splits(validation="valid", test="test")),
    "DTD": PublishedSet(_splits(validation="val", test="test"), ("partition",)),
    # Labels of its letters begin at 1, and a class N/A stands for 0.
    "EMNIST": _pixels(
        _TRAIN_OR_NOT,
        "split",
        classes=lambda dataset: [name for name in dataset.classes if name != "N/A"],
        first_label=lambda dataset: int("N/A" in dataset.classes),
    ),
    "EuroSAT": PublishedSet(_ALL_IN_ONE),
    "FashionMNIST": _pixels(_TRAIN_OR_NOT),
    "FER2013": _pixels(_splits(test="test"), listing=_from_items, classes=lambda _: _EMOTIONS, downloads=False),
    "FGVCAircraft": PublishedSet(_splits(validation="val", test="test"), ("annotation_level",)),
    "Flowers102": PublishedSet(_splits(validation="val", test="test")),
    "Food101": PublishedSet(_splits(test="test")),
    "GTSRB": PublishedSet(_splits(test="test"), listing=_from_samples, classes=lambda _: [str(number) for number in range(43)]),
    "ImageNet": PublishedSet(_splits(validation="val"), downloads=False),
    "Imagenette": PublishedSet(_splits(validation="val"), ("size",)),
    "INaturalist": PublishedSet(
        {"train": {"version": "2021_train"}, "validation": {"version": "2021_valid"}},
        classes=lambda dataset: dataset.all_categories,
    ),
    "KMNIST": _pixels(_TRAIN_OR_NOT),
    "LFWPeople": PublishedSet(
        {"train": {"split": "10fold"}}, ("image_set",), classes=lambda dataset: list(dataset.class_to_idx), downloads=False
    ),
    "MNIST": _pixels(_TRAIN_OR_NOT),
    # Its two parts are of other characters, so one is no test of the other.
    "Omniglot": PublishedSet(
        _ALL_IN_ONE, ("background",), listing=_from_characters, classes=lambda dataset: sorted(dataset._characters)
    ),
    "OxfordIIITPet": PublishedSet(_splits("trainval", test="test"), listing=_from_pets),
    "PCAM": _pixels(_splits(validation="val", test="test"), listing=_from_items, classes=lambda _: ("no tumour", "tumour")),
    "Places365": PublishedSet(_splits("train-standard", validation="val"), ("small",)),
    "QMNIST": _pixels(_TRAIN_OR_NOT),
    "RenderedSST2": PublishedSet(_splits(validation="val", test="test")),
    "SEMEION": _pixels(_ALL_IN_ONE, classes=_digits, is_ordered=False),
    "StanfordCars": PublishedSet(_splits(test="test"), downloads=False),
    "STL10": _pixels(_splits(test="test"), "folds"),
    "SUN397": PublishedSet(_ALL_IN_ONE),
    "SVHN": _pixels(_splits(test="test"), classes=_digits),
    "USPS": _pixels(_TRAIN_OR_NOT, classes=_digits),
}
"""The sets that can be used; `ImageFolder` besides, which is the source `folder` by another name."""

_FAILURES = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    LookupError,
    ArithmeticError,
    AttributeError,
    SyntaxError,
    EOFError,
    MemoryError,
    ImportError,
    csv.Error,
    pickle.UnpicklingError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    http.client.HTTPException,
)
"""What torchvision and the readers under it raise for files that are missing or damaged, and downloads that fail."""


def load_torchvision(task: TorchvisionTask, progress: Callable[[int, int], None] | None = None) -> TaskData:
    """Returns the images of one of torchvision's data sets: in memory, or from the cache if the task has one.

    Args:
        task: its settings.
        progress: see evolve.data.listed.load_listed.

    Raises:
        DataError: a set that there is not, or that cannot be used; an argument that cannot be set; files that are missing or damaged and
            are not to be downloaded, or cannot be; labels outside the classes; classes that differ between splits; what `load_listed`
            raises.
    """
    if task.dataset == "ImageFolder":
        return load_folder(_as_folder(task), progress)
    published = _find(task.dataset)
    _check_settings(task, published)
    classes: tuple[str, ...] | None = None
    files: dict[str, Files] = {}
    for split in published.splits:
        dataset = _open(task, published, split)
        names = _class_names(task, published, dataset)
        if classes is not None and names != classes:
            strangers = sorted(set(names) ^ set(classes))
            raise DataError(
                f"found other classes among the {split} images of {source_of(task)} than among those to train on: {strangers[:5]}",
                "the same classes in every split",
                "complete the files",
            )
        classes = names
        files[split] = _listed(task, published, split, dataset)
    classes = _renamed(task, classes or ())
    if published.is_ordered:
        files = _with_first_images(files)
    return load_listed(task, classes, files, Unreadable(task.skip_unreadable), progress)


def _as_folder(task: TorchvisionTask) -> FolderTask:
    if task.arguments or task.download:
        setting = "arguments" if task.arguments else "download"
        raise DataError(f"found {setting} of ImageFolder", "folder alone", "take it away")
    shared = task.model_dump(include=FolderTask.model_fields.keys() - {"source"})
    return FolderTask(source="folder", **shared)


def _find(name: str) -> PublishedSet:
    if name in SETS:
        return SETS[name]
    # A second to import; a set that is known is opened with it anyway.
    import torchvision.datasets

    known = sorted([*SETS, "ImageFolder"], key=str.casefold)
    if name in torchvision.datasets.__all__:
        raise DataError(
            f"found data set {name!r} of torchvision, which is no set of images with one label each",
            f"one of {', '.join(known)}",
        )
    by_case = {other.casefold(): other for other in known}
    in_small_letters = name.casefold()
    similar = [in_small_letters] if in_small_letters in by_case else similar_names(name, by_case)
    similar = [by_case[other] for other in similar]
    raise DataError(
        f"found data set {name!r}, which torchvision does not have or munet cannot read",
        f"one of {', '.join(known)}",
        f"did you mean {' or '.join(map(repr, similar))}?" if similar else "other sets can be read as folders, tables or arrays",
    )


def _check_settings(task: TorchvisionTask, published: PublishedSet) -> None:
    for name in task.arguments:
        if name not in published.arguments:
            allowed = ", ".join(published.arguments) or "none"
            raise DataError(f"found argument {name!r} for {task.dataset}", f"only arguments that a task may set: {allowed}")
    if task.download and not published.downloads:
        raise DataError(
            f"found download = true for {task.dataset}, which torchvision cannot download",
            "its files in folder",
            "fetch them as torchvision's documentation of the set says, and set download = false",
        )
    if not task.folder.is_dir() and not task.download:
        what = "a file" if task.folder.exists() else "nothing"
        raise DataError(
            f"found {what} at {task.folder}",
            f"the folder that torchvision's {task.dataset} calls root",
            "set folder of the task" + "; download = true fetches the set" * published.downloads,
        )


def _open(task: TorchvisionTask, published: PublishedSet, split: str) -> Any:
    """Returns the set of a split as torchvision opens it, offline unless the task says otherwise."""
    import torchvision.datasets

    arguments: dict[str, Any] = {**task.arguments, **published.splits[split]}
    if published.downloads:
        # Said even where it is false: some sets download by default.
        arguments["download"] = task.download
    if published.listing in (_from_loader, _from_characters):
        arguments["loader"] = pathlib.Path
    try:
        return getattr(torchvision.datasets, task.dataset)(root=os.fspath(task.folder), **arguments)
    except _failures() as error:
        raise _unopened(task, published, split, error) from error


def _failures() -> tuple[type[BaseException], ...]:
    from scipy.io.matlab import MatReadError

    return (*_FAILURES, MatReadError)


def _unopened(task: TorchvisionTask, published: PublishedSet, split: str, error: BaseException) -> DataError:
    # torchvision gives advice in its own words, which are not ours.
    said = re.sub(r"[.,]? *You can use download=True to download it\.?", "", str(error)).strip() or type(error).__name__
    packed = sorted((task.folder / task.dataset / "raw").glob("*.gz"))
    if task.download:
        advice = "put its files there yourself"
    elif packed:
        advice = f"unpack {packed[0].name} and those beside it (gunzip --keep)"
    elif task.dataset == "EMNIST" and "split" not in task.arguments:
        advice = 'set arguments = { split = "letters" }, or another of its splits'
    elif published.downloads:
        advice = "put them there, or set download = true"
    else:
        advice = "fetch them as torchvision's documentation of the set says"
    return DataError(
        f"could not open the {split} images of {source_of(task)} ({said})", "the files that torchvision reads", advice
    )


def _class_names(task: TorchvisionTask, published: PublishedSet, dataset: Any) -> tuple[str, ...]:
    """Returns the names that a set declares, told apart by what else it calls them where two are one."""
    try:
        declared = published.classes(dataset)
    except AttributeError as error:
        raise DataError(
            f"found no names of classes for {source_of(task)}", "a file of them beside the images", "complete the files"
        ) from error
    names = [normalised(name if isinstance(name, str) else ", ".join(name)) for name in declared]
    count = collections.Counter(names)
    keys = getattr(dataset, "wnids", range(len(names)))
    return tuple(f"{name} ({key})" if count[name] > 1 else name for name, key in zip(names, keys, strict=True))


def _renamed(task: TorchvisionTask, own: tuple[str, ...]) -> tuple[str, ...]:
    names = declared_classes(task.classes)
    if names is None:
        return own
    if len(names) != len(own):
        raise DataError(
            f"found {len(names)} names in classes for {source_of(task)}",
            f"{len(own)}, one for each of its classes, in the order of {', '.join(own[:3])} ...",
            "complete them, or leave classes out",
        )
    return names


def _listed(task: TorchvisionTask, published: PublishedSet, split: str, dataset: Any) -> Files:
    try:
        paths, found = published.listing(dataset)
    except _FAILURES as error:
        raise DataError(
            f"could not list the {split} images of {source_of(task)} ({error})", "a label for each image", "complete the files"
        ) from error
    labels = _as_labels(task, split, found) - published.first_label(dataset)
    if len(labels) != len(dataset):
        raise DataError(
            f"found {len(labels)} labels for {len(dataset)} {split} images of {source_of(task)}",
            "one label for each image",
            "fetch the files anew",
        )
    if paths is None:
        names = [f"{split}[{index}]" for index in range(len(dataset))]
        fetch = _fetch_from(dataset)
        images: list[StoredImage] = [FetchedImage(fetch, index) for index in range(len(dataset))]
        return Files(images, names, labels, [f"{name} of {source_of(task)}" for name in names])
    names = [_name_of(path, task.folder) for path in paths]
    # Some sets list their files in the order of the file system.
    order = sorted(range(len(names)), key=lambda index: names[index])
    files = Files([FileImage(path, LIMITS_WITH_PPM) for path in paths], names, labels, [str(path) for path in paths])
    return files.choose(order)


def _as_labels(task: TorchvisionTask, split: str, found: Sequence[Any]) -> Labels:
    labels = np.asarray(found)
    if not len(labels):
        raise DataError(f"found no {split} images of {source_of(task)}", "one or more", "complete the files")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"found label {found[0]!r} for the first {split} image of {source_of(task)}", "a whole number for each image"
        )
    return labels.astype(np.int64)


def _name_of(path: pathlib.Path, folder: pathlib.Path) -> str:
    inside = path.relative_to(folder) if path.is_relative_to(folder) else path
    return unicodedata.normalize("NFC", inside.as_posix())


def _fetch_from(dataset: Any) -> Callable[[int], StoredImage]:
    def fetch(index: int) -> StoredImage:
        try:
            pixels = np.asarray(dataset[index][0])
        except _FAILURES as error:
            raise ImageError(f"torchvision could not give it ({error})") from error
        return PixelImage(to_rgb(pixels))

    return fetch


def _with_first_images(files: Mapping[str, Files]) -> dict[str, Files]:
    """Returns all splits, the missing ones with the first SHARE of the training images each, the test first."""
    train = files["train"]
    filled = dict(files)
    start = 0
    for split in ("test", "validation"):
        if split not in filled:
            end = start + max(1, round(len(train) * SHARE))
            filled[split] = train.choose(range(start, min(end, len(train))))
            start = end
    return {**filled, "train": train.choose(range(min(start, len(train)), len(train)))}
