"""The offline half: an evolutionary search that finds for each task a path of layers to reuse, clone, adapt or leave out.

For Python, the names in `__all__` are all that is needed; docs/python.md shows how. They are imported when they are first used, so that
`import evolve` costs nothing and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evolve.api import load_experiment, one_by_one, open_or_create, publish, remove_task, run, run_baselines, run_tasks
    from evolve.baseline import BaselinePlan, Method
    from evolve.config import (
        ArraysTask,
        CharactersTask,
        CsvTask,
        DefaultSettings,
        DigitsTask,
        Experiment,
        FolderTask,
        RootSettings,
        SearchSettings,
        TrainingSettings,
    )
    from evolve.data.load import load_task
    from evolve.data.task import ImageSet, TaskData
    from evolve.errors import EvolveError
    from evolve.generation import ChildPlan, ChildResult, Examples, GenerationPlan, PackResult, Trainer
    from evolve.search import Observer, SearchPlan, SilentObserver
    from evolve.store import System
    from evolve.summary import summarise

_HOMES = {
    "evolve.api": (
        "load_experiment",
        "one_by_one",
        "open_or_create",
        "publish",
        "remove_task",
        "run",
        "run_baselines",
        "run_tasks",
    ),
    "evolve.baseline": ("BaselinePlan", "Method"),
    "evolve.config": (
        "ArraysTask",
        "CharactersTask",
        "CsvTask",
        "DefaultSettings",
        "DigitsTask",
        "Experiment",
        "FolderTask",
        "RootSettings",
        "SearchSettings",
        "TrainingSettings",
    ),
    "evolve.data.load": ("load_task",),
    "evolve.data.task": ("ImageSet", "TaskData"),
    "evolve.errors": ("EvolveError",),
    "evolve.generation": ("ChildPlan", "ChildResult", "Examples", "GenerationPlan", "PackResult", "Trainer"),
    "evolve.search": ("Observer", "SearchPlan", "SilentObserver"),
    "evolve.store": ("System",),
    "evolve.summary": ("summarise",),
}
"""Where each name lives."""

__all__ = [
    "ArraysTask",
    "BaselinePlan",
    "CharactersTask",
    "ChildPlan",
    "ChildResult",
    "CsvTask",
    "DefaultSettings",
    "DigitsTask",
    "EvolveError",
    "Examples",
    "Experiment",
    "FolderTask",
    "GenerationPlan",
    "ImageSet",
    "Method",
    "Observer",
    "PackResult",
    "RootSettings",
    "SearchPlan",
    "SearchSettings",
    "SilentObserver",
    "System",
    "TaskData",
    "Trainer",
    "TrainingSettings",
    "load_experiment",
    "load_task",
    "one_by_one",
    "open_or_create",
    "publish",
    "remove_task",
    "run",
    "run_baselines",
    "run_tasks",
    "summarise",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
