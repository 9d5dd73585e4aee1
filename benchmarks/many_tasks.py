"""Systems of many tasks, made in seconds: layers, paths, records and journals as searches write them, without their training.

What a layer's weights are is of no interest here, what it costs that there are many of them is.
"""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.published import Architecture
from benchmarks.random_models import random_layers
from evolve.closing import ActiveTask
from evolve.config import DefaultSettings, SearchSettings
from evolve.documents import TaskRecord
from evolve.generation import ChildPlan, ChildResult, Examples, GenerationPlan, LayerPlan, PackResult
from evolve.hyperparameters import Hyperparameters
from evolve.journal import Journal, Record, read_journal
from evolve.layer import HEAD, NORM, Layer, Position, Tensors
from evolve.path import Path, PlacedLayer, ordered_positions
from evolve.search import SearchPlan, SilentObserver, evolve_task
from evolve.snapshot import Snapshot
from evolve.specs import head_spec
from evolve.store import System
from evolve.vit import new_tensors

NUM_CLASSES = 40
NUM_EXAMPLES = 8
NUM_CHILDREN = 16
FINGERPRINT = "0123456789abcdef" * 2


class InstantTrainer:
    """A Trainer (evolve.generation) that answers at once, with weights of the right shapes and qualities that look random."""

    def __init__(self, system: System) -> None:
        self._system = system

    @property
    def identity(self) -> Mapping[str, str]:
        """See Trainer.identity."""
        return {"device": "none", "trainer": "instant"}

    def train(self, plan: GenerationPlan) -> Iterator[PackResult]:
        """See Trainer.train."""
        for child in plan.children:
            yield PackResult((self._result(child),))

    def examine(self, path: Path) -> Examples:
        """See Trainer.examine."""
        size = path.hyperparameters.image_size
        return Examples(0.5, np.random.default_rng(0).integers(0, 256, (NUM_EXAMPLES, size, size, 3), dtype=np.uint8))

    def _result(self, child: ChildPlan) -> ChildResult:
        random = np.random.default_rng(child.seed)
        qualities = tuple(np.sort(random.random(4)).tolist())
        trained = {layer.position: self._weights(layer, random) for layer in child.layers if layer.trainable}
        return ChildResult(child.index, qualities, 3, trained, 5120, 1e10, 0.0, 0.0)

    def _weights(self, layer: LayerPlan, random: np.random.Generator) -> Tensors:
        start = new_tensors(layer.spec, 0) if layer.source is None else self._system.tensors(layer.source.id)
        return {name: values + 0.01 * random.standard_normal(values.shape, np.float32) for name, values in start.items()}


class Marks(SilentObserver):
    """Notes when what happened, in seconds of time.perf_counter.

    Attributes:
        opened: when the search had opened.
        last_child: when the last child was taken up.
        closed: when it had closed.
    """

    def __init__(self) -> None:
        self.opened = self.last_child = self.closed = 0.0

    def search_opened(self, *_: object) -> None:
        """Notes it."""
        self.opened = time.perf_counter()

    def child_finished(self, *_: object) -> None:
        """Notes it."""
        self.last_child = time.perf_counter()

    def search_closed(self, *_: object) -> None:
        """Notes it."""
        self.closed = time.perf_counter()


def unsynced() -> Any:
    """Returns a context in which files are not synced to the disk: for what is made to be measured, never while it is measured."""
    return mock.patch("os.fsync", _unsynced)


def _unsynced(_descriptor: int) -> None:
    """Stands for os.fsync; a mock would keep all its calls."""


