"""Tasks of images that a table lists: a CSV file with a line of column names and then one line an image.

    file,label,split
    birds/1.jpg,sparrow,train

- Cells are read as RFC 4180 says, quotes included; space around paths and labels does not count, and labels are normalised to NFC.
- Paths are relative to the setting `folder`, by default the table's own folder; each image appears once.
- A split column is used for all lines or none. Without it, or where it leaves out a split, see splits.pinned.
- Errors name the line, counted from 1 as editors do.
"""

from __future__ import annotations

import codecs
import csv
import io
import pathlib
import stat
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from evolve.config import CsvTask
from evolve.data.classes import declared_classes, normalised, sorted_classes, unknown_class
from evolve.data.folder import SPLIT_NAMES
from evolve.data.listed import image_folder, load_listed
from evolve.data.reading import Files, Unreadable
from evolve.data.stored import FileImage
from evolve.data.task import TaskData
from evolve.errors import DataError


class _Row(NamedTuple):
    line: int
    image: str
    label: str
    split: str


def load_csv(task: CsvTask, progress: Callable[[int, int], None] | None = None) -> TaskData:
    """Returns the images of a table: in memory, or from the cache if the task has one.

    Args:
        task: its settings.
        progress: see evolve.data.listed.load_listed.

    Raises:
        DataError: no such table; not in its encoding; no such columns; a line with other cells than the first, an empty cell, an
            unknown split, a label that is not declared, an image that is listed twice or is not there; no training images; an image
            that cannot be read; a cache that cannot be used.
    """
    rows = _read(task)
    if not rows:
        raise DataError(f"found no images in {task.file}", "a line for each image below the column names", "add some")
    if not any(row.split == "train" for row in rows):
        raise DataError(f"found no line of the train split in {task.file}", "one or more images to train on")
    classes = declared_classes(task.classes)
    if classes is None:
        classes = sorted_classes(row.label for row in rows)
    unreadable = Unreadable(task.skip_unreadable)
    rows = _present(task, rows, unreadable)
    index_of = {name: index for index, name in enumerate(classes)}
    for row in rows:
        if row.label not in index_of:
            raise unknown_class(row.label, f"in line {row.line} of {task.file}", classes)
    splits = {split: [row for row in rows if row.split == split] for split in ("train", "validation", "test")}
    files = {split: _files(task, found, index_of) for split, found in splits.items() if found}
    return load_listed(task, classes, files, unreadable, progress)


def _files(task: CsvTask, rows: Sequence[_Row], index_of: dict[str, int]) -> Files:
    folder = image_folder(task)
    return Files(
        [FileImage(folder / row.image) for row in rows],
        [unicodedata.normalize("NFC", row.image) for row in rows],
        np.array([index_of[row.label] for row in rows], dtype=np.int64),
        [f"{folder / row.image} (line {row.line} of {task.file})" for row in rows],
    )


def _present(task: CsvTask, rows: Sequence[_Row], unreadable: Unreadable) -> list[_Row]:
    """Returns the rows whose images are there, each once."""
    lines: dict[str, int] = {}
    present = []
    for row in rows:
        name = unicodedata.normalize("NFC", row.image)
        if name in lines:
            raise DataError(
                f"found image {row.image!r} in lines {lines[name]} and {row.line} of {task.file}",
                "each image once",
                "take one away",
            )
        lines[name] = row.line
        path = image_folder(task) / row.image
        what = _what_is(path)
        if what is None:
            present.append(row)
            continue
        error = DataError(
            f"found {what} at {path}, the image in line {row.line} of {task.file}",
            f"an image file; paths are relative to {image_folder(task)}",
            "mend the path, or set folder",
        )
        unreadable.add(name, error)
    return present


