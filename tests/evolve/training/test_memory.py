"""Want of memory: what is recognised, what is tried, and that no child is lost and no result moves that need not."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from evolve.closing import ActiveTask
from evolve.config import DefaultSettings, SearchSettings, TrainingSettings
from evolve.errors import MemoryShortageError
from evolve.generation import ChildResult, GenerationPlan
from evolve.journal import child_records, read_journal
from evolve.outcomes import Outcomes
from evolve.path import ordered_positions
from evolve.scoring import reference_parameters, score
from evolve.search import SearchPlan, run_rounds
from evolve.store import System
from evolve.training import child as child_module
from evolve.training import one_by_one
from evolve.training.memory import in_parts_that_fit, is_memory_shortage
from evolve.training.one_by_one import OneByOneTrainer
from evolve.vit import PathModel
from tests.support.fake_trainer import QuietObserver
from tests.support.training import IMAGE_SIZE, NUM_BLOCKS, PLAIN, TinyRoot, easy_data, generation

ROOT = TinyRoot()
DATA = easy_data()
SETTINGS = TrainingSettings(threads=1, device="cpu")


class Memory:
    """Stands for a device's memory: every pass of images through layers takes from it.

    Attributes:
        passes: images of each pass so far.
    """

    def __init__(self, *, capacity: int = 10**9, full_at: Iterable[int] = (), error: Callable[[], Exception]) -> None:
        """Has room for so many images at once, and none at all in these passes, counted from 0."""
        self._capacity, self._full_at, self._error = capacity, frozenset(full_at), error
        self.passes: list[int] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Memory:
        run_layers = child_module.run_layers

        def checked(layers: Sequence[torch.nn.Module], hidden: torch.Tensor) -> torch.Tensor:
            self.passes.append(len(hidden))
            if len(hidden) > self._capacity or len(self.passes) - 1 in self._full_at:
                raise self._error()
            return run_layers(layers, hidden)

        monkeypatch.setattr(child_module, "run_layers", checked)
        return self


def cuda_full() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nMore lines.")


def host_full() -> Exception:
    return RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ...")


def python_full() -> Exception:
    return MemoryError()


ERRORS = [cuda_full, host_full, python_full]


def train(plan: GenerationPlan) -> list[ChildResult]:
    return [child for pack in OneByOneTrainer(DATA, ROOT.stored.__getitem__, SETTINGS).train(plan) for child in pack.children]


def plan_of_three() -> GenerationPlan:
    wanted = PLAIN.replace(learning_rate=0.05, crop_area_min=0.5)
    children = [ROOT.child(index, lambda _: True, hyperparameters=wanted, seed=index) for index in range(3)]
    return generation(*children, batch_size=18, batches=2)


@pytest.fixture(scope="module")
def whole() -> list[ChildResult]:
    """What the three give with memory enough."""
    return train(plan_of_three())


def assert_same(one: ChildResult, other: ChildResult) -> None:
    assert one.interval_qualities == other.interval_qualities
    for position, tensors in one.trained.items():
        assert all(np.array_equal(tensor, other.trained[position][name]) for name, tensor in tensors.items())


# What is recognised


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 60), lambda: np.empty(1 << 60, dtype=np.uint8)])
def test_real_allocations_that_fail_are_recognised(allocate: Callable[[], object]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        allocate()
    assert is_memory_shortage(caught.value)


@pytest.mark.parametrize("error", [*(make() for make in ERRORS), RuntimeError("CUDA error: out of memory")])
def test_shortages_are_recognised(error: Exception) -> None:
    assert is_memory_shortage(error)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ValueError("out of memory"), OSError(12, "x")])
def test_other_errors_are_not(error: Exception) -> None:
    assert not is_memory_shortage(error)


# What is tried


def test_the_whole_twice_then_ever_smaller_parts() -> None:
    tried: list[int] = []
    rooms: list[int] = []

    def compute(parts: int) -> str:
        tried.append(parts)
        if parts < 18:
            raise MemoryError
        return "done"

    assert in_parts_that_fit(compute, lambda: rooms.append(len(tried)), 18, "it") == "done"
    assert tried == [1, 1, 2, 4, 8, 16, 18]
    assert rooms == [1, 2, 3, 4, 5, 6]


def test_what_fits_is_done_once() -> None:
    tried: list[int] = []
    in_parts_that_fit(tried.append, lambda: pytest.fail("made room"), 18, "it")
    assert tried == [1]


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError):
        in_parts_that_fit(lambda parts: parts // 0, lambda: None, 4, "it")


def test_what_a_failed_try_held_is_gone_before_the_next() -> None:
    class Held:
        alive = 0

        def __init__(self) -> None:
            Held.alive += 1

        def __del__(self) -> None:
            Held.alive -= 1

    seen: list[int] = []

    def compute(parts: int) -> int:
        seen.append(Held.alive)
        held = [Held()]
        if parts < 4:
            raise MemoryError(held)
        return parts

    assert in_parts_that_fit(compute, lambda: None, 4, "it") == 4
    assert seen == [0, 0, 0, 0]


# Training


@pytest.mark.parametrize(
    ("moment", "error"), [(0, cuda_full), (1, host_full), (7, python_full), (11, cuda_full), (21, host_full)]
)
def test_a_shortage_that_passes_moves_no_bit(
    monkeypatch: pytest.MonkeyPatch, whole: list[ChildResult], error: Any, moment: int
) -> None:
    memory = Memory(full_at=[moment], error=error).install(monkeypatch)
    results = train(plan_of_three())
    assert moment < len(memory.passes)
    assert [result.index for result in results] == [0, 1, 2]
    assert [result.batch_parts for result in results] == [1, 1, 1]
    for one, other in zip(results, whole, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(("capacity", "parts"), [(17, 2), (9, 2), (5, 4), (1, 32)])
def test_a_batch_that_does_not_fit_is_computed_in_parts_with_the_gradient_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, whole: list[ChildResult], capacity: int, parts: int
) -> None:
    memory = Memory(capacity=capacity, error=cuda_full).install(monkeypatch)
    results = train(plan_of_three())
    assert [result.batch_parts for result in results] == [parts] * 3
    assert max(size for size in memory.passes if size <= capacity) > capacity / 2
    for one, other in zip(results, whole, strict=True):
        assert one.num_trained_images == other.num_trained_images
        for position, tensors in one.trained.items():
            for name, tensor in tensors.items():
                np.testing.assert_allclose(tensor, other.trained[position][name], atol=2e-5)
    again = train(plan_of_three())
    for one, other in zip(results, again, strict=True):
        assert_same(one, other)


def test_how_a_child_is_cut_does_not_depend_on_its_siblings(monkeypatch: pytest.MonkeyPatch, whole: list[ChildResult]) -> None:
    plan = plan_of_three()
    # Room runs out for the first child alone, in both tries of the whole.
    Memory(full_at=[0, 1], error=cuda_full).install(monkeypatch)
    results = train(plan)
    assert [result.batch_parts for result in results] == [2, 1, 1]
    for one, other in zip(results[1:], whole[1:], strict=True):
        assert_same(one, other)


def test_what_fits_in_no_way_says_what_to_lower_and_loses_no_child_before(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of_three()
    passes_of_one = 2 * plan.length.num_steps
    Memory(full_at=range(passes_of_one, 10**4), error=cuda_full).install(monkeypatch)
    packs = OneByOneTrainer(DATA, ROOT.stored.__getitem__, SETTINGS).train(plan)
    assert next(packs).children[0].index == 0
    with pytest.raises(MemoryShortageError, match=r"child 1 of easy.*CUDA out of memory.*lower defaults\.image_size") as caught:
        next(packs)
    assert caught.value.num_parts == 256
    assert "More lines" not in str(caught.value)


def test_images_move_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is told where to place the images: the device at first, the host's memory after the first shortage."""
    told: list[bool] = []
    load = one_by_one.training_images

    def spy(images: Any, size: int, device: torch.device, *, stay_on_host: bool) -> Any:
        told.append(stay_on_host)
        return load(images, size, device, stay_on_host=stay_on_host)

    monkeypatch.setattr(one_by_one, "training_images", spy)
    Memory(full_at=[3], error=cuda_full).install(monkeypatch)
    train(plan_of_three())
    assert told == [False, True]


