import math

import pytest

from evolve.generation import TrainingLength
from evolve.hyperparameters import Hyperparameters
from evolve.training.schedule import learning_rate

LENGTH = TrainingLength(batch_size=1, intervals=2, batches_per_interval=5, validation_batches=1)


def rates(schedule: str, ratio: float, length: TrainingLength = LENGTH) -> list[float]:
    wanted = Hyperparameters(num_blocks=1, learning_rate=2.0, schedule=schedule, warmup_ratio=ratio)
    return [learning_rate(wanted, length, step) for step in range(length.num_steps)]


def test_cosine_warms_up_and_goes_down_towards_zero() -> None:
    # Ten steps, two of warm-up: 0.02 and half-way to 2, then 1 + cos(pi * 0/8), 1 + cos(pi * 1/8) ...
    expected = [0.02, 1.01, *(1 + math.cos(math.pi * step / 8) for step in range(8))]
    assert rates("cosine", 0.2) == pytest.approx(expected)
    assert rates("cosine", 0.2)[2] == 2.0
    assert rates("cosine", 0.2)[6] == pytest.approx(1.0)


def test_constant_is_half_throughout() -> None:
    assert rates("constant", 0.2) == [1.0] * 10


def test_restarts_repeat_the_cosine_in_every_interval() -> None:
    one = [0.02, *(1 + math.cos(math.pi * step / 4) for step in range(4))]
    assert rates("restarts", 0.2) == pytest.approx([*one, *one])


def test_warm_up_is_rounded_down_to_whole_steps() -> None:
    assert rates("cosine", 0.09)[0] == 2.0
    assert rates("cosine", 0.19)[:2] == [0.02, 2.0]


def test_warm_up_may_take_all_steps() -> None:
    assert rates("cosine", 1.0) == pytest.approx([0.02 + 1.98 * step / 10 for step in range(10)])


def test_one_step_is_possible() -> None:
    assert rates("restarts", 0.4, TrainingLength(1, 1, 1, 1)) == [2.0]
