"""Systems that a search has made, without torch: many tasks, varied structure, baselines, in seconds."""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib

from evolve.closing import ActiveTask
from evolve.config import DefaultSettings, SearchSettings, TrainingSettings
from evolve.generation import ChildPlan, ChildResult, GenerationPlan, Origin
from evolve.journal import Journal
from evolve.search import SearchPlan, run_rounds
from evolve.store import System
from tests.support.fake_trainer import FakeTrainer, QuietObserver, tiny_root

NAMES = (
    "digits",
    "greek",
    "armenian",
    "hebrew",
    "georgian",
    "a-task-whose-name-is-as-long-as-names-of-tasks-may-be-which-is-64",
    "nko",
    "lao",
)


class WorkingTrainer(FakeTrainer):
    """Answers with qualities that a search can raise, times as of real training, and a child in twenty that diverges."""

    def __init__(self) -> None:
        super().__init__(quality=_quality, test_accuracy=None)

    def _result(self, plan: GenerationPlan, child: ChildPlan) -> ChildResult:
        result = super()._result(plan, child)
        draw = _draw(f"{plan.task}/{plan.index}/{child.index}")
        qualities, diverged = result.interval_qualities, draw < 0.05
        if diverged:
            qualities = (qualities[0], qualities[1], 0.0)
        seconds = 2 + 3 * draw
        return dataclasses.replace(
            result,
            interval_qualities=qualities,
            diverged=diverged,
            num_trained_images=1280,
            flops=1e12 * (1 + draw),
            train_seconds=seconds,
            evaluate_seconds=seconds / 5,
        )

    def examine(self, path):
        examples = super().examine(path)
        # Some tasks have no test split.
        lost = _draw(path.id) / 30
        return dataclasses.replace(examples, test_accuracy=None if path.task == "lao" else (path.quality or 0) - lost)


def _draw(name: str) -> float:
    """A number from 0 to 1 that follows from a name."""
    return hashlib.sha256(name.encode()).digest()[0] / 256


def _quality(plan: GenerationPlan, child: ChildPlan) -> float:
    own = sum(layer.origin is not Origin.SHARED for layer in child.layers)
    luck = _draw(f"{plan.task}/{plan.data_seed}/{child.index}/{child.mutations}")
    return 0.5 + 0.3 * _draw(plan.task) + 0.02 * min(own, 5) + 0.06 * luck


def searched_system(
    folder: pathlib.Path,
    num_tasks: int,
    *,
    rounds: int = 1,
    children: int = 16,
    blocks: int = 3,
    scale_factor: float = 1.0,
    early_stop: bool = False,
    trainer: FakeTrainer | None = None,
) -> System:
    """Makes a system in a new folder and evolves tasks in it; the same every time but for its id and the seconds of closing."""
    system = System.create(folder, tiny_root(blocks), 32, {"source": "test"})
    names = [*NAMES, *(f"task-{number}" for number in range(len(NAMES), num_tasks))][:num_tasks]
    tasks = [ActiveTask(name, tuple("abcdefgh"[: 2 + index % 6]), 1000, f"f-{name}") for index, name in enumerate(names)]
    search = SearchSettings(
        rounds=rounds,
        children_per_task=children,
        generation_size=8,
        mutation_rate=0.2,
        auto_tune=True,
        scale_factor=scale_factor,
        early_stop=early_stop,
        max_seeds=3,
    )
    plan = SearchPlan(3, DefaultSettings(), search, TrainingSettings(batch_size=64))
    worker = trainer or WorkingTrainer()
    run_rounds(system, [(task, lambda: worker) for task in tasks], plan, QuietObserver())
    return system


METHODS = {"finetune": 1.0, "freeze:0": 0.95, "freeze:2": 0.5, "adapters:8": 0.1, "adapters:128": 0.3, "finetune-tuned": 1.0}
"""Methods of baselines, and which share of all parameters each trains."""


def add_baseline(
    system: System, method: str, task: str, *, is_finished: bool = True, data_fingerprint: str | None = None, **changes: object
) -> pathlib.Path:
    """Writes the journal that a baseline leaves, and returns it."""
    record = system.tasks()[task]
    folder = method.replace(":", "-")
    file = system.folder / "baselines" / folder / f"{task}.jsonl"
    journal = Journal(file)
    opened = {"format": 1, "task": task, "method": method.removesuffix("-tuned")}
    journal.append("open", opened | {"data_fingerprint": data_fingerprint or record.data_fingerprint})
    if is_finished:
        quality = record.quality - 0.1 * _draw(f"{method}/{task}") + 0.02
        path = system.path(record.path_id)
        fields = {
            "method": method.removesuffix("-tuned"),
            "task": task,
            "quality": quality,
            "test_accuracy": None if record.test_accuracy is None else quality - 0.01,
            "accounted_parameters": METHODS[method] * path.num_parameters,
            "num_trained_images": 20480,
            "flops": 2e13,
            "seconds": {"train": 40.0, "evaluate": 8.0, "wall": 50.0},
        }
        journal.append("close", {**fields, **changes})
    journal.close()
    return file
