"""A search of three tasks in which every rule has something to decide, with the trainer that answers at once."""

from __future__ import annotations

from evolve.closing import ActiveTask
from evolve.config import DefaultSettings, SearchSettings, TrainingSettings
from evolve.search import SearchPlan, run_rounds
from evolve.store import System
from tests.support.fake_trainer import FakeTrainer, QuietObserver

PLAN = SearchPlan(
    5,
    DefaultSettings(learning_rate=0.05, crop_area_min=0.2),
    SearchSettings(
        rounds=2, children_per_task=24, generation_size=8, mutation_rate=0.3, auto_tune=True, scale_factor=0.5, max_seeds=3
    ),
    TrainingSettings(batch_size=8, intervals=3),
)
NAMES = ("a", "b", "c")


def run(system: System, names=NAMES, plan=PLAN, trainer=None, **task) -> FakeTrainer:
    trainer = trainer or FakeTrainer()
    tasks = [(ActiveTask(name, ("x", "y", "z"), 50, "f", **task), lambda: trainer) for name in names]
    run_rounds(system, tasks, plan, QuietObserver())
    return trainer


def unscaled_plan(**search) -> SearchPlan:
    """PLAN without scale control, so that quality alone decides."""
    return SearchPlan(PLAN.seed, PLAN.defaults, PLAN.search.model_copy(update={"scale_factor": 1.0, **search}), PLAN.training)
