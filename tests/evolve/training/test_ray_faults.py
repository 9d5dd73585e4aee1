"""What the Ray executor does about workers that die, hang or are sick, in every phase; test_ray.py has the same with a real cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import ray.exceptions

from evolve.errors import ClusterError, MemoryShortageError, StoreError, SystemFolderError, WorkersDiedError
from evolve.store import System
from evolve.training import ray_gate, ray_trainer
from evolve.training.ray_trainer import STRAGGLER_SECONDS, RayTrainer
from evolve.training.spread import GIVE_UP_SECONDS, UNKNOWN
from tests.evolve.training.test_workers import DATA, SETTINGS, make_system, plan_of
from tests.support.fake_ray import HANGS, FakeActor, FakeRay, ManualClock

FULL = SystemFolderError("could not write in /cache (No space left on device)", "a writable folder with free space")


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> System:
    return make_system(tmp_path_factory.mktemp("faults") / "system")


@dataclasses.dataclass
class Stage:
    """A trainer on a cluster that is played.

    Attributes:
        ray: the cluster.
        trainer: under test.
        told: what it said.
        clock: what it goes by.
    """

    ray: FakeRay
    trainer: RayTrainer
    told: list[str]
    clock: ManualClock

    def children(self, size: int) -> list[int]:
        """Trains a generation of so many children, a pack each, and returns the children in the order of the answers."""
        return [order.children[0].index for _, order in self.trainer.train(plan_of(size))]

    def asked(self, node: str, method: str) -> int:
        """How often actors on a node were asked for something."""
        return sum(name == method for actor in self.ray.actors if actor.node == node for name, _, _ in actor.calls)

    @contextlib.contextmanager
    def as_time_goes_by(self) -> Iterator[None]:
        """Lets what hung be played again whenever the trainer has waited for a while."""

        def answers(*arguments: Any, wait: Any = ray_trainer.concurrent.futures.wait) -> Any:
            for actor in self.ray.actors:
                if actor.is_alive and actor.node is not None:
                    actor.answer()
            return wait(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray_trainer.concurrent.futures, "wait", answers)
            yield

    def said(self, *parts: str) -> bool:
        """Whether a sentence that was told has all these parts."""
        return any(all(part in sentence for part in parts) for sentence in self.told)


@pytest.fixture
def stage(system: System, monkeypatch: pytest.MonkeyPatch) -> Any:
    installed = ray_gate.installed()

    def make(*names: str, workers: int = 8) -> Stage:
        played, clock, told = FakeRay(list(names), installed), ManualClock(), []
        monkeypatch.setattr(ray_trainer, "connect", lambda _: played)
        monkeypatch.setattr(ray_gate, "installed", lambda: installed)
        monkeypatch.setattr(ray_trainer, "time", clock)
        monkeypatch.setattr(ray_trainer, "TICK_SECONDS", 0.0)
        settings = SETTINGS.model_copy(update={"executor": "ray", "workers": workers})
        return Stage(played, RayTrainer(system, DATA, settings, told.append), told, clock)

    return make


def dies_at(method: str, *numbers: int) -> Any:
    """Plays that some actors die as soon as they are asked for something."""
    return lambda actor, name, _: ray.exceptions.RayActorError() if (name == method and actor.number in numbers) else None


@pytest.mark.parametrize("method", ["greet", "begin", "carry_out"])
def test_a_worker_that_dies_in_any_phase_costs_nothing_but_what_it_was_at(stage: Any, method: str) -> None:
    played = stage("one", "two")
    played.ray.play = dies_at(method, 0, 2)
    assert sorted(played.children(4)) == [0, 1, 2, 3]
    assert played.said("could not start" if method != "carry_out" else "died at children")


@pytest.mark.parametrize("method", ["greet", "begin", "carry_out"])
def test_workers_that_always_die_are_an_error_in_any_phase(stage: Any, method: str) -> None:
    played = stage("one", "two")
    played.ray.play = dies_at(method, *range(100))
    with pytest.raises(WorkersDiedError, match="died 3 times in a row"):
        played.children(4)


def test_who_works_and_where_is_told_and_that_unlike_processors_round_differently(stage: Any) -> None:
    played = stage("one", "two")
    assert sorted(played.children(8)) == list(range(8))
    assert played.told[-1] == "2 workers on 2 nodes: a processor"
    played = stage("one", "two")
    played.ray.processors["two"] = "another"
    played.children(8)
    assert played.told[-2:] == [
        "2 workers on 2 nodes: a processor, another",
        "warning: unlike processors round differently: the search may end otherwise when it runs again",
    ]


def test_starts_that_failed_are_tried_again_with_the_next_generation(stage: Any) -> None:
    played = stage("one", "two")
    played.ray.play = lambda actor, name, _: ray.exceptions.RayActorError() if (name == "begin" and actor.node == "two") else None
    assert sorted(played.children(8)) == list(range(8))
    assert {actor.node for actor in played.ray.actors if actor.is_alive} <= {"one", None}
    played.ray.play = lambda *_: None
    assert sorted(played.children(4)) == [0, 1, 2, 3]
    assert {actor.node for actor in played.ray.actors if actor.is_alive} >= {"one", "two"}


def test_idle_workers_whose_nodes_are_lost_are_not_counted_against_the_next_order(stage: Any, system: System) -> None:
    played = stage("one", "two", "three", "four")
    assert sorted(played.children(4)) == [0, 1, 2, 3]
    played.ray.names[:] = ["four"]
    assert played.trainer.examine(system.root)[0][1] is system.root
    assert not played.said("died")


@pytest.mark.parametrize("error", [FULL, ray.exceptions.RayActorError()])
def test_a_node_where_work_fails_or_dies_again_and_again_is_avoided_while_there_are_others(stage: Any, error: Exception) -> None:
    """As where a disk is full or memory is short: the search must not end for it, however long the others are busy."""
    played = stage("sick", "well")

    def play(actor: FakeActor, name: str, _: Any) -> Any:
        if name != "carry_out":
            return None
        return error if actor.node == "sick" else HANGS if played.clock.now < STRAGGLER_SECONDS else None

    played.ray.play = play
    with played.as_time_goes_by():
        assert sorted(played.children(4)) == [0, 1, 2, 3]
    assert played.asked("sick", "carry_out") == 2


def test_a_node_that_could_work_in_between_is_not_avoided(stage: Any) -> None:
    played = stage("one", "two")
    failures: list[int] = []

    def play(actor: FakeActor, name: str, _: Any) -> Any:
        if name != "carry_out" or actor.node != "one" or len(failures) == 3 or actor.number in failures:
            return None
        # Of each worker there the second order.
        if sum(method == "carry_out" for method, _, _ in actor.calls) == 2:
            failures.append(actor.number)
            return FULL
        return None

    played.ray.play = play
    for _ in range(8):
        assert sorted(played.children(4)) == [0, 1, 2, 3]
    assert len(failures) == 3
    assert not any(actor.avoided for actor in played.ray.actors)


def test_a_node_whose_disk_is_full_from_the_beginning_is_refused_and_the_others_work(stage: Any) -> None:
    played = stage("full", "well")
    played.ray.play = lambda actor, name, _: FULL if (name == "begin" and actor.node == "full") else None
    assert sorted(played.children(3)) == [0, 1, 2]
    assert played.said("warning: no worker on host-full: could not write in /cache (No space left on device) on node host-full")
    assert played.asked("full", "begin") == 1


def test_what_does_not_fit_into_the_memory_of_one_node_is_done_on_another(stage: Any) -> None:
    shortage = MemoryShortageError("child 0", 64, "out of memory")
    played = stage("small", "large")
    played.ray.play = lambda actor, name, _: shortage if (name == "carry_out" and actor.node == "small") else None
    assert sorted(played.children(3)) == [0, 1, 2]
    played.ray.play = lambda _, name, __: shortage if name == "carry_out" else None
    with pytest.raises(MemoryShortageError, match="child 0"):
        played.children(3)


def test_a_store_that_a_worker_cannot_reach_for_a_while_costs_a_try(stage: Any) -> None:
    away = StoreError("s3://b/a did not answer for 600 seconds", "a store that can be reached")
    played = stage("one")
    played.ray.play = lambda actor, name, _: away if (name == "carry_out" and actor.number < 2) else None
    assert sorted(played.children(2)) == [0, 1]
    played.ray.play = lambda _, name, __: away if name == "carry_out" else None
    with pytest.raises(StoreError, match="did not answer for 600 seconds"):
        played.children(2)


def test_a_worker_that_prepares_for_long_is_not_taken_for_want_of_room(stage: Any) -> None:
    """As where a large task's data come over the network, or a store is waited for."""
    played = stage("one")

    def play(actor: FakeActor, name: str, _: Any) -> Any:
        return HANGS if name == "begin" and played.clock.now < 2 * ray_trainer.PATIENCE_SECONDS else None

    played.ray.play = play
    orders = played.trainer.train(plan_of(1))
    with played.as_time_goes_by():
        assert len(list(orders)) == 1
    assert played.clock.now > 2 * ray_trainer.PATIENCE_SECONDS
    assert not played.said("waiting for a node")


