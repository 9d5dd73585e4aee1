"""What must hold of every system, whatever the settings and however the qualities fall."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve.closing import ActiveTask
from evolve.config import DefaultSettings, SearchSettings, TrainingSettings
from evolve.layer import HEAD, LayerKind
from evolve.path import ordered_positions
from evolve.search import SearchPlan, run_rounds
from evolve.store import System
from evolve.summary import summarise
from evolve.verification import verify
from tests.support.fake_trainer import FakeTrainer, QuietObserver, tiny_root

PLANS = st.builds(
    SearchPlan,
    seed=st.integers(0, 2**31),
    defaults=st.just(DefaultSettings()),
    search=st.builds(
        SearchSettings,
        rounds=st.integers(1, 2),
        children_per_task=st.integers(1, 12),
        generation_size=st.integers(1, 5),
        mutation_rate=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        auto_tune=st.booleans(),
        mutate_blocks=st.booleans(),
        scale_factor=st.sampled_from([1.0, 0.9, 0.02]),
        max_seeds=st.none() | st.integers(1, 3),
    ),
    training=st.just(TrainingSettings(batch_size=8)),
)
TASKS = st.lists(st.tuples(st.integers(2, 5), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=40)
@given(plan=PLANS, tasks=TASKS, num_blocks=st.integers(1, 4))
def test_invariants_of_a_system(plan: SearchPlan, tasks: list[tuple[int, bool]], num_blocks: int):
    with tempfile.TemporaryDirectory() as folder:
        system = System.create(pathlib.Path(folder, "system"), tiny_root(num_blocks), 32)
        root_files = _files(system)
        active = [
            ActiveTask(f"task-{number}", tuple("abcde"[:classes]), 20, "f", private)
            for number, (classes, private) in enumerate(tasks)
        ]
        for count in range(1, len(active) + 1):
            before = _files(system)
            run_rounds(system, [(task, FakeTrainer) for task in active[:count]], plan, QuietObserver())
            assert _files(system).items() >= before.items(), "a file that was there has changed or gone"
        assert _files(system).items() >= root_files.items()
        assert verify(system) == []
        _check_paths(system, active)
        summary = summarise(system)
        assert sum(task.accounted_parameters for task in summary.tasks) == pytest.approx(summary.num_parameters)


def _files(system: System) -> dict[pathlib.Path, bytes]:
    """Every layer and path."""
    return {file: file.read_bytes() for pattern in ("layers/*/*", "paths/*") for file in system.folder.glob(pattern)}


def _check_paths(system: System, active: list[ActiveTask]) -> None:
    records = system.tasks()
    current = {record.path_id for record in records.values()} | {system.root.id}
    private = {record.path_id for record in records.values() if record.private}
    for task in active:
        record = records[task.name]
        path = system.path(record.path_id)
        assert record.parent_id in current
        assert record.parent_id not in private, "a private path became somebody's parent"
        assert [position for position, _ in path.layers] == list(ordered_positions(path.num_blocks, path.adapter_blocks))
        assert path.layer(HEAD).spec.integer("classes") == len(task.labels)
        assert path.num_blocks == path.hyperparameters.num_blocks <= system.root.num_blocks
        widths = {layer.spec.integer("adapter_width") for _, layer in path.layers if layer.kind is LayerKind.ADAPTER}
        assert widths <= {path.hyperparameters.adapter_width}


@settings(max_examples=15)
@given(plan=PLANS, width=st.integers(1, 5), backwards=st.booleans())
def test_packing_changes_nothing(plan: SearchPlan, width: int, backwards: bool):
    def packs(children):
        ordered = list(reversed(children)) if backwards else list(children)
        return [ordered[start : start + width] for start in range(0, len(ordered), width)]

    ends = []
    for trainer in (FakeTrainer(), FakeTrainer(packs=packs)):
        with tempfile.TemporaryDirectory() as folder:
            system = System.create(pathlib.Path(folder, "system"), tiny_root(), 32)
            tasks = [(ActiveTask(name, ("a", "b"), 20, "f"), lambda trainer=trainer: trainer) for name in ("one", "two")]
            run_rounds(system, tasks, plan, QuietObserver())
            ends.append([dataclasses.replace(record, settings={}) for record in system.tasks().values()])
    assert ends[0] == ends[1]
