"""Coarse segments of a real system: published, verified and answered by the embedded engine as torch answers."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from evolve.export.coarsening import ENGINE_COSTS, Coarseness
from evolve.export.publish import PublishResult, export_system
from evolve.store import System
from evolve.vit import reference_logits
from server.config import EngineSettings
from server.embedded.engine import EmbeddedEngine
from server.engine import Question
from server.generation import Generation
from server.repository import Repository
from tests.support.system import IMAGE_SIZE, TaskSketch, add_task, build_system

TASKS = ("adapted", "cloned", "plain", "short")
IMAGES = np.random.default_rng(5).integers(0, 256, (5, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
COARSE = Coarseness(ENGINE_COSTS["triton"])


def answers(repository: pathlib.Path) -> tuple[Generation, dict[str, np.ndarray]]:
    """The current generation, verified, and what the embedded engine answers to all tasks in one question."""
    generation = Repository(repository).read()
    engine = EmbeddedEngine(EngineSettings(threads=1, workers=1))
    try:
        engine.load(generation)
        return generation, dict(engine.answer(Question(generation, IMAGES, TASKS)).result())
    finally:
        engine.close()


def check(system: System, found: dict[str, np.ndarray]) -> None:
    for task, record in system.tasks().items():
        if task in found:
            expected = reference_logits(system.path(record.path_id), system.tensors, IMAGES)
            np.testing.assert_allclose(found[task], expected, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[System, pathlib.Path, PublishResult]:
    """A system published with shared segments, then with coarse ones."""
    folder = tmp_path_factory.mktemp("coarse")
    system = build_system(folder / "system")
    assert export_system(system, folder / "repository").choice is None
    return system, folder / "repository", export_system(system, folder / "repository", coarseness=COARSE)


def test_coarse_segments_answer_what_torch_answers_and_can_be_taken_back(published, tmp_path):
    system, repository, result = published
    assert result.changed
    assert (result.choice.chosen.num_pieces, result.choice.shared.num_pieces) == (5, 12)
    generation, found = answers(repository)
    # Segments this small weigh nothing beside the processes that run them.
    assert {task: len(each.route) for task, each in generation.tasks.items()} == dict.fromkeys((*TASKS, "large"), 1)
    check(system, found)
    again = export_system(system, repository, coarseness=COARSE)
    assert (again.changed, again.new_segments) == (False, ())
    shared = export_system(system, repository)
    assert (shared.changed, shared.new_segments) == (True, ())
    check(system, answers(repository)[1])


def test_a_new_task_leaves_coarse_routes_and_their_bits(tmp_path):
    system = build_system(tmp_path / "system", {task: TaskSketch() for task in TASKS})
    repository = tmp_path / "repository"
    export_system(system, repository, coarseness=COARSE)
    before, old = answers(repository)
    add_task(system, "another", TaskSketch(cloned=tuple(p for p, _ in system.root.layers if str(p) == "block.1")))
    result = export_system(system, repository, coarseness=COARSE)
    after, new = answers(repository)
    assert len(result.new_segments) == 1
    assert {task: after.tasks[task].route for task in TASKS} == {task: before.tasks[task].route for task in TASKS}
    for task in TASKS:
        np.testing.assert_array_equal(new[task], old[task])


def test_where_memory_is_short_trunks_stay_shared(tmp_path):
    system = build_system(tmp_path / "system", {task: TaskSketch() for task in TASKS})
    weights_count = Coarseness(
        ENGINE_COSTS["triton"].__class__(1e-3, 0.0, 6e10, piece_bytes=0), tasks_per_image=1, memory_factor=2.5
    )
    result = export_system(system, tmp_path / "repository", coarseness=weights_count)
    generation, found = answers(tmp_path / "repository")
    assert sorted(len(task.route) for task in generation.tasks.values()) == [1, 2, 2, 2]
    assert result.choice.chosen.num_bytes <= 2.5 * result.choice.shared.num_bytes
    check(system, found)
