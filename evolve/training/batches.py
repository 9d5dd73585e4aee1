"""Which images make each batch, and the random numbers that augment them: pure functions of a seed and the number of the step.

What one child consumes thus never moves what another sees, whoever trains them, in whatever order, on whatever device.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Branches of the generation's seed.
_ORDER, _AUGMENTATION = 0, 1


class BatchOrder:
    """Full batches that run across epochs, each epoch a full shuffle."""

    def __init__(self, num_images: int, batch_size: int, seed: int) -> None:
        """Prepares the order.

        Args:
            num_images: training images, 1 or more; may be fewer than a batch.
            batch_size: images a batch.
            seed: the generation's `data_seed`.
        """
        self._num_images = num_images
        self._batch_size = batch_size
        self._seed = seed
        self._epoch: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, dtype=np.int64))

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """Returns the images of a step, counted from 0: indices [batch_size]."""
        start = step * self._batch_size
        epochs, places = np.divmod(np.arange(start, start + self._batch_size), self._num_images)
        return np.concatenate([self._shuffled(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])

    def _shuffled(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._epoch[0] != epoch:
            self._epoch = (epoch, np.random.default_rng([self._seed, _ORDER, epoch]).permutation(self._num_images))
        return self._epoch[1]


def draws(seed: int, step: int, batch_size: int, num_draws: int) -> npt.NDArray[np.float32]:
    """Returns the random numbers of a step's augmentation.

    Args:
        seed: the generation's `data_seed`.
        step: counted from 0.
        batch_size: images a batch.
        num_draws: numbers an image.

    Returns:
        [batch_size, num_draws] float32, uniform in [0, 1).
    """
    return np.random.default_rng([seed, _AUGMENTATION, step]).random((batch_size, num_draws), dtype=np.float32)
