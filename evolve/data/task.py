"""A task's data as the search and the trainer see it."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from munet.preprocessing import Pixels, resize


class LazyImages(Sequence[Pixels]):
    """Images that are read when they are asked for, each [height, width, 3] uint8; a slice of them is lazy again."""

    @property
    @abc.abstractmethod
    def sizes(self) -> npt.NDArray[np.int64]:
        """Height and width of each image, [images, 2], without reading one."""

    @property
    @abc.abstractmethod
    def hashes(self) -> tuple[bytes, ...]:
        """What `hash_of` gives for each image, without reading one."""

    @property
    @abc.abstractmethod
    def scratch(self) -> pathlib.Path:
        """A folder on disk for what else does not fit into memory."""

    @abc.abstractmethod
    def choose(self, indices: Iterable[int]) -> LazyImages:
        """Returns the chosen images in the order of the indices."""

    @abc.abstractmethod
    def remembered(self, key: str, compute: Callable[[], str]) -> str:
        """Returns the hash that was computed for `key` in this or an earlier process; computes it if there is none.

        Args:
            key: hex digits that stand for what it is computed from.
            compute: gives 64 hex digits.
        """


def hash_of(pixels: Pixels) -> bytes:
    """Returns the SHA-256 of an image's shape and pixels, 32 bytes."""
    digest = hashlib.sha256(np.array(pixels.shape, dtype=np.int64).tobytes())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images of one split, decoded, in their own sizes.

    Attributes:
        images: each [height, width, 3] uint8, RGB, as munet.preprocessing.decode gives it; sizes may differ. A list, or LazyImages.
        labels: [images] int64, indices of classes.
        names: where each image comes from, for messages.
    """

    images: Sequence[Pixels]
    labels: npt.NDArray[np.int64]
    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.images)

    @functools.cached_property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Height and width of each image, [images, 2]."""
        if isinstance(self.images, LazyImages):
            return self.images.sizes
        return np.array([image.shape[:2] for image in self.images], dtype=np.int64).reshape(-1, 2)

    @functools.cached_property
    def hashes(self) -> tuple[bytes, ...]:
        """What `hash_of` gives for each image."""
        return self.images.hashes if isinstance(self.images, LazyImages) else tuple(hash_of(image) for image in self.images)

    def resized(self, size: int, count: int | None = None) -> Pixels:
        """Returns the images as a path sees them in evaluation: munet.preprocessing.resize, the one serving uses.

        Args:
            size: height and width, in pixels.
            count: only the first so many; all by default.

        Returns:
            [images, size, size, 3] uint8.
        """
        chosen = self.images[: len(self.images) if count is None else count]
        result: Pixels = np.empty((len(chosen), size, size, 3), dtype=np.uint8)
        for row, image in enumerate(chosen):
            result[row] = resize(image, size)
        return result

    def digest(self) -> str:
        """Returns a hash of all pixels and labels, hex; the same one whether the images are in memory or not."""
        if isinstance(self.images, LazyImages):
            key = hashlib.sha256(self.labels.tobytes() + b"".join(self.hashes)).hexdigest()
            return self.images.remembered(key, self._digest)
        return self._digest()

    def _digest(self) -> str:
        digest = hashlib.sha256(self.labels.tobytes())
        for image in self.images:
            digest.update(np.array(image.shape, dtype=np.int64).tobytes())
            digest.update(np.ascontiguousarray(image).data)
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class TaskData:
    """All data of one task. The order of a split's images is fixed; validation and test images are in a shuffled, fixed order.

    Attributes:
        name: of the task.
        labels: class names, as the data set declares them, in the order of the indices.
        train: images to train on.
        validation: images that quality is measured on.
        test: images that are looked at once, when a path becomes current; None if there are none.
        warnings: what a person should know about these data, each one line; part of no fingerprint.
    """

    name: str
    labels: tuple[str, ...]
    train: ImageSet
    validation: ImageSet
    test: ImageSet | None
    warnings: tuple[str, ...] = ()

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of class names, images, labels and splits: the same data give the same one. 32 hex digits."""
        parts = [self.train.digest(), self.validation.digest(), self.test.digest() if self.test is not None else ""]
        return hashlib.sha256("\n".join([*self.labels, "", *parts]).encode()).hexdigest()[:32]
