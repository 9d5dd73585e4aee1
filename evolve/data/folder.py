"""Tasks of images in folders: one folder per class, its name the label.

    FOLDER/cat/1.png  FOLDER/dog/old/7.jpg                        without splits
    FOLDER/train/cat/1.png  FOLDER/validation/cat/2.png  ...      with splits; also called val or valid, and test

- Folders directly below FOLDER (or a split) are the classes, in the order of their NFC names; images may lie in folders below them.
- Splits are meant if there is a folder `train` that holds folders, or if no folder is called otherwise than a split.
- A missing split is taken from the training images: the first 5 % for each missing one, the test first, at least one image, in
  the order of a hash of their names (class by class, as folders lie, 5 % would be one class). The last image of a class is never taken.
- Images are told by the ending of their name. Hidden files and files with other endings are passed over; an image that cannot be
  read, or whose format is none of munet's, is an error that names it.

All images are held in memory, decoded, in their own sizes: height * width * 3 bytes each.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import pathlib
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from evolve.config import FolderTask
from evolve.data.splits import Labels, limited, set_aside
from evolve.data.task import ImageSet, TaskData
from evolve.errors import DataError
from munet.preprocessing import FORMATS, ImageError, ImageLimits, Pixels, decode

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

LIMITS = ImageLimits(max_bytes=256 * 1024 * 1024)
"""One's own files may be larger than what a server takes from a stranger."""

SHARE = 0.05
"""Share of the training images that each missing split takes."""

_SPLITS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}
_THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass(frozen=True)
class _Files:
    """Files of one split, ordered by class and name; labels [files] int64."""

    paths: Sequence[pathlib.Path]
    names: Sequence[str]
    labels: Labels

    def __len__(self) -> int:
        return len(self.paths)

    def choose(self, indices: Sequence[int]) -> _Files:
        chosen = np.asarray(indices, dtype=np.int64)
        return _Files([self.paths[i] for i in indices], [self.names[i] for i in indices], self.labels[chosen])


def load_folder(task: FolderTask, progress: Callable[[int, int], None] | None = None) -> TaskData:
    """Reads all images of a folder.

    Args:
        task: its settings.
        progress: is told after each image how many are done, and of how many.

    Raises:
        DataError: no such folder; no classes; a class without images; a class in validation or test that train does not have; two
            classes of one name; an image that belongs to no class, or cannot be read.
    """
    folder = task.folder
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        raise DataError(f"found {what} at {folder}", "a folder with one folder of images per class", "set folder of the task")
    labels, files = _find(folder)
    files = _fill(files, folder)
    train = files["train"]
    files["train"] = train.choose(limited(train.labels, train.names, task.limit_per_class))
    total = sum(len(split) for split in files.values())
    done = 0

    def tell() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    images = {split: ImageSet(_decode_all(found.paths, tell), found.labels, found.names) for split, found in files.items()}
    return TaskData(task.name, labels, images["train"], images["validation"], images["test"])


def _find(folder: pathlib.Path) -> tuple[tuple[str, ...], dict[str, _Files]]:
    """Returns the class names and the files of the splits that are there."""
    folders = _class_folders(folder)
    split_folders = _split_folders(folder, folders)
    if split_folders is None:
        return tuple(folders), {"train": _list_split(folder, folder, folders, tuple(folders))}
    classes = {split: _class_folders(path) for split, path in split_folders.items()}
    labels = tuple(classes["train"])
    for split, found in classes.items():
        unknown = sorted(found.keys() - classes["train"].keys())
        if unknown:
            raise DataError(
                f"found class {unknown[0]!r} in {split_folders[split]} but not in {split_folders['train']}",
                "every class among the training images",
                "add training images of it, or take it away",
            )
    return labels, {split: _list_split(folder, split_folders[split], found, labels) for split, found in classes.items()}


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
    known = [name for name in folders if name.casefold() in _SPLITS]
    others = [name for name in folders if name.casefold() not in _SPLITS]
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
        split = _SPLITS[name.casefold()]
        if split in splits:
            raise DataError(f"found {splits[split].name}/ and {name}/ in {folder}", f"one folder for the {split} images")
        splits[split] = folders[name]
    if "train" not in splits:
        raise DataError(f"found {' and '.join(f'{name}/' for name in known)} but no train/ in {folder}", "train/ beside them")
    return {split: splits[split] for split in ("train", "validation", "test") if split in splits}


def _list_split(root: pathlib.Path, folder: pathlib.Path, classes: dict[str, pathlib.Path], labels: tuple[str, ...]) -> _Files:
    paths: list[pathlib.Path] = []
    numbers: list[int] = []
    for name, path in classes.items():
        found = list(_images_below(path))
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
    return _Files(paths, names, np.array(numbers, dtype=np.int64))


def _images_below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields the images in a folder and below, sorted by name within each folder."""
    for entry in sorted(_visible(folder), key=lambda path: unicodedata.normalize("NFC", path.name)):
        if entry.is_dir():
            # A link to a folder above would never end.
            if not entry.is_symlink() or not folder.resolve().is_relative_to(entry.resolve()):
                yield from _images_below(entry)
        elif _is_image(entry):
            yield entry


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
    try:
        return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"could not read folder {folder} ({error.strerror})", "a folder that can be read") from error


def _is_image(file: pathlib.Path) -> bool:
    ending = file.suffix.lower()
    if ending in FOREIGN_ENDINGS:
        raise DataError(f"found {file}, an image of another format", f"{', '.join(FORMATS)}", "convert it, or take it away")
    return ending in ENDINGS


def _fill(files: dict[str, _Files], folder: pathlib.Path) -> dict[str, _Files]:
    """Takes the missing splits out of the training images."""
    train = files["train"]
    num_classes = len(set(train.labels.tolist()))
    missing = [split for split in ("test", "validation") if split not in files]
    each = max(1, int(SHARE * len(train)))
    taken, kept = set_aside(train.labels, train.names, each * len(missing))
    if len(taken) < each * len(missing):
        raise DataError(
            f"found {len(train)} training images of {num_classes} classes in {folder} and no {' and no '.join(missing)} images",
            f"{each * len(missing)} training images more than classes, to be set aside",
            "add images",
        )
    filled = {"train": train.choose(kept), **{split: found for split, found in files.items() if split != "train"}}
    for place, split in enumerate(missing):
        filled[split] = train.choose(taken[place * each : (place + 1) * each])
    return filled


def _decode_all(paths: Sequence[pathlib.Path], tell: Callable[[], None]) -> list[Pixels]:
    """Returns the pixels of files in their order, decoded in threads; calls `tell` after each."""
    images = []
    # decode sets and resets the process-wide warning filters, which threads would do across each other: around them all, once.
    with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        warnings.simplefilter("ignore")
        try:
            for image in pool.map(_decode_file, paths):
                images.append(image)
                tell()
        finally:
            pool.shutdown(cancel_futures=True)
    return images


def _decode_file(file: pathlib.Path) -> Pixels:
    try:
        return decode(file.read_bytes(), LIMITS)
    except OSError as error:
        raise DataError(
            f"could not read {file} ({error.strerror})", "a file that can be read", "mend it or take it away"
        ) from error
    except ImageError as error:
        raise DataError(f"could not read the image {file}: {error}", "a whole image", "mend it, or take it away") from error
