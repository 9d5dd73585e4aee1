"""Parents: best first, less likely the more children they had, and every seed or member has its chance."""

import collections
import random

import pytest

from evolve.path import Path
from evolve.population import Population
from evolve.selection import choose_parent
from evolve.store import System
from tests.support.fake_trainer import tiny_root


@pytest.fixture
def root(tmp_path):
    return System.create(tmp_path / "system", tiny_root(), 32).root


def _named(root: Path, quality: float) -> Path:
    return Path.of(task=None, layers=root.layers, hyperparameters=root.hyperparameters, parent_id=root.id, quality=quality)


class Draws(random.Random):
    """Answers `random` from a list and `choice` with the last."""

    def __init__(self, *numbers: float) -> None:
        super().__init__(0)
        self.numbers = list(numbers)
        self.offered: list[Path] = []

    def random(self) -> float:
        return self.numbers.pop(0)

    def choice(self, seq):
        self.offered = list(seq)
        return self.offered[-1]


def test_walks_from_best_to_worst_and_the_earlier_first_on_ties(root):
    population = Population()
    paths = [_named(root, quality) for quality in (0.5, 0.9, 0.9001)]
    population.add(paths[0], 0.5)
    population.add(paths[1], 0.9)
    population.add(paths[2], 0.9)
    for path in paths:
        population[path.id].num_children = 1
    assert choose_parent([root], population, Draws(0.4)) is paths[1]
    assert choose_parent([root], population, Draws(0.5, 0.49)) is paths[2]
    assert choose_parent([root], population, Draws(0.5, 0.5, 0.4)) is paths[0]


def test_a_path_without_children_is_always_accepted(root):
    population = Population()
    path = _named(root, 0.1)
    population.add(path, 0.1)
    assert choose_parent([root], population, Draws(0.999999)) is path


def test_each_child_halves_the_odds(root):
    population = Population()
    path = _named(root, 0.1)
    population.add(path, 0.1)
    population[path.id].num_children = 3
    assert choose_parent([root], population, Draws(0.1249)) is path
    fallback = Draws(0.125)
    choose_parent([root], population, fallback)
    assert fallback.offered == [root, path]


def test_the_fallback_is_uniform_over_seeds_and_population(root):
    population = Population()
    path = _named(root, 0.1)
    population.add(path, 0.1)
    population[path.id].num_children = 60
    other = _named(root, 0.3)
    generator = random.Random(1)
    counts = collections.Counter(choose_parent([root, other], population, generator).id for _ in range(3000))
    assert set(counts) == {root.id, other.id, path.id}
    assert all(900 < count < 1100 for count in counts.values())
