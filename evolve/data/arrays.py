"""Tasks of arrays in one .npz file, as numpy.savez writes it.

- `images` and `labels`, or `train_images` and `train_labels`; in either case `validation_images`, `validation_labels` (also val or valid),
  `test_images` and `test_labels` may lie beside them. Other arrays are left alone, with a warning.
- Images are uint8: [n, height, width, 3] RGB, [n, height, width, 1] or [n, height, width] grey. Labels are [n] or [n, 1], strings or whole
  numbers from 0. With the setting `classes` numbers are its indices; without it, the class names are the labels themselves.
- A missing split is taken from the training images, each image by the hash of its pixels: see splits.pinned.

Nothing is unpickled: that would run whatever the file says. All images are held in memory.
"""

from __future__ import annotations

import lzma
import pathlib
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from evolve.config import ArraysTask
from evolve.data.classes import SomeLabels, classified, declared_classes, normalised
from evolve.data.folder import SPLIT_NAMES
from evolve.data.splits import fill_missing, limited, subset
from evolve.data.task import ImageSet, TaskData
from evolve.errors import DataError
from munet.preprocessing import ImageError, to_rgb

_DAMAGED = (
    ValueError,
    TypeError,
    SyntaxError,
    ArithmeticError,
    LookupError,
    EOFError,
    MemoryError,
    RuntimeError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""What zipfile and numpy raise for damaged archives and headers; numpy reads a header as Python."""

_PREFIXES = {"": "train", **{f"{name}_": split for name, split in SPLIT_NAMES.items()}}


def load_arrays(task: ArraysTask, progress: Callable[[int, int], None] | None = None) -> TaskData:
    """Returns the images of a .npz file.

    Args:
        task: its settings.
        progress: is told after each split how many images are done, and of how many so far.

    Raises:
        DataError: no such file; no .npz; an array that is pickled, damaged, or of another type or shape; images without labels or the
            other way round; labels outside the classes; too few images to fill a missing split.
    """
    arrays, warnings = _open(task.file)
    images: dict[str, list[npt.NDArray[np.uint8]]] = {}
    names: dict[str, list[str]] = {}
    labels: dict[str, SomeLabels] = {}
    done = 0
    for split, (images_key, labels_key) in _pairs(task.file, arrays).items():
        images[split] = _images(task.file, images_key, arrays.pop(images_key))
        labels[split] = _labels(task.file, labels_key, arrays.pop(labels_key))
        if len(images[split]) != len(labels[split]):
            raise DataError(
                f"found {len(images[split])} images in {images_key} and {len(labels[split])} labels in {labels_key} of {task.file}",
                "one label for each image",
            )
        names[split] = [f"{images_key}[{index}]" for index in range(len(images[split]))]
        done += len(images[split])
        if progress is not None:
            progress(done, done)
    classes, indices = classified(labels, names, declared_classes(task.classes), str(task.file))
    sets = {split: ImageSet(images[split], indices[split], names[split]) for split in images}
    missing = [split for split in ("test", "validation") if split not in sets]
    if missing:
        train = sets["train"]
        divided, more = fill_missing(train.labels, train.hashes, missing, f"arrays {task.file}")
        sets |= {split: subset(train, indices) for split, indices in divided.splits.items()}
        warnings += more
    train = sets["train"]
    train = subset(train, limited(train.labels, train.names, task.limit_per_class))
    return TaskData(task.name, classes, train, sets["validation"], sets["test"], warnings)


def _open(file: pathlib.Path) -> tuple[dict[str, npt.NDArray[Any]], tuple[str, ...]]:
    """Returns the arrays of images and labels, and warnings."""
    known = {prefix + kind for prefix in _PREFIXES for kind in ("images", "labels")}
    name = ""
    try:
        # Opened here: numpy leaves the file of a damaged archive open.
        with file.open("rb") as opened:
            if opened.read(4) not in (b"PK\x03\x04", b"PK\x05\x06"):
                raise DataError(f"found no .npz file at {file}", "arrays as numpy.savez writes them")
            opened.seek(0)
            archive = np.load(opened, allow_pickle=False)
            other = sorted(set(archive.files) - known)
            arrays = {}
            for name in known.intersection(archive.files):
                arrays[name] = archive[name]
                # numpy hands over the bytes of what does not begin as an array.
                if not isinstance(arrays[name], np.ndarray):
                    raise TypeError("no array as numpy writes them")
    except OSError as error:
        raise DataError(f"could not read {file} ({error.strerror or error})", "a .npz file", "set file of the task") from error
    except _DAMAGED as error:
        where = f"array {name!r} of {file}" if name else str(file)
        if "pickle" in str(error):
            raise DataError(
                f"found pickled objects in {where}", "plain numbers or strings", "save it with a dtype other than object"
            ) from error
        raise DataError(f"found a damaged {where} ({error})", "arrays as numpy.savez writes them", "save it again") from error
    if not other:
        return arrays, ()
    return arrays, (f"left alone arrays {', '.join(map(repr, other))} of {file}, whose names munet does not know",)


def _pairs(file: pathlib.Path, arrays: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Returns the names of the arrays of images and labels by split, train first."""
    pairs: dict[str, tuple[str, str]] = {}
    for prefix, split in _PREFIXES.items():
        names = (f"{prefix}images", f"{prefix}labels")
        there = [name for name in names if name in arrays]
        if len(there) == 1:
            raise DataError(f"found {there[0]} alone in {file}", f"{names[0]} and {names[1]}")
        if there and split in pairs:
            raise DataError(f"found {pairs[split][0]} and {names[0]} in {file}", f"one array of {split} images")
        if there:
            pairs[split] = names
    if "train" not in pairs:
        raise DataError(f"found arrays {sorted(arrays)} in {file}", "images and labels, or train_images and train_labels")
    return pairs


def _images(file: pathlib.Path, key: str, array: npt.NDArray[Any]) -> list[npt.NDArray[np.uint8]]:
    shaped = array.ndim == 3 or (array.ndim == 4 and array.shape[3] in (1, 3))
    if array.dtype != np.uint8 or not shaped or 0 in array.shape[1:]:
        raise DataError(
            f"found {key} of type {array.dtype} and shape {list(array.shape)} in {file}",
            "uint8, [images, height, width, 3] or [images, height, width, 1] or [images, height, width]",
            "scale values to 0 to 255" if array.dtype.kind == "f" else "",
        )
    try:
        return [to_rgb(image) for image in array]
    except ImageError as error:
        raise DataError(f"{error}, in {key} of {file}", "images") from error


def _labels(file: pathlib.Path, key: str, array: npt.NDArray[Any]) -> SomeLabels:
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim == 1 and array.dtype.kind in "iu":
        if len(array) and (int(array.min()) < 0 or int(array.max()) > 2**31):
            wrong = int(np.flatnonzero((array < 0) | (array > 2**31))[0])
            raise DataError(f"found label {int(array[wrong])} at {key}[{wrong}] of {file}", "whole numbers from 0, or strings")
        return array.astype(np.int64)
    if array.ndim == 1 and array.dtype.kind == "U":
        return [normalised(str(label)) for label in array]
    raise DataError(
        f"found {key} of type {array.dtype} and shape {list(array.shape)} in {file}",
        "whole numbers or strings, [images] or [images, 1]",
    )
