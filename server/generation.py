"""What a server serves: one generation of tasks, immutable and free of protos and files' formats."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import threading
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

ANY = -1
"""In a shape: any size goes."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that goes into or comes out of a segment.

    Attributes:
        name: as the ONNX model and Triton call it.
        data_type: `uint8`, `float32` or `float16`.
        shape: without the batch; `ANY` where any size goes.
    """

    name: str
    data_type: str
    shape: tuple[int, ...]

    @property
    def known_bytes(self) -> int:
        """Size of a row, in bytes; 0 if a size is open."""
        return 0 if ANY in self.shape else np.dtype(self.data_type).itemsize * math.prod(self.shape)

    def accepts(self, other: TensorSpec) -> bool:
        """Whether a tensor of the other kind may be fed where this one is expected."""
        return self.data_type == other.data_type and shapes_agree(self.shape, other.shape)

    def __str__(self) -> str:
        return f"{self.data_type} {list(self.shape)}"


def shapes_agree(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether some tensor has both shapes."""
    return len(one) == len(other) and all(a == b or ANY in (a, b) for a, b in zip(one, other, strict=True))


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A run of layers that is one ONNX model. Segments of the same name are the same in all generations.

    Attributes:
        name: `seg-` and 12 hex digits.
        model: its ONNX file.
        input: what it takes.
        output: what it gives.
        max_batch_size: rows in one batch, at most.
        num_parameters: weights in it.
        sha256: checksum of its ONNX file in hex; whoever loads it makes sure that it still is that file.
    """

    name: str
    model: pathlib.Path
    input: TensorSpec
    output: TensorSpec
    max_batch_size: int
    num_parameters: int
    sha256: str


_PARSING = threading.Lock()
"""numpy reads a header with Python's own parser, which before Python 3.11.8 fails now and then (SystemError) if two threads are in it."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Golden:
    """What a task's route must answer to some real images.

    Attributes:
        images: file of the images, .npy, uint8 [images, height, width, 3].
        logits: [images, classes] float32.
        tolerance: greatest absolute difference allowed.
    """

    images: pathlib.Path
    logits: npt.NDArray[np.float32]
    tolerance: float

    def read_images(self) -> npt.NDArray[np.uint8]:
        """Returns [images, height, width, 3] uint8.

        Raises:
            OSError, ValueError: the file is no such array.
        """
        with _PARSING:
            images = np.load(self.images, allow_pickle=False)
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(f"found {images.dtype} {list(images.shape)}, expected uint8 [images, height, width, 3]")
        return np.ascontiguousarray(images)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Task:
    """A task that is served.

    Attributes:
        name: its name.
        path_id: the path that answers for it.
        route: names of the segments in the order they run.
        ensemble: name of its content-named ensemble in Triton.
        labels: class names in the order of the logits.
        image_size: height and width, in pixels, of the RGB image that the route takes.
        quality: validation accuracy, 0 to 1.
        test_accuracy: test accuracy, 0 to 1; none if it has no test split.
        golden: what its route must answer.
    """

    name: str
    path_id: str
    route: tuple[str, ...]
    ensemble: str
    labels: tuple[str, ...]
    image_size: int
    quality: float
    test_accuracy: float | None
    golden: Golden


def is_told_alike(one: Task, other: Task) -> bool:
    """Whether callers are told the same of two tasks, and get the same answers; in which generation they are does not matter."""
    return _told(one) == _told(other)


def _told(task: Task) -> tuple[object, ...]:
    return task.name, task.path_id, task.labels, task.image_size, task.quality, task.test_accuracy, task.route


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """All tasks that are served together. Two of them are equal only if they are the same object.

    Attributes:
        number: counted from 1.
        digest: sha256 of its file, in hex: which generation it is, even if a repository was made anew.
        segments: by name, ascending.
        tasks: by name, ascending.
        ensembles: names of the ensembles in Triton that answer all tasks of an image size at once, by the size in pixels.
        previous: number of the generation that it was published on top of; 0 for the first.
    """

    number: int
    digest: str
    segments: Mapping[str, Segment]
    tasks: Mapping[str, Task]
    ensembles: Mapping[int, str]
    previous: int = 0