def _what_is(path: pathlib.Path) -> str | None:
    """Returns what is found instead of a file, None if there is a file."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        # A text in the column of paths is too long for a path, for one.
        return "no file" if isinstance(error, FileNotFoundError) else f"no file ({error.strerror})"
    except ValueError as error:
        return f"no file ({error})"
    return "a folder, no file," if stat.S_ISDIR(mode) else None if stat.S_ISREG(mode) else "a device, no file,"


def _read(task: CsvTask) -> list[_Row]:
    cells = _cells(task)
    header = next(cells, None)
    if header is None:
        raise DataError(f"found an empty table in {task.file}", "a line of column names and one line an image")
    columns = _columns(task, [name.strip() for name in header[1]])
    rows = []
    for line, values in cells:
        if len(values) != len(header[1]):
            raise DataError(
                f"found {len(values)} cells in line {line} of {task.file}",
                f"{len(header[1])}, as in its first line",
                "put cells that hold the delimiter into quotes",
            )
        image, label, split = (values[column].strip() if column is not None else "train" for column in columns)
        if not image or not label:
            which = task.label_column if image else task.image_column
            raise DataError(f"found an empty cell in line {line} of {task.file}, column {which!r}", "a value", "fill it in")
        if split.casefold() not in SPLIT_NAMES:
            raise DataError(
                f"found split {split!r} in line {line} of {task.file}", "train, validation (also called val or valid) or test"
            )
        rows.append(_Row(line, image, normalised(label), SPLIT_NAMES[split.casefold()]))
    return rows


def _columns(task: CsvTask, names: list[str]) -> tuple[int, int, int | None]:
    """Returns where the columns of images, labels and splits are; None for the last if there is none."""
    twice = sorted({name for name in names if names.count(name) > 1})
    split = task.split_column if task.split_column is not None else "split"
    if task.split_column is None and split not in names:
        # Passing it over would train on test images.
        for name in names:
            if name.casefold() == split and name not in (task.image_column, task.label_column):
                raise DataError(
                    f"found column {name!r} in {task.file}",
                    f"a split column to be called {split!r}, or set",
                    f"set split_column = {name!r}; if it says something else, call it otherwise",
                )
    wanted = [task.image_column, task.label_column] + [split] * (split in names or task.split_column is not None)
    for setting, name in zip(("image_column", "label_column", "split_column"), wanted, strict=False):
        if name in twice:
            raise DataError(f"found column {name!r} more than once in {task.file}", "each column once")
        if name not in names:
            other = next((mark for mark in ";\t|," if mark != task.delimiter and len(names) == 1 and mark in names[0]), None)
            raise DataError(
                f"found columns {names} in {task.file}",
                f"a column {name!r}",
                f"set {setting}" if other is None else f"set delimiter = {other!r}",
            )
    positions = [names.index(name) for name in wanted]
    return positions[0], positions[1], positions[2] if len(positions) > 2 else None


def _cells(task: CsvTask) -> Iterator[tuple[int, list[str]]]:
    """Yields the cells of each line that is not empty, with the number of the line in which they begin."""
    reader = csv.reader(io.StringIO(_text(task), newline=""), delimiter=task.delimiter, skipinitialspace=True, strict=True)
    line = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f"found no CSV in line {line} of {task.file} ({error})", f"cells with {task.delimiter!r} between them"
            ) from error
        if cells:
            yield line, cells
        line = reader.line_num + 1


def _text(task: CsvTask) -> str:
    raw = _bytes(task)
    try:
        # A byte order mark is no part of the first column's name.
        text = raw.decode(_codec(task)).removeprefix("\ufeff")
    except LookupError as error:
        raise _unknown_encoding(task) from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"found bytes in line {line} of {task.file} that are not {task.encoding} ({error.reason})",
            "text in one encoding",
            "save it as UTF-8, or set encoding, such as 'cp1252'",
        ) from error
    except UnicodeError as error:
        # Some of Python's encodings do not say where.
        raise DataError(
            f"found bytes in {task.file} that are not {task.encoding} ({error})",
            "text in one encoding",
            "set encoding, such as 'utf-8'",
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"found a zero byte in line {line} of {task.file}", f"{task.encoding} text", "set encoding, such as 'utf-16'"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Encodings with escapes can spell what no path takes.
        line = text.count("\n", 0, error.start) + 1
        raise DataError(f"found half of a surrogate pair in line {line} of {task.file}", "whole characters") from error
    return text


def _bytes(task: CsvTask) -> bytes:
    try:
        return task.file.read_bytes()
    except OSError as error:
        raise DataError(f"could not read {task.file} ({error.strerror})", "a CSV file", "set file of the task") from error
    except ValueError as error:
        raise DataError(f"found {str(task.file)!r}, which is no path ({error})", "a CSV file", "set file of the task") from error


def _codec(task: CsvTask) -> str:
    try:
        return codecs.lookup(task.encoding).name
    except (LookupError, ValueError) as error:
        raise _unknown_encoding(task) from error


def _unknown_encoding(task: CsvTask) -> DataError:
    return DataError(f"found encoding {task.encoding!r}", "an encoding that Python knows, such as 'utf-8' or 'cp1252'")
