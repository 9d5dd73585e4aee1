"""Worker processes train packs side by side; a search is the same with one, with many, and with some that die."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import pytest

from evolve import api
from evolve.config import DefaultSettings, SearchSettings, TrainingSettings
from evolve.errors import SystemFolderError, WorkersDiedError
from evolve.generation import GenerationPlan, PackResult
from evolve.lineage import lineage_hash
from evolve.path import ordered_positions
from evolve.search import SearchPlan
from evolve.store import Location, System
from evolve.training import spread, workers
from evolve.training.one_by_one import OneByOneTrainer
from evolve.training.spread import GIVE_UP_SECONDS, UNKNOWN
from evolve.training.workers import WorkersTrainer
from tests.support.processes import TOP, environment, lives
from tests.support.training import IMAGE_SIZE, NUM_BLOCKS, PLAIN, TinyRoot, easy_data, generation

_CARRY_OUT = workers._carry_out

DATA = easy_data()
SETTINGS = TrainingSettings(threads=1, device="cpu", batch_size=16, intervals=2, batches_per_interval=3, workers=2)
PLAN = SearchPlan(
    0,
    DefaultSettings(image_size=IMAGE_SIZE, crop_area_min=1.0, flip=False, adapter_width=8),
    SearchSettings(rounds=1, children_per_task=8, generation_size=4, mutation_rate=0.3),
    SETTINGS,
)


def make_system(folder: Location) -> System:
    root = TinyRoot()
    placed = [(position, root.layers[position]) for position in ordered_positions(NUM_BLOCKS, (), with_head=False)]
    return System.create(folder, {position: (layer.spec, root.stored[layer.id]) for position, layer in placed}, IMAGE_SIZE)


@pytest.fixture
def system(tmp_path: pathlib.Path) -> System:
    return make_system(tmp_path / "system")


def plan_of(size: int = 6) -> GenerationPlan:
    root = TinyRoot()
    return generation(*(root.child(index, hyperparameters=PLAIN.replace(learning_rate=0.05)) for index in range(size)))


@pytest.mark.parametrize("pack_size", [1, 2])
def test_a_search_is_the_same_with_one_worker_and_with_many(tmp_path: pathlib.Path, pack_size: int) -> None:
    hashes = []
    for number in (1, 3):
        found = make_system(tmp_path / str(number))
        training = SETTINGS.model_copy(update={"workers": number, "pack_size": pack_size})
        api.run_tasks(found, [DATA], dataclasses.replace(PLAN, training=training))
        hashes.append(lineage_hash(found))
    assert hashes[0] == hashes[1]


def test_a_search_that_was_begun_with_one_worker_goes_on_with_more(system: System) -> None:
    class Stopped(Exception):
        pass

    class StoppingTrainer(OneByOneTrainer):
        def train(self, plan: GenerationPlan) -> Iterator[PackResult]:
            yield next(super().train(plan))
            raise Stopped

    alone = dataclasses.replace(PLAN, training=SETTINGS.model_copy(update={"workers": 1}))
    with pytest.raises(Stopped):
        api.run_tasks(system, [DATA], alone, make_trainer=lambda system, data: StoppingTrainer(data, system.tensors, SETTINGS))
    assert api.run_tasks(system, [DATA], PLAN) == ["easy"]


def test_packs_are_trained_by_other_processes_as_in_this_one(system: System) -> None:
    trainer = WorkersTrainer(system, DATA, SETTINGS)
    plan = plan_of()
    found = sorted((one for pack in trainer.train(plan) for one in pack.children), key=lambda child: child.index)
    expected = [one for pack in OneByOneTrainer(DATA, system.tensors, SETTINGS).train(plan) for one in pack.children]
    assert [one.interval_qualities for one in found] == [one.interval_qualities for one in expected]
    for one, other in zip(found, expected, strict=True):
        for position, tensors in one.trained.items():
            assert all(np.array_equal(tensor, other.trained[position][name]) for name, tensor in tensors.items())
    assert trainer.identity == OneByOneTrainer(DATA, system.tensors, SETTINGS).identity


def test_workers_that_are_killed_cost_nothing_but_their_packs(system: System) -> None:
    plan = dataclasses.replace(plan_of(), length=dataclasses.replace(plan_of().length, intervals=4, batches_per_interval=100))
    trainer = WorkersTrainer(system, DATA, SETTINGS)
    found = []
    for pack in trainer.train(plan):
        found += [child.index for child in pack.children]
        if len(found) in (1, 3):
            assert trainer._pool is not None
            os.kill(next(iter(trainer._pool._processes)), signal.SIGKILL)
    assert sorted(found) == list(range(6))


def test_workers_that_hang_are_ended_and_what_they_were_at_runs_again(
    system: System, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread, "GIVE_UP_SECONDS", 1.0)
    monkeypatch.setattr(spread, "GIVE_UP_FACTOR", 2.0)
    monkeypatch.setattr(workers, "_carry_out", functools.partial(_hang_once, tmp_path / "hung"))
    told: list[str] = []
    packs = WorkersTrainer(system, DATA, SETTINGS, told.append).train(plan_of(4))
    assert sorted(child.index for pack in packs for child in pack.children) == [0, 1, 2, 3]
    assert "no worker is done with children [1] of 'easy' after " in told[-1]
    assert told[-1].endswith(" s, far longer than any before; all start anew, and it runs again")
    assert not lives(int((tmp_path / "hung").read_text()))


def _hang_once(marker: pathlib.Path, order: GenerationPlan) -> Any:
    if order.children[0].index == 1 and not marker.exists():
        marker.write_text(str(os.getpid()))
        time.sleep(3600)
    return _CARRY_OUT(order)


def test_what_was_done_before_a_worker_died_is_not_done_again(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = WorkersTrainer(system, DATA, SETTINGS)
    plan = plan_of(5)
    waits = iter([1, 0])

    def all_at_once(futures: Any, _: float) -> Any:
        # As after a while in which nobody took answers: three are there, and the pool is broken for the other two.
        if next(waits):
            for number, (future, order) in enumerate(list(futures.items())):
                future.set_result((1.0, [order.children[0].index])) if number < 3 else future.set_exception(BrokenProcessPool())
        else:
            for future, order in futures.items():
                future.set_result((1.0, [order.children[0].index]))
            assert len(futures) == 2
        return set(futures)

    class Pool:
        _processes: Mapping[int, Any] = {}

        def submit(self, *_: object) -> concurrent.futures.Future[Any]:
            return concurrent.futures.Future()

        def shutdown(self, **_: object) -> None:
            pass

    monkeypatch.setattr(workers, "_wait", all_at_once)
    monkeypatch.setattr(trainer, "_workers", Pool)
    found: list[Any] = list(trainer.train(plan))
    assert sorted(found) == [0, 1, 2, 3, 4]


def test_a_search_that_was_itself_stopped_takes_nobody_to_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(0.0, 1000.0)
    monkeypatch.setattr(workers, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(workers, "TICK_SECONDS", 0.01)
    future: concurrent.futures.Future[None] = concurrent.futures.Future()
    threading.Timer(0.2, future.set_result, [None]).start()
    # Each tick seems to take a thousand seconds, of which it counts two hundredths.
    assert workers._wait([future], 3000.0) == {future}
    assert workers._wait([concurrent.futures.Future()], 0.05) == set()


def test_a_worker_may_wait_for_a_store(system: System, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUNET_STORE_PATIENCE", "1000")
    monkeypatch.setenv("MUNET_CACHE", str(tmp_path / "cache"))
    shared = make_system((tmp_path / "store").as_uri())
    assert WorkersTrainer(system, DATA, SETTINGS)._most_seconds(1, 0) == GIVE_UP_SECONDS
    assert WorkersTrainer(shared, DATA, SETTINGS)._most_seconds(1, 0) == GIVE_UP_SECONDS + 1000


def test_a_first_pack_that_takes_long_is_told_and_waited_for(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spread, "GIVE_UP_SECONDS", 0.01)
    told: list[str] = []
    packs = WorkersTrainer(system, DATA, SETTINGS, told.append).train(plan_of(1))
    assert [child.index for child in next(packs).children] == [0]
    assert told == [f"no worker is done after 0 s; {UNKNOWN}"]


def test_workers_that_always_die_are_an_error_that_names_the_children(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = WorkersTrainer(system, DATA, SETTINGS)
    monkeypatch.setattr(workers, "_carry_out", _die)
    with pytest.raises(WorkersDiedError, match=r"died 3 times in a row at children \[0, 1\] of 'easy'.*fewer workers"):
        list(trainer.train(plan_of(2)))
    with pytest.raises(WorkersDiedError, match="at the test of 'easy'"):
        trainer.examine(system.root)


def _die(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_error_of_a_pack_comes_back_as_it_is(system: System) -> None:
    trainer = WorkersTrainer(system, DATA, SETTINGS)
    with pytest.raises(ValueError, match="'other'"):
        list(trainer.train(dataclasses.replace(plan_of(2), task="other")))


class _Sick(list):
    """Images at which other processes meet an error of their GPU, so many times."""

    def __init__(self, images: Sequence[Any], marks: pathlib.Path, times: int) -> None:
        super().__init__(images)
        self.marks, self.times, self.owner = marks, times, os.getpid()

    def __iter__(self) -> Iterator[Any]:
        number = len(list(self.marks.iterdir()))
        if os.getpid() != self.owner and number < self.times:
            (self.marks / str(number)).touch()
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().__iter__()


@pytest.mark.parametrize("times", [1, 3])
def test_a_worker_with_an_error_of_its_gpu_starts_anew_and_what_it_was_at_runs_again(
    system: System, tmp_path: pathlib.Path, times: int
) -> None:
    (tmp_path / "marks").mkdir()
    images = _Sick(DATA.train.images, tmp_path / "marks", times)
    data = dataclasses.replace(DATA, train=dataclasses.replace(DATA.train, images=images))
    trainer = WorkersTrainer(system, data, SETTINGS.model_copy(update={"workers": 1}))
    if times == 3:
        with pytest.raises(RuntimeError, match="CUDA error"):
            list(trainer.train(plan_of(1)))
    else:
        assert sorted(one.index for pack in trainer.train(plan_of(2)) for one in pack.children) == [0, 1]
    assert len(list((tmp_path / "marks").iterdir())) == times


@pytest.mark.parametrize(("visible", "expected"), [(None, ["0", "1", "0"]), ("3,5", ["3", "5", "3"])])
def test_each_worker_has_a_gpu_of_its_own_as_far_as_there_are_some(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    found = []
    for number in range(3):
        with monkeypatch.context() as patch:
            patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
            if visible is not None:
                patch.setenv("CUDA_VISIBLE_DEVICES", visible)
            workers._choose_gpu(number)
            found.append(os.environ.pop("CUDA_VISIBLE_DEVICES"))
    assert found == expected


def test_what_keeps_workers_from_beginning_is_said(system: System) -> None:
    """As a store that is not reached, or a full disk: it is no death for want of memory."""
    trainer = WorkersTrainer(system, DATA, SETTINGS.model_copy(update={"workers": 1}))
    system.folder.rename(system.folder.with_name("elsewhere"))
    with pytest.raises(SystemFolderError, match="found no system in"):
        list(trainer.train(plan_of(1)))


def test_workers_end_with_the_process_that_started_them(system: System, tmp_path: pathlib.Path) -> None:
    script = tmp_path / "starts.py"
    script.write_text(
        "import sys, time\n"
        "from evolve.store import System\n"
        "from tests.evolve.training.test_workers import DATA, SETTINGS, plan_of\n"
        "from evolve.training.workers import WorkersTrainer\n"
        "if __name__ == '__main__':\n"
        "    trainer = WorkersTrainer(System.open(sys.argv[1]), DATA, SETTINGS)\n"
        "    packs = trainer.train(plan_of(4))\n"
        "    next(packs)\n"
        "    print(*trainer._pool._processes, flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, str(script), str(system.folder)]
    process = subprocess.Popen(command, env=environment(), cwd=TOP, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    children = [int(word) for word in process.stdout.readline().split()]
    process.kill()
    process.wait()
    process.stdout.close()
    assert len(children) == 2
    deadline = time.monotonic() + 120
    while any(lives(pid) for pid in children):
        assert time.monotonic() < deadline, "workers outlived the process that started them"
        time.sleep(0.1)


def test_a_trainer_that_nobody_holds_any_more_ends_its_workers(system: System) -> None:
    trainer = WorkersTrainer(system, DATA, SETTINGS)
    trainer.examine(_path(system))
    assert trainer._pool is not None
    pids = list(trainer._pool._processes)
    assert pids
    del trainer
    deadline = time.monotonic() + 120
    while any(lives(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert threading.active_count() < 50


def _path(system: System):
    api.run_tasks(system, [DATA], dataclasses.replace(PLAN, training=SETTINGS.model_copy(update={"workers": 1})))
    return system.path(system.tasks()["easy"].path_id)
