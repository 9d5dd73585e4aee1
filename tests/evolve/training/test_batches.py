import numpy as np
import pytest

from evolve.training.batches import BatchOrder, draws


@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 4), (10, 10), (3, 8), (1, 5)])
def test_full_batches_run_across_epochs_and_each_epoch_has_every_image_once(num_images: int, batch_size: int) -> None:
    order = BatchOrder(num_images, batch_size, seed=1)
    batches = [order.indices(step) for step in range(num_images * 2)]
    assert all(batch.shape == (batch_size,) for batch in batches)
    stream = np.concatenate(batches)
    for start in range(0, len(stream) - num_images + 1, num_images):
        assert sorted(stream[start : start + num_images]) == list(range(num_images))


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    order, other = BatchOrder(50, 16, seed=3), BatchOrder(50, 16, seed=3)
    forwards = [order.indices(step) for step in range(10)]
    backwards = [other.indices(step) for step in reversed(range(10))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    assert not np.array_equal(BatchOrder(50, 16, seed=4).indices(0), forwards[0])


def test_epochs_are_shuffled_anew() -> None:
    order = BatchOrder(40, 40, seed=0)
    assert not np.array_equal(order.indices(0), order.indices(1))


def test_draws_follow_seed_and_step() -> None:
    first = draws(7, 2, 16, 5)
    assert first.shape == (16, 5)
    assert first.dtype == np.float32
    assert first.min() >= 0
    assert first.max() < 1
    assert np.array_equal(first, draws(7, 2, 16, 5))
    assert not np.array_equal(first, draws(7, 3, 16, 5))
    assert not np.array_equal(first, draws(8, 2, 16, 5))
