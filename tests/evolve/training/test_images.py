from typing import Any

import numpy as np
import pytest
import torch

from evolve.data.task import ImageSet
from evolve.training.images import evaluation_images, storage_shape, training_images
from munet.preprocessing import resize

CPU = torch.device("cpu")


def image_set(*shapes: tuple[int, int]) -> ImageSet:
    random = np.random.default_rng(0)
    pixels = [random.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    return ImageSet(pixels, np.arange(len(shapes), dtype=np.int64), [str(shape) for shape in shapes])


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(28, 28), (28, 28)], (28, 28)),
        ([(64, 40), (64, 40)], (64, 40)),
        ([(65, 65)], (64, 64)),
        ([(20, 20), (30, 10)], (30, 30)),
        ([(20, 20), (500, 300)], (64, 64)),
    ],
)
def test_storage_shape(shapes: Any, expected: tuple[int, int]) -> None:
    assert storage_shape(np.array(shapes), 32) == expected


def test_training_images_of_one_small_size_stay_as_they_are() -> None:
    images = image_set((20, 24), (20, 24), (20, 24))
    stored = training_images(images, 32, CPU)
    pixels, labels, sizes = stored.take(np.array([2, 0]))
    assert np.array_equal(pixels.numpy(), np.stack([images.images[2], images.images[0]]))
    assert labels.tolist() == [2, 0]
    assert sizes.tolist() == [[20.0, 24.0], [20.0, 24.0]]


def test_other_training_images_are_resized_and_remember_their_size() -> None:
    images = image_set((100, 50), (20, 24))
    stored = training_images(images, 16, CPU)
    assert np.array_equal(stored.pixels[0].numpy(), resize(images.images[0], 32))
    assert stored.sizes.tolist() == [[100.0, 50.0], [20.0, 24.0]]


def test_evaluation_sees_the_bytes_that_serving_sees() -> None:
    images = image_set((100, 50), (20, 24), (16, 16))
    stored = evaluation_images(images, 16, 2, CPU)
    assert len(stored) == 2
    assert np.array_equal(stored.pixels.numpy(), images.resized(16)[:2])
