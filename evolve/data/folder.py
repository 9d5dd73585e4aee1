"""Tasks of images in folders: one folder per class, its name the label.

    FOLDER/cat/1.png  FOLDER/dog/old/7.jpg                        without splits
    FOLDER/train/cat/1.png  FOLDER/validation/cat/2.png  ...      with splits; also called val or valid, and test

- Folders directly below FOLDER (or a split) are the classes, in the order of their NFC names; images may lie in folders below them.
- Splits are meant if there is a folder `train` that holds folders, or if no folder is called otherwise than a split.
- A missing split is taken from the training images, about 5 % of them, each image by the hash of its file: see splits.pinned.
- The setting `classes` fixes the classes and their order; a folder of another name is an error then.
- Images are told by the ending of their name. Hidden files and files with other endings are passed over; an image that cannot be
  read, or whose format is none of munet's, is an error that names it. Names are UTF-8.
- Links to folders are followed, but one from a class into another class is an error: its images would have two labels.
"""

from __future__ import annotations

import collections
import itertools
import os
import pathlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from evolve.config import FolderTask
from evolve.data.classes import declared_classes, unknown_class
from evolve.data.listed import load_listed
from evolve.data.reading import Files, Unreadable
from evolve.data.stored import FileImage
from evolve.data.task import TaskData
from evolve.errors import DataError
from munet.preprocessing import FORMATS

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff")
"""Endings, in small letters, of files that are read."""

FOREIGN_ENDINGS = (
    ".gif",
    ".heic",
    ".heif",
    ".avif",
    ".jp2",
    ".j2k",
    ".jxl",
    ".psd",
    ".svg",
    ".tga",
    ".ppm",
    ".pgm",
    ".pbm",
    ".ico",
)
"""Endings of images in other formats: passing them over in silence would lose data."""

SPLIT_NAMES = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}
"""What splits may be called, in small letters, and what we call them."""


def load_folder(task: FolderTask, progress: Callable[[int, int], None] | None = None) -> TaskData:
    """Returns the images of a folder: in memory, or from the cache if the task has one.

    Args:
        task: its settings.
        progress: see evolve.data.listed.load_listed.

    Raises:
        DataError: no such folder; no classes; a class without images; a class in validation or test that train does not have; two
            classes or files of one name; a class that is not declared; a link from a class into another; an image that belongs to no
            class, or cannot be read; a name that is not UTF-8; a cache that cannot be used.
    """
    folder = task.folder
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        raise DataError(f"found {what} at {folder}", "a folder with one folder of images per class", "set folder of the task")
    labels, files = _find(folder, declared_classes(task.classes))
    return load_listed(task, labels, files, Unreadable(task.skip_unreadable), progress)


def _find(folder: pathlib.Path, declared: tuple[str, ...] | None) -> tuple[tuple[str, ...], dict[str, Files]]:
    """Returns the class names and the files of the splits that are there."""
    folders = _class_folders(folder)
    split_folders = _split_folders(folder, folders) or {"train": folder}
    classes = {split: folders if path == folder else _class_folders(path) for split, path in split_folders.items()}
    for split, found in classes.items():
        unknown = sorted(found.keys() - (classes["train"].keys() if declared is None else set(declared)))
        if unknown and declared is not None:
            raise unknown_class(unknown[0], f"in {split_folders[split]}", declared)
        if unknown:
            raise DataError(
                f"found class {unknown[0]!r} in {split_folders[split]} but not in {split_folders['train']}",
                "every class among the training images",
                "add training images of it, or take it away",
            )
    labels = tuple(classes["train"]) if declared is None else declared
    owners = _Owners((path.resolve(), name) for found in classes.values() for name, path in found.items())
    return labels, {split: _list_split(folder, split_folders[split], found, labels, owners) for split, found in classes.items()}


