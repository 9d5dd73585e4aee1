"""The task of scikit-learn's handwritten digits: 1,797 real ones, 8 x 8 pixels, white on black.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository; the test part of it, as
scikit-learn ships it.
"""

from __future__ import annotations

import numpy as np

from evolve.config import DigitsTask
from evolve.data.splits import limited, stratified, subset
from evolve.data.task import ImageSet, TaskData
from munet.preprocessing import to_rgb

TRAIN_SHARE = 0.4
"""Share of each class to train on."""

VALIDATION_SHARE = 0.2
"""Share of each class to validate on; the rest is for the test."""


def load_digits(task: DigitsTask) -> TaskData:
    """Returns the digits, each class split 40/20/40 as `split_seed` says.

    The whole numbers 0 to 16 of a pixel become round(value * 255 / 16), halves up, as 8-bit grey, and grey becomes RGB.
    """
    # scikit-learn takes a second to import; only this source needs it.
    from sklearn.datasets import load_digits as load_bundled

    bundled = load_bundled()
    values = bundled.images.astype(np.int64)
    pixels = ((values * 255 + 8) // 16).astype(np.uint8)
    labels = bundled.target.astype(np.int64)
    names = [f"digits {index}" for index in range(len(pixels))]
    everything = ImageSet([to_rgb(image) for image in pixels], labels, names)
    shares = (TRAIN_SHARE, VALIDATION_SHARE)
    train, validation, test = (
        subset(everything, part) for part in stratified(labels, names, shares, f"digits {task.split_seed}")
    )
    train = subset(train, limited(train.labels, train.names, task.limit_per_class))
    return TaskData(task.name, tuple(str(digit) for digit in range(10)), train, validation, test)
