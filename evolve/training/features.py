"""What frozen layers give for images that never change: computed once, kept on the device within a budget.

Validation images are always the same, training images if augmentation draws nothing. A frozen prefix, the layers of a path below its lowest
trainable one, then gives the same hidden states in every epoch, for every child that has it, in every generation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
import torch

Key = tuple[Hashable, tuple[str, ...]]
"""Which images, and the ids of the layers of a prefix in order."""


class FeatureCache:
    """Hidden states by images and prefix. Where room is wanted, what nobody holds goes, what was asked for longest ago first."""

    def __init__(self, budget_bytes: int) -> None:
        """Starts empty.

        Args:
            budget_bytes: at most so much is kept; 0 keeps nothing.
        """
        self._budget_bytes = budget_bytes
        self._kept: OrderedDict[Key, torch.Tensor] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """What is kept, in bytes."""
        return sum(value.nbytes for value in self._kept.values())

    def get(
        self,
        key: Key,
        num_images: int,
        image_bytes: int,
        compute: Callable[[int, torch.Tensor | None, np.ndarray], torch.Tensor],
        rows_at_once: int,
        held: set[Key],
    ) -> torch.Tensor | None:
        """Returns the hidden states of all images after a prefix, [images, ...]; None if there is no room beside what is held.

        Args:
            key: which images and which prefix.
            num_images: how many there are.
            image_bytes: at most so much is kept of each.
            compute: gives the hidden states of some images: of the layers from the given number on, out of what those before gave, or out
                of the images themselves (None), whose indices are given too.
            rows_at_once: images that are computed at a time.
            held: what the caller holds; this is added to it.
        """
        if key in self._kept:
            self._kept.move_to_end(key)
            held.add(key)
            return self._kept[key]
        if num_images * image_bytes + sum(self._kept[other].nbytes for other in held) > self._budget_bytes:
            return None
        images, prefix = key
        known = next((n for n in range(len(prefix) - 1, 0, -1) if (images, prefix[:n]) in self._kept), 0)
        before = self._kept[images, prefix[:known]] if known else None
        chunks: list[torch.Tensor] = []
        for start in range(0, num_images, rows_at_once):
            rows = np.arange(start, min(start + rows_at_once, num_images))
            chunks.append(compute(known, None if before is None else before[start : start + rows_at_once], rows))
        found = torch.cat(chunks)
        for other in [other for other in self._kept if other not in held]:
            if self.num_bytes + found.nbytes <= self._budget_bytes:
                break
            del self._kept[other]
        self._kept[key] = found
        held.add(key)
        return found

    def clear(self) -> None:
        """Forgets everything."""
        self._kept.clear()