def test_a_worker_that_never_gets_ready_is_ended(stage: Any) -> None:
    played = stage("one")
    played.ray.play = lambda actor, name, _: HANGS if (name == "begin" and actor.number == 0) else None
    assert played.children(1) == [0]
    assert played.said("a worker could not start (on host-one, not ready after 1800 s)")
    assert not played.ray.actors[0].is_alive


def hangs_at(stage: Stage, actor_number: int, child: int) -> Any:
    """Plays that an actor never ends with a child."""

    def play(actor: FakeActor, name: str, arguments: Any) -> Any:
        is_it = name == "carry_out" and actor.number == actor_number and arguments[0].children[0].index == child
        return HANGS if is_it else None

    return play


def test_a_lone_worker_that_hangs_is_stood_in_for_where_there_is_room(stage: Any) -> None:
    played = stage("one", "two", workers=1)
    played.ray.play = hangs_at(played, 0, 1)
    assert sorted(played.children(3)) == [0, 1, 2]
    assert played.said("the worker on host-one has been at children [1]", "one more is asked for")
    assert [actor.is_alive for actor in played.ray.actors] == [False, True], "the one that hung is ended"
    assert played.clock.now < GIVE_UP_SECONDS


def test_a_lone_worker_that_hangs_where_there_is_no_room_is_ended_in_the_end(stage: Any) -> None:
    played = stage("one", workers=1)
    played.ray.play = hangs_at(played, 0, 1)
    assert sorted(played.children(3)) == [0, 1, 2]
    assert played.said("the worker on host-one has been at children [1]", "and is ended; it runs again")
    assert played.clock.now > GIVE_UP_SECONDS


