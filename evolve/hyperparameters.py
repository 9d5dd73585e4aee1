"""What may be tuned, in which steps.

Source: muNet (arXiv 2205.10937), table of hyperparameters; the lists stand in docs/vocabulary.md too.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Schedule = Literal["constant", "cosine", "restarts"]


class Group(enum.StrEnum):
    """Who a hyperparameter belongs to: a child (optimiser, structure) or all children of a generation (data)."""

    OPTIMISER = "optimiser"
    STRUCTURE = "structure"
    DATA = "data"


@dataclasses.dataclass(frozen=True)
class Hyperparameters:
    """All hyperparameters of a path.

    Attributes:
        num_blocks: transformer blocks kept, from the bottom; 1 or more.
        adapter_width: hidden width of every adapter of the path.
        learning_rate: peak learning rate, above 0.
        schedule: `cosine`: linear warm-up, then cosine towards 0 at the last step; `constant`: half the learning rate throughout;
            `restarts`: the cosine shape once per validation interval.
        warmup_ratio: share of the steps spent warming up, 0 to 1.
        momentum: 0 to 1, or None for plain SGD.
        nesterov: whether momentum looks ahead.
        image_size: height and width of the image a path sees, in pixels.
        crop_area_min: least share of the image a training crop keeps; 1 means no crop.
        crop_aspect_min: least aspect (width / height) of a training crop; the greatest is its inverse.
        flip: whether training images are mirrored at random.
        brightness: greatest shift of brightness, in shares of the value range.
        contrast: greatest relative change of contrast.
        saturation: greatest relative change of saturation.
        hue: greatest shift of hue, in turns of the colour circle.
    """

    num_blocks: int
    adapter_width: int = 32
    learning_rate: float = 0.01
    schedule: Schedule = "cosine"
    warmup_ratio: float = 0.1
    momentum: float | None = 0.9
    nesterov: bool = False
    image_size: int = 32
    crop_area_min: float = 0.05
    crop_aspect_min: float = 0.75
    flip: bool = True
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def replace(self, **changes: Any) -> Hyperparameters:
        """Returns a copy with these changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns them by name."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Hyperparameters:
        """Returns what `to_dict` gave.

        Raises:
            TypeError: a name is unknown or `num_blocks` is missing.
        """
        return Hyperparameters(**values)


@dataclasses.dataclass(frozen=True)
class Tunable:
    """A hyperparameter that mutates one step at a time along its list.

    Attributes:
        name: its name in `Hyperparameters`.
        group: who it belongs to.
        options: its values in order.
    """

    name: str
    group: Group
    options: tuple[Any, ...]

    def step(self, value: Any, up: bool) -> Any:
        """Returns the neighbour of a value, clamped at the ends.

        A number that is not in the list (a default of the user's own) moves to the nearest option on that side.
        """
        if value in self.options:
            index = self.options.index(value) + (1 if up else -1)
            return self.options[min(max(index, 0), len(self.options) - 1)]
        beyond = [option for option in self.options if (_order(option) > _order(value)) == up]
        if not beyond:
            return value
        return beyond[0] if up else beyond[-1]


def _order(value: Any) -> float:
    return -1.0 if value is None else float(value)


def tunables(*, max_blocks: int, patch_size: int) -> tuple[Tunable, ...]:
    """Returns everything that can be tuned on a root, in the fixed order in which mutations are drawn.

    Args:
        max_blocks: number of blocks of the root.
        patch_size: height and width of the root's patches, in pixels; only image sizes that it divides are options.
    """
    deltas = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
    sizes = tuple(size for size in range(16, 385, 16) if size % patch_size == 0)
    options: Sequence[tuple[str, Group, tuple[Any, ...]]] = (
        ("num_blocks", Group.STRUCTURE, tuple(range(1, max_blocks + 1))),
        ("adapter_width", Group.STRUCTURE, (8, 16, 32, 64, 128)),
        ("learning_rate", Group.OPTIMISER, (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)),
        ("schedule", Group.OPTIMISER, ("constant", "cosine", "restarts")),
        ("warmup_ratio", Group.OPTIMISER, (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4)),
        ("momentum", Group.OPTIMISER, (None, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)),
        ("nesterov", Group.OPTIMISER, (False, True)),
        ("image_size", Group.DATA, sizes),
        ("crop_area_min", Group.DATA, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)),
        ("crop_aspect_min", Group.DATA, (0.25, 0.5, 0.75, 1.0)),
        ("flip", Group.DATA, (False, True)),
        ("brightness", Group.DATA, deltas),
        ("contrast", Group.DATA, deltas),
        ("saturation", Group.DATA, deltas),
        ("hue", Group.DATA, deltas),
    )
    return tuple(Tunable(name, group, values) for name, group, values in options)


DATA_NAMES = tuple(t.name for t in tunables(max_blocks=1, patch_size=1) if t.group is Group.DATA)
"""Names of the hyperparameters that all children of a generation share."""
