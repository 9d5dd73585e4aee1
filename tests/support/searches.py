"""Small whole searches with the trainer that answers at once, some of them killed on their way."""

from __future__ import annotations

import pathlib
from typing import Any

from evolve.closing import ActiveTask
from evolve.config import DefaultSettings, SearchSettings, TrainingSettings
from evolve.search import SearchPlan, run_rounds
from evolve.store import System
from tests.support.fake_trainer import FakeTrainer, QuietObserver, tiny_root


class Killed(Exception):
    """Stands for the end of a process."""


class MortalTrainer(FakeTrainer):
    """Dies after so many children."""

    def __init__(self, lives: int) -> None:
        super().__init__()
        self._lives = lives

    def train(self, plan):
        for pack in super().train(plan):
            if self._lives == 0:
                raise Killed
            self._lives -= 1
            yield pack


class InterruptedTrainer(FakeTrainer):
    """Lets something else happen before its n-th child."""

    def __init__(self, before: int, happens) -> None:
        super().__init__()
        self._before = before
        self._happens = happens

    def train(self, plan):
        for pack in super().train(plan):
            if self._before == 0:
                self._happens()
            self._before -= 1
            yield pack

    def examine(self, path):
        if self._before == 0:
            self._happens()
        return super().examine(path)


def small_plan(seed: int = 0, **search: Any) -> SearchPlan:
    """Two rounds of eight children, in which all that can mutate does so often."""
    values = {"rounds": 2, "children_per_task": 8, "generation_size": 4, "mutation_rate": 0.3, "auto_tune": True}
    return SearchPlan(seed, DefaultSettings(), SearchSettings(**{**values, **search}), TrainingSettings(batch_size=8))


SHORT_PLAN = small_plan(rounds=2, children_per_task=4)
"""A short one, where it is not the search that is tried."""


def evolve_tasks(
    folder: pathlib.Path,
    names: str = "ab",
    plan: SearchPlan | None = None,
    trainer: FakeTrainer | None = None,
    fingerprint: str = "f",
) -> System:
    """Brings tasks with names of one letter to the plan's rounds, in a system that is made if there is none."""
    system = System.open(folder) if System.exists(folder) else System.create(folder, tiny_root(), 32)
    tasks = [(ActiveTask(name, ("x", "y", "z"), 40, f"{fingerprint}-{name}"), lambda: trainer or FakeTrainer()) for name in names]
    run_rounds(system, tasks, plan or small_plan(), QuietObserver())
    return system