def test_of_a_lone_worker_that_may_hang_at_the_very_first_order_is_told(stage: Any) -> None:
    played = stage("one", workers=1)
    played.ray.play = lambda _, name, __: HANGS if name == "carry_out" and played.clock.now < 3 * GIVE_UP_SECONDS else None
    with played.as_time_goes_by():
        assert played.children(1) == [0]
    (said,) = [line for line in played.told if "been at children [0]" in line]
    assert said.endswith(UNKNOWN)
    assert len(played.ray.actors) == 1


def test_an_order_that_is_just_long_is_given_ever_more_time(stage: Any) -> None:
    played = stage("one", workers=1)
    lasts = 5 * GIVE_UP_SECONDS
    begun: dict[int, float] = {}

    def play(actor: FakeActor, name: str, arguments: Any) -> Any:
        if name != "carry_out" or arguments[0].children[0].index != 1:
            return None
        begun.setdefault(actor.number, played.clock.now)
        return HANGS if played.clock.now - begun[actor.number] < lasts else None

    played.ray.play = play
    played.trainer._longest = 100.0
    with played.as_time_goes_by():
        assert sorted(played.children(2)) == [0, 1]
    assert 2 <= len(begun) <= 4


def test_of_two_that_do_the_same_the_first_answer_is_the_only_one(stage: Any) -> None:
    """And the straggler's, which comes just then, is nobody's."""
    played = stage("one", "two")
    late = hangs_at(played, 0, 0)

    def play(actor: FakeActor, name: str, arguments: Any) -> Any:
        if name == "carry_out" and actor.number != 0 and arguments[0].children[0].index == 0:
            # Both at the same moment.
            played.ray.play = lambda *_: None
            played.ray.actors[0].answer()
            return None
        return late(actor, name, arguments)

    played.ray.play = play
    assert sorted(played.children(3)) == [0, 1, 2]
    assert played.said("another one does the same")
    assert sorted(played.children(3)) == [0, 1, 2]


def test_a_straggler_that_dies_just_after_another_was_quicker_gets_no_more_orders(stage: Any) -> None:
    played = stage("one", "two")
    late = hangs_at(played, 1, 1)

    def play(actor: FakeActor, name: str, arguments: Any) -> Any:
        if name == "carry_out" and actor.number == 0 and arguments[0].children[0].index == 1:
            played.ray.lose(played.ray.actors[1])
        return late(actor, name, arguments)

    played.ray.play = play
    assert sorted(played.children(2)) == [0, 1]
    assert played.said("another one does the same")
    assert sorted(played.children(2)) == [0, 1]
    assert not played.said("died")


def test_data_that_find_no_room_with_ray_are_an_error_with_advice(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    played = FakeRay(["one"], ray_gate.installed())

    def put(_: Any) -> Any:
        raise ray.exceptions.OutOfDiskError("Local disk is full")

    monkeypatch.setattr(played, "put", put)
    monkeypatch.setattr(ray_trainer, "connect", lambda _: played)
    with pytest.raises(ClusterError, match=r"could not put the data of task 'easy' .*disk is full.*--object-store-memory"):
        RayTrainer(system, DATA, SETTINGS.model_copy(update={"executor": "ray"}))


def test_what_a_killed_worker_left_half_written_on_its_node_goes_when_the_next_one_begins(tmp_path: pathlib.Path) -> None:
    from tests.support.stores import machine

    url = (tmp_path / "store").as_uri()
    with machine(tmp_path / "driver"):
        found = make_system(url)
    identity = ray_trainer.make_trainer(found, DATA, SETTINGS).identity
    with machine(tmp_path / "node"):
        system, _, processor = ray_trainer.begin(url, found.id, DATA, SETTINGS, identity)
        assert processor.startswith("CPU")
        left = next((system.folder / "layers").glob("*/")) / ".a.safetensors.x.part"
        left.touch()
        ray_trainer.begin(url, found.id, DATA, SETTINGS, identity)
    assert not left.exists()