def _class_folders(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the folders directly below one by NFC name, in the order of the names."""
    found: dict[str, pathlib.Path] = {}
    for entry in sorted(_visible(folder)):
        if not entry.is_dir():
            if _is_image(entry):
                raise DataError(
                    f"found image {entry} outside of any class", "images in one folder per class", "move it into a class, or away"
                )
            continue
        name = unicodedata.normalize("NFC", entry.name)
        if name in found:
            raise DataError(
                f"found two folders that are both class {name!r} once Unicode is normalised in {folder}",
                "one folder per class",
                "put their images together",
            )
        found[name] = entry
    return dict(sorted(found.items()))


def _split_folders(folder: pathlib.Path, folders: dict[str, pathlib.Path]) -> dict[str, pathlib.Path] | None:
    """Returns the folders of the splits, train first, or None if the folders are classes."""
    if not folders:
        raise DataError(f"found no folders in {folder}", "one folder of images per class, or train/ with such folders")
    known = [name for name in folders if name.casefold() in SPLIT_NAMES]
    others = [name for name in folders if name.casefold() not in SPLIT_NAMES]
    train = next((path for name, path in folders.items() if name.casefold() == "train"), None)
    if others and (train is None or not any(entry.is_dir() for entry in _visible(train))):
        return None
    if others:
        raise DataError(
            f"found folder {others[0]!r} beside train/ in {folder}",
            "only train/, validation/ and test/",
            "move it away, or into train/ if it is a class",
        )
    splits: dict[str, pathlib.Path] = {}
    for name in known:
        split = SPLIT_NAMES[name.casefold()]
        if split in splits:
            raise DataError(f"found {splits[split].name}/ and {name}/ in {folder}", f"one folder for the {split} images")
        splits[split] = folders[name]
    if "train" not in splits:
        raise DataError(f"found {' and '.join(f'{name}/' for name in known)} but no train/ in {folder}", "train/ beside them")
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}


class _Owners:
    """The folders of all classes in all splits: tells which links lead from one into another."""

    def __init__(self, folders: Iterable[tuple[pathlib.Path, str]]) -> None:
        """Takes where each folder really lies, and the name of its class."""
        self._at: dict[pathlib.Path, list[tuple[pathlib.Path, str]]] = {}
        self._below: dict[pathlib.Path, list[tuple[pathlib.Path, str]]] = {}
        for folder in folders:
            self._at.setdefault(folder[0], []).append(folder)
            for above in (folder[0], *folder[0].parents):
                self._below.setdefault(above, []).append(folder)

    def check(self, link: pathlib.Path, target: pathlib.Path, own: tuple[pathlib.Path, str]) -> None:
        """Checks a link.

        Args:
            link: where it is.
            target: where it really leads.
            own: the class folder that it is in.

        Raises:
            DataError: it leads to images of another class folder.
        """
        near = itertools.chain(self._below.get(target, ()), *(self._at.get(above, ()) for above in target.parents))
        other = next((folder for folder in near if folder != own), None)
        if other is not None:
            raise DataError(
                f"found link {link} to {target}, which is, holds or lies in another class folder, {other[0]}",
                "each image in one class folder",
                "take the link away",
            )


def _list_split(
    root: pathlib.Path,
    folder: pathlib.Path,
    classes: dict[str, pathlib.Path],
    labels: tuple[str, ...],
    owners: _Owners,
) -> Files:
    paths: list[pathlib.Path] = []
    numbers: list[int] = []
    for name, path in sorted(classes.items(), key=lambda item: labels.index(item[0])):
        # A class may be a link itself, and the folders of one class in two splits the same one: load.oddities counts what they share.
        own = (path.resolve(), name)
        if path.is_symlink():
            owners.check(path, own[0], own)
        found = list(_images_below(path, own[:1], own, owners))
        if not found:
            raise DataError(
                f"found no images of class {name!r} in {path}",
                f"one or more files that end in {', '.join(ENDINGS)}",
                "add some, or take the folder away",
            )
        paths += found
        numbers += [labels.index(name)] * len(found)
    if not paths:
        raise DataError(f"found no class folders in {folder}", "one folder of images per class")
    names = [unicodedata.normalize("NFC", path.relative_to(root).as_posix()) for path in paths]
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"found two files called {twice[0]!r} once Unicode is normalised in {root}", "one", "rename one of them")
    return Files([FileImage(path) for path in paths], names, np.array(numbers, dtype=np.int64), [str(path) for path in paths])


def _images_below(
    folder: pathlib.Path, way: tuple[pathlib.Path, ...], own: tuple[pathlib.Path, str], owners: _Owners
) -> Iterator[pathlib.Path]:
    """Yields the images in a folder and below, sorted by name within each folder.

    Args:
        folder: where to look.
        way: where the folder and those that led to it really lie, from the class folder on.
        own: where the class folder really lies, and the name of the class.
        owners: all class folders.

    Raises:
        DataError: a link into a folder of another class; see `load_folder`.
    """
    for entry in sorted(_visible(folder), key=lambda path: unicodedata.normalize("NFC", path.name)):
        if entry.is_dir():
            here = way[-1] / entry.name
            if entry.is_symlink():
                here = entry.resolve()
                owners.check(entry, here, own)
                # A link to a folder above, or to one that led here over other links, would never end.
                if any(above.is_relative_to(here) for above in way):
                    continue
            yield from _images_below(entry, (*way, here), own, owners)
        elif _is_image(entry):
            yield entry


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        found = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"could not read folder {folder} ({error.strerror})", "a folder that can be read") from error
    for entry in found:
        # The operating system allows any bytes; Python then holds halves of surrogate pairs, which no file or screen takes.
        if not entry.name.isascii() and entry.name != entry.name.encode("utf-8", "replace").decode():
            raise DataError(
                f"found the name {os.fsencode(entry.name)!r} in {folder}, which is not UTF-8", "names in UTF-8", "rename it"
            )
    return found


def _is_image(file: pathlib.Path) -> bool:
    ending = file.suffix.lower()
    if ending in FOREIGN_ENDINGS:
        raise DataError(f"found {file}, an image of another format", f"{', '.join(FORMATS)}", "convert it, or take it away")
    return ending in ENDINGS
