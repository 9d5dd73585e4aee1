"""Tasks of data sets as Hugging Face's library `datasets` reads them: from the hub, or from a folder in one of its layouts.

- A folder is what the library makes of it: folders of images (with or without a table of metadata), or Parquet files, with images in them.
- Nothing is fetched unless the task says so; what is on this machine already is used. No code of a data set is ever run.
- The image column is the only one of images, the label column the only one of class labels (or else `label` or `labels`).
- Labels are class labels, whose names the set declares, names, or whole numbers. The setting `classes` fixes classes and their order.
- Images stay encoded in the library's files until they are read. Pixels are what munet makes of those bytes, as everywhere.
- A split that is missing is taken from the training images, each image by the hash of its bytes: see splits.pinned.
"""

from __future__ import annotations

import contextlib
import logging
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from evolve.config import HuggingFaceTask
from evolve.data.classes import SomeLabels, classified, declared_classes, normalised, unknown_class
from evolve.data.folder import SPLIT_NAMES
from evolve.data.listed import load_listed, source_of
from evolve.data.reading import Files, Unreadable
from evolve.data.stored import EncodedImage, FetchedImage, FileImage, StoredImage
from evolve.data.task import TaskData
from evolve.errors import DataError, SettingsError
from munet.names import similar_names
from munet.preprocessing import ImageError


def load_huggingface(task: HuggingFaceTask, progress: Callable[[int, int], None] | None = None) -> TaskData:
    """Returns the images of a data set that Hugging Face's library reads: in memory, or from the cache if the task has one.

    Args:
        task: its settings.
        progress: see evolve.data.listed.load_listed.

    Raises:
        SettingsError: the packages of the extra `huggingface` are missing.
        DataError: no such folder or set, or one that is not on this machine and is not to be fetched, or cannot be; files that the library
            cannot read; no column of images or labels, or several; labels that are neither names nor whole numbers, or outside the classes;
            no training split; what `load_listed` raises.
    """
    datasets = _library()
    with _quiet(datasets, offline=not task.download):
        tables, warnings = _open(datasets, task)
    columns = _columns(datasets, task, tables["train"].features)
    for split, table in tables.items():
        if {name: table.features.get(name) for name in columns} != {name: tables["train"].features[name] for name in columns}:
            raise DataError(
                f"found other columns in the {split} split of {source_of(task)} than in the training split",
                f"{columns[0]!r} and {columns[1]!r} alike in every split",
            )
    names = {split: [f"{split}[{index}]" for index in range(len(table))] for split, table in tables.items()}
    labels, declared = _labels(datasets, task, columns[1], tables, names)
    classes, indices = classified(labels, names, declared, source_of(task))
    files = {}
    for split, table in tables.items():
        fetch = _fetch_from(datasets, table, columns[0])
        images = [FetchedImage(fetch, index) for index in range(len(table))]
        files[split] = Files(images, names[split], indices[split], [f"{name} of {source_of(task)}" for name in names[split]])
    data = load_listed(task, classes, files, Unreadable(task.skip_unreadable), progress)
    return TaskData(data.name, data.labels, data.train, data.validation, data.test, (*warnings, *data.warnings))


def _library() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        raise SettingsError(
            f"found no module {missing!r}", "the packages of 'huggingface'", "pip install '.[huggingface]'"
        ) from error
    return datasets


@contextlib.contextmanager
def _quiet(datasets: Any, offline: bool) -> Iterator[None]:
    """Keeps the library from fetching anything, and from logging what we say ourselves.

    Args:
        datasets: the library.
        offline: whether it is not to fetch anything.
    """
    import huggingface_hub.constants

    # Both read the environment once, when they are imported.
    switches: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    verbosity = datasets.utils.logging.get_verbosity()
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    if offline:
        datasets.disable_progress_bars()
        for switch in switches:
            switch.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value