class ManyTasks:
    """A system that grows. Each task has a final norm and a head of its own, all else is the root's.

    Attributes:
        folder: of the system.
        width: of the hidden states.
        num_tasks: tasks so far.
        plan: of the searches that are run in it.
    """

    def __init__(self, folder: pathlib.Path, architecture: Architecture) -> None:
        """Makes a system and runs one search in it, whose journal the others are made from."""
        self.folder = folder
        self.width = architecture.width
        self._system = System.create(folder, random_layers(architecture), architecture.image_size)
        self._random = np.random.default_rng(0)
        self.plan = SearchPlan(
            defaults=DefaultSettings(image_size=architecture.image_size),
            search=SearchSettings(rounds=1, children_per_task=NUM_CHILDREN, generation_size=8, auto_tune=True),
        )
        self.num_tasks = 0
        self._rows: list[dict[str, Any]] = []
        self._paths: list[str] = [self._system.root.id]
        self._template: list[Record] = []
        with unsynced():
            self.search("first")
        self._template = read_journal(self._system.journal_file("first", 0))

    def search(self, name: str) -> tuple[Marks, float]:
        """Runs a real search of a new task with an instant trainer, in a system opened anew; returns what it noted and when it began."""
        system, marks, started = System.open(self.folder), Marks(), time.perf_counter()
        task = ActiveTask(name, labels(), 1280, FINGERPRINT)
        record = evolve_task(system, task, InstantTrainer(system), self.plan, marks)
        self._note(record)
        return marks, started

    def grow(self, num_tasks: int, *, with_journals: bool) -> None:
        """Adds tasks until there are so many, unsynced.

        Args:
            num_tasks: how many there will be.
            with_journals: whether each has the journal of a closed search, which names all tasks before it.
        """
        with unsynced():
            while self.num_tasks < num_tasks:
                self._add(f"task-{self.num_tasks:05d}", with_journal=with_journals)

    def _add(self, name: str, *, with_journal: bool) -> None:
        system = self._system
        shared = dict(system.root.layers)
        own = {position: self._own(position, shared) for position in (NORM, HEAD)}
        path = Path.of(
            task=name,
            layers=[PlacedLayer(at, own.get(at) or shared[at]) for at in ordered_positions(system.root.num_blocks, ())],
            hyperparameters=Hyperparameters(num_blocks=system.root.num_blocks, image_size=system.root.hyperparameters.image_size),
            parent_id=self._paths[self._random.integers(len(self._paths))],
            quality=float(self._random.random()),
        )
        system.put_path(path)
        size = path.hyperparameters.image_size
        images = self._random.integers(0, 256, (NUM_EXAMPLES, size, size, 3), dtype=np.uint8)
        record = TaskRecord(
            name=name,
            path_id=path.id,
            parent_id=path.parent_id or "",
            num_children=NUM_CHILDREN,
            rounds=1,
            order=self.num_tasks + 1,
            private=False,
            labels=labels(),
            quality=path.quality or 0.0,
            test_accuracy=float(self._random.random()),
            examples=system.put_examples(images),
            data_fingerprint=self._random.bytes(16).hex(),
            settings=self.plan.to_dict(),
        )
        if with_journal:
            self._put_journal(record)
        system.put_task(record)
        self._note(record)

    def _own(self, position: Position, shared: Mapping[Position, Layer]) -> Layer:
        spec = head_spec(shared[NORM].spec.integer("width"), NUM_CLASSES) if position == HEAD else shared[position].spec
        shapes = {name: values.shape for name, values in new_tensors(spec, 0).items()} if position == HEAD else {}
        shapes = shapes or {name: values.shape for name, values in self._system.tensors(shared[position].id).items()}
        weights = {name: self._random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        return self._system.put_layer(spec, weights)

    def _put_journal(self, record: TaskRecord) -> None:
        journal = Journal(self._system.journal_file(record.name, 0))
        for told in self._template:
            fields = {name: value for name, value in told.items() if name not in ("crc32", "sequence", "type")}
            if told["type"] == "open":
                fields |= {"task": record.name, "data_fingerprint": record.data_fingerprint, "snapshot": self._rows}
            journal.append(told["type"], fields)
        journal.close()

    def _note(self, record: TaskRecord) -> None:
        self.num_tasks += 1
        self._paths.append(record.path_id)
        self._rows += Snapshot({}, {record.name: record}, self._system.root).to_list()


def labels() -> tuple[str, ...]:
    """Returns the names of the classes of each task."""
    return tuple(f"letter {number}" for number in range(NUM_CLASSES))
