"""What full fine-tuning with the published defaults reaches on the tasks of an experiment: how hard the tasks are.

    python benchmarks/finetune.py [EXPERIMENT.toml] [--task NAME ...] [--root FILE] [--distortion D] [--replicas N] [--share S]

Every layer of the root and a new head are trained for as many steps as a whole search of the task takes: `intervals x rounds x
(children / generation size)` intervals under one schedule, validated after each; the best interval of the best replica is tested. Prints
one JSON line for each task and a last one that sums up. Without arguments: the characters benchmark, one replica.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import tempfile
import time
from collections.abc import Sequence

import numpy as np

from evolve.config import CharactersTask, Experiment, RootSettings, TaskSettings, load_settings
from evolve.data.load import load_task
from evolve.generation import ChildPlan, GenerationPlan, LayerPlan, Origin, TrainingLength
from evolve.layer import HEAD, PATCH_EMBED, POS_EMBED, Layer
from evolve.path import Path, PlacedLayer
from evolve.root import load_root
from evolve.sampling import derive_seed
from evolve.specs import head_spec
from evolve.store import System
from evolve.training.one_by_one import OneByOneTrainer

EXPERIMENT = pathlib.Path(__file__).parents[1] / "evolve" / "recipes" / "characters.toml"
EASY, HOPELESS = 0.95, 0.60
"""Test accuracy that a task of a benchmark should stay between."""


def main() -> None:
    """Fine-tunes on every task and prints what it reaches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=pathlib.Path, nargs="?", default=EXPERIMENT)
    parser.add_argument("--task", action="append", help="only this task; may be repeated")
    parser.add_argument("--root", type=pathlib.Path, help="a root file instead of the experiment's root")
    parser.add_argument("--distortion", type=float, help="of rendered tasks, instead of the experiment's: to try others")
    parser.add_argument("--train-per-class", type=int, help="of rendered tasks, instead of the experiment's: to try others")
    parser.add_argument("--replicas", type=int, default=1, help="with data seeds of their own; the best on validation counts")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps: less for a first look")
    arguments = parser.parse_args()
    settings = load_settings(arguments.experiment, Experiment)
    root = RootSettings(source="file", file=arguments.root) if arguments.root else settings.root
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_root(root)
        system = System.create(pathlib.Path(folder), loaded.layers, loaded.image_size)
        for task in settings.tasks:
            if not arguments.task or task.name in arguments.task:
                changed = _changed(task, arguments.distortion, arguments.train_per_class)
                rows.append(finetune(system, settings, changed, arguments.replicas, arguments.share))
                print(json.dumps(rows[-1]), flush=True)
    accuracies = [row["test_accuracy"] for row in rows]
    summary = {
        "mean_test_accuracy": round(float(np.mean(accuracies)), 4),
        "between_the_bounds": all(HOPELESS <= accuracy <= EASY for accuracy in accuracies),
        "bounds": [HOPELESS, EASY],
    }
    print(json.dumps({"summary": summary, "hardware": f"{platform.machine()}, {settings.training.threads} thread(s)"}))


def _changed(task: TaskSettings, distortion: float | None, train_per_class: int | None) -> TaskSettings:
    if not isinstance(task, CharactersTask):
        return task
    changes = {"distortion": distortion, "train_per_class": train_per_class}
    return task.model_copy(update={name: value for name, value in changes.items() if value is not None})


def finetune(system: System, settings: Experiment, task: TaskSettings, replicas: int, share: float) -> dict[str, object]:
    """Fine-tunes the root on one task and returns what came of it.

    Args:
        system: gives the root; the best replica's layers are stored in it.
        settings: defaults, lengths and training.
        task: what to train on.
        replicas: how many, each with a data seed of its own.
        share: of the intervals; 1 is as many steps as the whole search.
    """
    data = load_task(task)
    training, search = settings.training, settings.search
    intervals = max(1, round(share * training.intervals * search.rounds * search.num_generations))
    batches = min(-(-len(data.train) // training.batch_size), training.batches_per_interval)
    length = TrainingLength(training.batch_size, intervals, batches, training.validation_batches)
    hyperparameters = settings.defaults.hyperparameters(system.root.num_blocks)
    patch_size = system.root.layer(PATCH_EMBED).spec.integer("patch_size")
    layers = []
    for position, layer in system.root.layers:
        source = system.position_embedding(hyperparameters.image_size // patch_size) if position == POS_EMBED else layer
        layers.append(LayerPlan(position, source.spec, Origin.CLONED, source))
    width = system.root.layer(PATCH_EMBED).spec.integer("width")
    layers.append(LayerPlan(HEAD, head_spec(width, len(data.labels)), Origin.NEW, None))
    child = ChildPlan(0, system.root.id, hyperparameters, tuple(layers), (), 0)
    trainer = OneByOneTrainer(data, system.tensors, training)
    started = time.monotonic()
    seeds = [derive_seed(settings.seed, task.name, "finetune", replica) for replica in range(replicas)]
    results = [
        pack.children[0] for seed in seeds for pack in trainer.train(GenerationPlan(task.name, 0, 0, seed, length, (child,)))
    ]
    best = max(results, key=lambda result: result.quality)
    placed = [PlacedLayer(plan.position, _stored(system, plan, best.trained[plan.position])) for plan in layers]
    path = Path.of(task=task.name, layers=placed, hyperparameters=hyperparameters, parent_id=system.root.id, quality=best.quality)
    return {
        "task": task.name,
        "classes": len(data.labels),
        "train": len(data.train),
        "validation": len(data.validation),
        "test": len(data.test) if data.test is not None else 0,
        "steps": length.num_steps,
        "quality": round(best.quality, 4),
        "test_accuracy": round(trainer.examine(path).test_accuracy or 0.0, 4),
        "best_interval": [best.best_interval + 1, intervals],
        "curve": [round(quality, 3) for quality in _thinned(best.interval_qualities)],
        "images_trained": sum(result.num_trained_images for result in results),
        "seconds": round(time.monotonic() - started, 1),
    }


def _stored(system: System, plan: LayerPlan, tensors: object) -> Layer:
    return system.put_layer(plan.spec, tensors)  # type: ignore[arg-type]  # a trainer's arrays


def _thinned(values: Sequence[float], count: int = 10) -> list[float]:
    return [values[index] for index in np.linspace(0, len(values) - 1, min(count, len(values))).astype(int)]


if __name__ == "__main__":
    main()
