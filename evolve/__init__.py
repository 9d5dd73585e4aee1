"""The offline half: an evolutionary search that finds for each task a path of layers to reuse, clone, adapt or leave out.

For Python, the names in `__all__` are all that is needed; docs/python.md shows how. They are imported when they are first used, so that
`import evolve` costs nothing and loads no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evolve.api import default_trainer, load_experiment, open_or_create, publish, remove_task, run, run_baselines, run_tasks
    from evolve.baseline import BaselinePlan, Method
    from evolve.collecting import collect
    from evolve.config import (
        ArraysTask,
        CharactersTask,
        CsvTask,
        DefaultSettings,
        DigitsTask,
        Experiment,
        FolderTask,
        HuggingFaceTask,
        RootSettings,
        SearchSettings,
        TorchvisionTask,
        TrainingSettings,
    )
    from evolve.data.load import load_task
    from evolve.data.task import ImageSet, TaskData
    from evolve.errors import EvolveError
    from evolve.generation import ChildPlan, ChildResult, Examples, GenerationPlan, PackResult, Trainer
    from evolve.lineage import lineage_hash
    from evolve.report.write import write_report
    from evolve.search import Observer, SearchPlan, SilentObserver
    from evolve.store import System
    from evolve.summary import summarise
    from evolve.verification import verify

_HOMES = {
    "evolve.api": (
        "default_trainer",
        "load_experiment",
        "open_or_create",
        "publish",
        "remove_task",
        "run",
        "run_baselines",
        "run_tasks",
    ),
    "evolve.baseline": ("BaselinePlan", "Method"),
    "evolve.collecting": ("collect",),
    "evolve.config": (
        "ArraysTask",
        "CharactersTask",
        "CsvTask",
        "DefaultSettings",
        "DigitsTask",
        "Experiment",
        "FolderTask",
        "HuggingFaceTask",
        "RootSettings",
        "SearchSettings",
        "TorchvisionTask",
        "TrainingSettings",
    ),
    "evolve.data.load": ("load_task",),
    "evolve.data.task": ("ImageSet", "TaskData"),
    "evolve.errors": ("EvolveError",),
    "evolve.generation": ("ChildPlan", "ChildResult", "Examples", "GenerationPlan", "PackResult", "Trainer"),
    "evolve.lineage": ("lineage_hash",),
    "evolve.report.write": ("write_report",),
    "evolve.search": ("Observer", "SearchPlan", "SilentObserver"),
    "evolve.store": ("System",),
    "evolve.summary": ("summarise",),
    "evolve.verification": ("verify",),
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
    "HuggingFaceTask",
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
    "TorchvisionTask",
    "Trainer",
    "TrainingSettings",
    "collect",
    "default_trainer",
    "lineage_hash",
    "load_experiment",
    "load_task",
    "open_or_create",
    "publish",
    "remove_task",
    "run",
    "run_baselines",
    "run_tasks",
    "summarise",
    "verify",
    "write_report",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
