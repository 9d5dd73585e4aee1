"""Choosing images for splits: always by a hash of their names, so the choice is as good as random, and the same on every machine."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from evolve.data.task import ImageSet

Labels = npt.NDArray[np.int64]
"""[images] int64, indices of classes."""


def hashed_order(names: Sequence[str], salt: str) -> list[int]:
    """Returns the indices of all names in the order of a hash of salt and name: a shuffle that depends on nothing else."""
    keys = [hashlib.blake2b(f"{salt}\n{name}".encode("utf-8", "surrogateescape"), digest_size=16).digest() for name in names]
    return sorted(range(len(names)), key=lambda index: (keys[index], index))


def limited(labels: Labels, names: Sequence[str], limit: int | None) -> list[int]:
    """Returns indices of at most `limit` images of each class, in their own order; of all images without a limit."""
    if limit is None:
        return list(range(len(names)))
    taken: collections.Counter[int] = collections.Counter()
    chosen = []
    for index in hashed_order(names, "limit"):
        label = int(labels[index])
        if taken[label] < limit:
            taken[label] += 1
            chosen.append(index)
    return sorted(chosen)


def set_aside(labels: Labels, names: Sequence[str], count: int) -> tuple[list[int], list[int]]:
    """Takes the first `count` images in hashed order out of a training set, but never the last image of a class.

    Args:
        labels: of the training set.
        names: of the training set.
        count: images to take.

    Returns:
        Indices of the images taken, in hashed order, and of those that stay, in their own order. Fewer than `count` are taken if
        every class is down to one image.
    """
    left = collections.Counter(int(label) for label in labels)
    taken: list[int] = []
    for index in hashed_order(names, "split"):
        label = int(labels[index])
        if len(taken) < count and left[label] > 1:
            left[label] -= 1
            taken.append(index)
    gone = set(taken)
    return taken, [index for index in range(len(names)) if index not in gone]


def stratified(labels: Labels, names: Sequence[str], shares: Sequence[float], salt: str) -> list[list[int]]:
    """Divides each class in the same shares.

    Args:
        labels: of all images.
        names: of all images.
        shares: of the splits but the last, which takes what is left; each above 0, below 1 in all.
        salt: another gives another division.

    Returns:
        Indices of the images of each split, in their own order.
    """
    members: dict[int, list[int]] = {}
    for index in hashed_order(names, salt):
        members.setdefault(int(labels[index]), []).append(index)
    splits: list[list[int]] = [[] for _ in range(len(shares) + 1)]
    for indices in members.values():
        ends = [round(len(indices) * sum(shares[: split + 1])) for split in range(len(shares))]
        for split, (start, end) in enumerate(zip([0, *ends], [*ends, len(indices)], strict=True)):
            splits[split] += indices[start:end]
    return [sorted(split) for split in splits]


def subset(images: ImageSet, indices: Sequence[int]) -> ImageSet:
    """Returns the chosen images in the order of the indices."""
    return ImageSet(
        [images.images[index] for index in indices],
        images.labels[np.asarray(indices, dtype=np.int64)],
        [images.names[index] for index in indices],
    )


def shuffled(images: ImageSet) -> ImageSet:
    """Returns the images in a fixed shuffled order, so that the first few of them represent all."""
    return subset(images, hashed_order(images.names, "order"))
