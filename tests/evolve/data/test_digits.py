"""The bundled handwritten digits: exact pixels, stratified splits by seed."""

import numpy as np
from sklearn.datasets import load_digits as load_bundled

from evolve.config import DigitsTask
from evolve.data.load import load_task
from evolve.data.task import TaskData


def load(**settings: object) -> TaskData:
    return load_task(DigitsTask(name="digits", source="digits", **settings))  # type: ignore[arg-type]


def test_splits_are_stratified_and_disjoint() -> None:
    data = load()
    assert data.labels == tuple("0123456789")
    assert data.test is not None
    total = np.bincount(load_bundled().target)
    for images, share in ((data.train, 0.4), (data.validation, 0.2), (data.test, 0.4)):
        assert (np.abs(np.bincount(images.labels) - share * total) <= 1).all()
    names = [*data.train.names, *data.validation.names, *data.test.names]
    assert len(set(names)) == len(names) == 1797


def test_pixels_are_exact() -> None:
    bundled = load_bundled().images
    train = load().train
    for pixels, name in zip(train.images, train.names, strict=True):
        values = bundled[int(name.split()[1])]
        assert pixels.shape == (8, 8, 3)
        assert np.array_equal(pixels[..., 0], np.floor(values * 255 / 16 + 0.5).astype(np.uint8))
        assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_seed_and_limit() -> None:
    first, again, other, limited = load(), load(), load(split_seed=1), load(limit_per_class=7)
    assert first.fingerprint == again.fingerprint
    assert set(first.train.names) != set(other.train.names)
    assert np.bincount(limited.train.labels).tolist() == [7] * 10
    assert limited.validation.names == first.validation.names
