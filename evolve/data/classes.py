"""Names of classes: as a task's settings give them, or sorted."""

from __future__ import annotations

import collections
import pathlib
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from evolve.errors import DataError
from munet.names import similar_names

SomeLabels = npt.NDArray[np.int64] | Sequence[str]
"""[images] whole numbers, or names of classes, normalised."""


def normalised(name: str) -> str:
    """Returns the one spelling of a class name: in NFC, without space around it."""
    return unicodedata.normalize("NFC", name).strip()


def declared_classes(classes: Sequence[str] | pathlib.Path | None) -> tuple[str, ...] | None:
    """Returns the classes that a task's settings declare, normalised, in their order; None if they declare none.

    Args:
        classes: names, or a UTF-8 file with one name a line; empty lines do not count.

    Raises:
        DataError: the file cannot be read, an empty name, or a name twice.
    """
    if classes is None:
        return None
    if isinstance(classes, pathlib.Path):
        where = f"the class list {classes}"
        names = [normalised(line) for line in _lines(classes) if line.strip()]
    else:
        where = "the setting classes"
        names = [normalised(name) for name in classes]
    if "" in names:
        raise DataError(f"found an empty name in {where}", "names of classes")
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"found class {twice[0]!r} more than once in {where}, once Unicode is normalised", "each class once")
    return tuple(names)


def sorted_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Returns distinct names in the order of their characters; by value if all are whole numbers."""
    distinct = set(names)
    if all(name.isascii() and name.isdigit() for name in distinct):
        return tuple(sorted(distinct, key=_value))
    return tuple(sorted(distinct))


def _value(digits: str) -> tuple[int, str, str]:
    """Returns what orders whole numbers by value, however long: int refuses thousands of digits."""
    significant = digits.lstrip("0")
    return len(significant), significant, digits


def classified(
    labels: Mapping[str, SomeLabels],
    names: Mapping[str, Sequence[str]],
    declared: tuple[str, ...] | None,
    source: str,
) -> tuple[tuple[str, ...], dict[str, npt.NDArray[np.int64]]]:
    """Returns the classes of a source whose labels are names or numbers, and each split's labels as indices of them.

    Numbers are indices of the declared classes; load.check refuses those that are none. Without declared classes each number is the name of
    a class. Names are those of declared classes, or all there are, sorted.

    Args:
        labels: of each split.
        names: what each image is called in messages.
        declared: what `declared_classes` gives.
        source: where the labels come from, for messages.

    Raises:
        DataError: names in one split and numbers in another; a name that is not declared.
    """
    if len({isinstance(found, np.ndarray) for found in labels.values()}) > 1:
        raise DataError(f"found strings and whole numbers among the labels of {source}", "one kind of labels in all splits")
    numbers = {split: found for split, found in labels.items() if isinstance(found, np.ndarray)}
    if declared is not None and numbers:
        return declared, numbers
    texts = {split: [str(label) for label in found] for split, found in labels.items()}
    classes = declared or sorted_classes(label for found in texts.values() for label in found)
    index_of = {name: index for index, name in enumerate(classes)}
    for split, found in texts.items():
        for name, label in zip(names[split], found, strict=True):
            if label not in index_of:
                raise unknown_class(label, f"for {name} of {source}", classes)
    return classes, {split: np.array([index_of[label] for label in found], dtype=np.int64) for split, found in texts.items()}


def unknown_class(name: str, where: str, classes: Sequence[str]) -> DataError:
    """Returns the error for a label that is none of the declared classes."""
    similar = similar_names(name, classes)
    return DataError(
        f"found class {name!r} {where}, which is not among the {len(classes)} classes that the task declares",
        "only those",
        f"did you mean {' or '.join(map(repr, similar))}?" if similar else "add it to classes, or take it away",
    )


def _lines(file: pathlib.Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DataError(
            f"could not read the class list {file} ({error.strerror})", "a text file with one class name a line"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"found a class list {file} that is not UTF-8 ({error})", "a UTF-8 text file") from error
    except ValueError as error:
        raise DataError(
            f"found {str(file)!r} as the class list, which is no path ({error})", "the path of a text file"
        ) from error