def test_validation_and_test_are_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    child = ROOT.child()
    (result,) = train(generation(child, batch_size=4))
    path, stored = ROOT.path(child, result)
    trainer = OneByOneTrainer(DATA, stored.__getitem__, SETTINGS)
    expected = trainer.examine(path).test_accuracy
    forward, most = PathModel.forward, 8
    sizes: list[int] = []

    def checked(self: PathModel, images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > most:
            raise cuda_full()
        return forward(self, images)

    monkeypatch.setattr(PathModel, "forward", checked)
    assert trainer.examine(path).test_accuracy == expected
    assert max(sizes) > most
    (cut,) = train(generation(child, batch_size=4))
    assert cut.batch_parts == 32
    assert cut.interval_qualities == result.interval_qualities


# A whole search


def search(folder: pathlib.Path) -> System:
    layers = {position: ROOT.layers[position] for position in ordered_positions(NUM_BLOCKS, (), with_head=False)}
    root = {position: (layer.spec, ROOT.stored[layer.id]) for position, layer in layers.items()}
    system = System.open(folder) if System.exists(folder) else System.create(folder, root, IMAGE_SIZE)
    settings = SearchSettings(
        rounds=1, children_per_task=6, generation_size=3, mutation_rate=0.3, scale_factor=0.5, early_stop=True
    )
    training = SETTINGS.model_copy(update={"batch_size": 18, "intervals": 3, "batches_per_interval": 3})
    plan = SearchPlan(0, DefaultSettings(image_size=IMAGE_SIZE, learning_rate=0.05, adapter_width=8), settings, training)
    data = dataclasses.replace(DATA, name="easy")
    task = ActiveTask("easy", data.labels, len(data.train), data.fingerprint)
    run_rounds(system, [(task, lambda: OneByOneTrainer(data, system.tensors, training))], plan, QuietObserver())
    return system


def test_a_search_short_of_memory_loses_no_child_and_goes_on_where_it_had_to_end(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = search(tmp_path / "whole")
    rows = [row for _, row in child_records(read_journal(expected.journal_file("easy", 0)))]
    with monkeypatch.context() as patch:
        # Some moments of want, then no memory at all.
        Memory(full_at=[2, 40, *range(70, 10**4)], error=cuda_full).install(patch)
        with pytest.raises(MemoryShortageError):
            search(tmp_path / "short")
    kept = [row for _, row in child_records(read_journal(tmp_path / "short" / "journal" / "easy-0001.jsonl"))]
    assert 0 < len(kept) < len(rows)
    system = search(tmp_path / "short")
    assert system.tasks() == expected.tasks()
    assert [row["path_id"] for _, row in child_records(read_journal(system.journal_file("easy", 0)))] == [
        row["path_id"] for row in rows
    ]


def test_the_journal_says_which_children_were_cut(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Memory(full_at=[0, 1], error=cuda_full).install(monkeypatch)
    system = search(tmp_path / "system")
    rows = [row for _, row in child_records(read_journal(system.journal_file("easy", 0)))]
    assert [row.get("batch_parts") for row in rows] == [2, *[None] * 5]
    assert Outcomes.of(rows).in_parts == 1


def test_the_quality_to_beat_is_the_parents_score_in_terms_of_quality(tmp_path: pathlib.Path) -> None:
    system = search(tmp_path / "system")
    reference = reference_parameters(system.root, system.position_embedding(2))
    judged = 0
    for planned, row in child_records(read_journal(system.journal_file("easy", 0))):
        if planned["quality_to_beat"] is not None:
            judged += 1
            assert planned["quality_to_beat"] == pytest.approx(
                min(1.0, row["parent_score"] / score(1.0, row["accounted_parameters"], reference, 0.5))
            )
    assert judged > 0
