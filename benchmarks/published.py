"""What was published to be measured. Apart from what makes it: processes that measure a server need no torch."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Published:
    """A system that was exported.

    Attributes:
        repository: the model repository.
        whole: each task's route as one ONNX file, by name.
        shared: share of one forward pass, by floating point operations, in layers that all tasks have in common.
        image_size: in pixels.
    """

    repository: pathlib.Path
    whole: Mapping[str, pathlib.Path]
    shared: float
    image_size: int
