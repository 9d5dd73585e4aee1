"""Choosing images for splits: always by a hash of names or contents, so the choice is as good as random, and the same everywhere."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from evolve.data.task import ImageSet, LazyImages
from evolve.errors import DataError

Labels = npt.NDArray[np.int64]
"""[images] int64, indices of classes."""

SHARE = 0.05
"""Share of the training images that each missing split takes."""


@dataclasses.dataclass(frozen=True)
class Pinned:
    """A training set divided.

    Attributes:
        splits: indices of the images of `train` and of each split that was missing, in their own order.
        moved: images that are in a split by need, not by their place.
    """

    splits: dict[str, list[int]]
    moved: int


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


def pinned(labels: Labels, contents: Sequence[bytes], missing: Sequence[str]) -> Pinned:
    """Divides a training set among train and the splits that are missing, each image by its own content.

    An image's place is the first 8 bytes of the hash of its content, as a share of all there are: below 0.05 it is a test image, from 0.05
    to 0.1 a validation image, above a training image. If one of the two splits is not missing, its share stays in train. So an image
    stays in its split whatever is added, and the same content is never in two splits. Only need overrules this: a class keeps
    the image with the highest place for training, and a split that would be empty gets the one with the lowest.

    Args:
        labels: of the training set.
        contents: of each image, a hash that is evenly distributed, 8 bytes or more.
        missing: of `test` and `validation`, the splits wanted.

    Returns:
        Where each image goes. A split may be empty if every class is down to one image.
    """
    places = [int.from_bytes(content[:8]) / 2**64 for content in contents]
    order = sorted(range(len(places)), key=lambda index: (places[index], contents[index], index))
    splits = [_split_of(place, missing) for place in places]
    moved = 0
    left = collections.Counter(int(label) for label, split in zip(labels, splits, strict=True) if split == "train")
    for index in reversed(order):
        if not left[int(labels[index])]:
            splits[index] = "train"
            left[int(labels[index])] += 1
            moved += 1
    for split in missing:
        if split not in splits:
            spare = next((index for index in order if splits[index] == "train" and left[int(labels[index])] > 1), None)
            if spare is not None:
                splits[spare] = split
                left[int(labels[spare])] -= 1
                moved += 1
    chosen = {split: [index for index in range(len(splits)) if splits[index] == split] for split in ("train", *missing)}
    return Pinned(chosen, moved)


def fill_missing(
    labels: Labels, contents: Sequence[bytes], missing: Sequence[str], source: str
) -> tuple[Pinned, tuple[str, ...]]:
    """Divides a training set as `pinned` does.

    Args:
        labels: see `pinned`.
        contents: see `pinned`.
        missing: see `pinned`.
        source: where the images come from, for messages.

    Returns:
        Where each image goes, and warnings.

    Raises:
        DataError: too few images to give one to each split.
    """
    divided = pinned(labels, contents, missing)
    num_classes = len(set(labels.tolist()))
    if not all(divided.splits.values()):
        raise DataError(
            f"found {len(labels)} training images of {num_classes} classes in {source} and no {' and no '.join(missing)} images",
            f"at least {len(missing)} training images more than classes, to be set aside",
            "add images",
        )
    if not divided.moved:
        return divided, ()
    return divided, (
        f"{source} has so few images, in all or of a class, that {divided.moved} of {len(labels)} were put into a split by need and not by "
        "their content: those may change splits when images are added; to fix splits for good, put the images into train/, validation/ "
        "and test/ (or a split column, or arrays of each split)",
    )


def _split_of(place: float, missing: Sequence[str]) -> str:
    for number, split in enumerate(("test", "validation")):
        if number * SHARE <= place < (number + 1) * SHARE and split in missing:
            return split
    return "train"


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
        images.images.choose(indices) if isinstance(images.images, LazyImages) else [images.images[index] for index in indices],
        images.labels[np.asarray(indices, dtype=np.int64)],
        [images.names[index] for index in indices],
    )


def shuffled(images: ImageSet) -> ImageSet:
    """Returns the images in a fixed shuffled order, so that the first few of them represent all."""
    return subset(images, hashed_order(images.names, "order"))