def _open(datasets: Any, task: HuggingFaceTask) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns the tables of the splits, train among them, and warnings."""
    is_local = pathlib.Path(task.path).is_absolute()
    if is_local and not pathlib.Path(task.path).is_dir():
        what = "a file" if pathlib.Path(task.path).exists() else "nothing"
        raise DataError(f"found {what} at {task.path}", "a folder of images or Parquet files", "set path of the task")
    if is_local and task.revision is not None:
        raise DataError(f"found revision {task.revision!r} for the folder {task.path}", "revisions of sets on the hub alone")
    found = _load(datasets, task, None)
    wanted = {"train": task.train_split, "validation": task.validation_split, "test": task.test_split}
    named: dict[str, str] = {}
    for name in found:
        split = SPLIT_NAMES.get(name.casefold())
        if split is None or wanted[split] is not None:
            continue
        if split in named:
            raise DataError(
                f"found splits {named[split]!r} and {name!r} in {source_of(task)}",
                f"one {split} split",
                f"set {split}_split to one of them, or to both: {split}_split = '{named[split]}+{name}'",
            )
        named[split] = name
    tables = {split: found[name] for split, name in named.items()}
    tables |= {split: _load(datasets, task, name) for split, name in wanted.items() if name is not None}
    if "train" not in tables:
        raise DataError(
            f"found splits {sorted(found)} in {source_of(task)}", "one called 'train'", "set train_split to the one to train on"
        )
    asked_for = re.split(r"[^\w.]+", " ".join([*named.values(), *(name for name in wanted.values() if name is not None)]))
    left = [name for name in found if name not in asked_for]
    if not left:
        return tables, ()
    return tables, (f"left alone splits {', '.join(map(repr, left))} of {source_of(task)}, whose names munet does not know",)


def _load(datasets: Any, task: HuggingFaceTask, split: str | None) -> Any:
    """Returns a table, or the tables of all splits by name."""
    import pyarrow as pa

    failures = (
        OSError,
        ValueError,
        RuntimeError,
        TypeError,
        AttributeError,
        LookupError,
        ArithmeticError,
        AssertionError,
        EOFError,
        ImportError,
        zipfile.BadZipFile,
        pa.lib.ArrowException,
        datasets.exceptions.DatasetsError,
    )
    try:
        return datasets.load_dataset(task.path, name=task.config, revision=task.revision, split=split)
    except failures as error:
        raise _unopened(datasets, task, error) from error


def _unopened(datasets: Any, task: HuggingFaceTask, error: BaseException) -> DataError:
    words = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
    what = f"could not open {source_of(task)} ({words[:500]})"
    if pathlib.Path(task.path).is_absolute():
        return DataError(what, "a folder that Hugging Face's library datasets reads", "mend the files or the settings")
    if not task.download and isinstance(error, ConnectionError | datasets.exceptions.DatasetNotFoundError):
        return DataError(
            f"found no folder {task.path!r} beside the experiment, and no such data set of the hub on this machine",
            "one of them",
            "mend path, or set download = true to fetch the data set",
        )
    return DataError(what, "a data set of the hub", "mend the settings" + "; is there a network?" * task.download)


def _columns(datasets: Any, task: HuggingFaceTask, features: Any) -> tuple[str, str]:
    """Returns the names of the columns of images and of labels."""
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    labels = labels or [name for name in ("label", "labels") if name in features]
    chosen = []
    for setting, given, candidates in (("image_column", task.image_column, images), ("label_column", task.label_column, labels)):
        if given is not None and given not in features:
            similar = similar_names(given, list(features))
            raise DataError(
                f"found columns {list(features)} in {source_of(task)}",
                f"a column {given!r}",
                f"did you mean {' or '.join(map(repr, similar))}?" if similar else f"set {setting}",
            )
        if given is None and len(candidates) != 1:
            found = f"columns {candidates}" if candidates else f"columns {list(features)}"
            raise DataError(
                f"found {found} in {source_of(task)}",
                f"one column of {setting.partition('_')[0]}s",
                f"set {setting} to one of them",
            )
        chosen.append(given if given is not None else candidates[0])
    if not _holds_images(datasets, features[chosen[0]]):
        raise DataError(
            f"found column {chosen[0]!r} of type {features[chosen[0]]} in {source_of(task)}",
            "images, or the bytes of image files",
            f"set image_column to one of {images}" if images else "",
        )
    return chosen[0], chosen[1]


def _holds_images(datasets: Any, feature: Any) -> bool:
    is_file = isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
    return is_file or isinstance(feature, datasets.Image) or getattr(feature, "dtype", "") in ("binary", "large_binary")


def _labels(
    datasets: Any, task: HuggingFaceTask, column: str, tables: dict[str, Any], names: dict[str, list[str]]
) -> tuple[dict[str, SomeLabels], tuple[str, ...] | None]:
    """Returns the labels of each split, and the classes that the task or else the set declares."""
    feature = tables["train"].features[column]
    declared = declared_classes(task.classes)
    kind = getattr(feature, "dtype", "")
    own = [normalised(name) for name in feature.names] if isinstance(feature, datasets.ClassLabel) else None
    if not isinstance(feature, datasets.ClassLabel | datasets.Value) or kind not in _NAMES | _NUMBERS:
        raise DataError(
            f"found labels of type {feature} in column {column!r} of {source_of(task)}",
            "class labels, names or whole numbers, one for each image",
            "set label_column",
        )
    labels: dict[str, SomeLabels] = {}
    for split, table in tables.items():
        values = table[column][:]
        if None in values:
            raise DataError(f"found no label for {names[split][values.index(None)]} of {source_of(task)}", "one for each image")
        if kind in _NAMES:
            labels[split] = [normalised(value) for value in values]
            continue
        limit = len(own) if own is not None else 2**31
        outside = [index for index, value in enumerate(values) if not 0 <= value < limit]
        if outside:
            raise DataError(
                f"found label {values[outside[0]]} for {names[split][outside[0]]} of {source_of(task)}",
                f"0 to {limit - 1}" + f", the indices of its {limit} classes" * (own is not None),
                f"a split without labels, which are often -1, is no {split} split: set {split}_split",
            )
        numbers = np.array(values, dtype=np.int64)
        labels[split] = numbers if own is None or declared is None else [own[number] for number in numbers]
    if own is None:
        return labels, declared
    stranger = next((name for name in own if name not in declared), None) if declared is not None else None
    if declared is not None and stranger is not None:
        raise unknown_class(stranger, f"in {source_of(task)}", declared)
    return labels, declared or tuple(own)


_NAMES = {"string", "large_string"}
_NUMBERS = {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


def _fetch_from(datasets: Any, table: Any, column: str) -> Callable[[int], StoredImage]:
    """Returns what gives the image of a row as it is stored."""
    table = table.select_columns([column])
    if isinstance(table.features[column], datasets.Image):
        # Nothing is converted by this; other columns are as they are, and would be.
        table = table.cast_column(column, datasets.Image(decode=False))

    def fetch(index: int) -> StoredImage:
        stored = table[index][column]
        if isinstance(stored, bytes):
            return EncodedImage(stored)
        if stored is None or (stored["bytes"] is None and stored["path"] is None):
            raise ImageError("found no image, expected one in each row")
        return FileImage(pathlib.Path(stored["path"])) if stored["bytes"] is None else EncodedImage(stored["bytes"])

    return fetch
