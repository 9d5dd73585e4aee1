"""What is unloaded from a Triton that several share, and what must stay, each for a reason of its own."""

from __future__ import annotations

import collections
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from server.errors import ModelMissingError
from server.generation import Generation
from server.repository import Repository, config_path
from server.triton.endpoint import ModelCounts
from server.triton.fleet import Fleet
from server.triton.plans import HeldGeneration
from server.triton.tidying import Tidying
from tests.support.repository import DIGITS, GREEK, HEBREW, SHORT, RepositoryBuilder, TaskPlan
from tests.support.triton import triton_settings

A_WHILE_SECONDS = 0.05


class FakeTriton:
    """What tidying calls of an `Endpoint`; as in Triton, an ensemble falls with any model that it runs through."""

    address = "a fake"

    def __init__(self, root: pathlib.Path) -> None:
        self._root = root
        self.ready: set[str] = set()
        self.num_requests: collections.Counter[str] = collections.Counter()
        self.num_loads: collections.Counter[str] = collections.Counter()
        self.on_unload: Callable[[], object] = lambda: None

    def loaded(self) -> frozenset[str]:
        return frozenset(self.ready)

    def counts(self) -> dict[str, ModelCounts]:
        return {name: ModelCounts(*[self.num_requests[name]] * 3) for name in self.ready}

    def config(self, model: str) -> model_config_pb2.ModelConfig:
        if model not in self.ready:
            raise ModelMissingError(self.address, f"unknown model {model}")
        return text_format.Parse((self._root / config_path(model)).read_text(), model_config_pb2.ModelConfig())

    def load(self, model: str, timeout_seconds: float) -> None:
        self.num_loads[model] += 1
        self.ready.add(model)

    def unload(self, model: str) -> None:
        steps = {name: {step.model_name for step in self.config(name).ensemble_scheduling.step} for name in self.ready}
        self.ready -= {name for name in self.ready if name == model or model in steps[name]}
        self.on_unload()


class Bench:
    """A repository, a fake Triton with all that was ever published there, and one server's view of both."""

    def __init__(self, root: pathlib.Path) -> None:
        self.builder = RepositoryBuilder(root)
        self.triton = FakeTriton(root)
        self.fleet = Fleet([self.triton])  # type: ignore[list-item]
        self.settings = triton_settings(root, aliases=False, unload_after_seconds=0.0).triton
        self.tidying = self.restart()

    def restart(self, **settings: object) -> Tidying:
        self.settings = self.settings.model_copy(update=settings)
        self.tidying = Tidying(self.fleet.members[0], self.fleet, self.settings, self.builder.root)
        return self.tidying

    def publish(self, **plans: TaskPlan) -> HeldGeneration:
        """Publishes, makes it current, and loads it, as some server does."""
        held = HeldGeneration(Repository(self.builder.root).read(self.builder.publish(plans)))
        self.triton.ready |= held.models
        return held

    def hold(self, *generations: HeldGeneration) -> None:
        """Has this server hold these and no others."""
        self.fleet.loaded = {held.generation: held for held in generations}
        for held in generations:
            self.fleet.known |= {*held.models, *held.generation.tasks}

    def add_model(self, name: str, steps: Sequence[str]) -> None:
        """Loads somebody's own model; an ensemble, if it runs through others."""
        config = model_config_pb2.ModelConfig(name=name)
        for step in steps:
            config.ensemble_scheduling.step.add(model_name=step)
        (self.builder.root / name).mkdir(exist_ok=True)
        (self.builder.root / config_path(name)).write_text(text_format.MessageToString(config))
        self.triton.ready.add(name)


@pytest.fixture
def bench(tmp_path: pathlib.Path) -> Bench:
    return Bench(tmp_path)


def models(*generations: HeldGeneration) -> set[str]:
    return set().union(*(held.models for held in generations))


def retire(fleet: Fleet, held: HeldGeneration) -> None:
    fleet.loaded.clear()
    fleet.retiring.add(held)


def load(fleet: Fleet, held: HeldGeneration) -> None:
    fleet.loaded.clear()
    fleet.loading = held


def keep(fleet: Fleet, held: HeldGeneration) -> None:
    pass


@pytest.mark.parametrize("change", [keep, retire, load])
def test_what_this_server_holds_stays_though_the_repository_has_gone_on(
    bench: Bench, change: Callable[[Fleet, HeldGeneration], object]
) -> None:
    bench.publish(short=SHORT)
    mine, current = bench.publish(digits=DIGITS, greek=GREEK), bench.publish(hebrew=HEBREW)
    bench.hold(mine)
    change(bench.fleet, mine)
    bench.tidying.run()
    assert bench.triton.ready == models(mine, current)


def test_the_while_begins_when_a_model_is_no_longer_needed(bench: Bench) -> None:
    mine, current = bench.publish(digits=DIGITS), bench.publish(hebrew=HEBREW)
    bench.hold(mine, current)
    bench.restart(unload_after_seconds=A_WHILE_SECONDS)
    bench.tidying.run()
    time.sleep(2 * A_WHILE_SECONDS)
    bench.hold(current)
    bench.tidying.run()
    assert bench.triton.ready == models(mine, current)
    time.sleep(2 * A_WHILE_SECONDS)
    bench.tidying.run()
    assert bench.triton.ready == models(current)


def test_what_comes_to_be_needed_while_others_are_unloaded_stays(bench: Bench) -> None:
    bench.publish(a=SHORT)
    wanted, current = bench.publish(b=DIGITS), bench.publish(hebrew=HEBREW)
    bench.hold(current)

    def begin_to_load() -> None:
        bench.fleet.loading = wanted

    bench.triton.on_unload = begin_to_load
    bench.tidying.run()
    assert bench.triton.ready == models(wanted, current)


def test_what_current_names_stays_at_a_server_that_has_not_got_there_yet(bench: Bench) -> None:
    mine, current = bench.publish(digits=DIGITS), bench.publish(hebrew=HEBREW)
    bench.hold(mine)
    bench.tidying.run()
    assert bench.triton.ready == models(mine, current)


def test_what_another_server_asks_stays_until_it_asks_no_more(bench: Bench) -> None:
    theirs, current = bench.publish(digits=DIGITS, greek=GREEK), bench.publish(hebrew=HEBREW)
    asked = theirs.generation.tasks["digits"]
    bench.hold(current)
    bench.restart(unload_after_seconds=A_WHILE_SECONDS)
    bench.tidying.run()
    time.sleep(2 * A_WHILE_SECONDS)
    bench.triton.num_requests[asked.ensemble] += 1
    bench.tidying.run()
    assert bench.triton.ready == models(current) | {asked.ensemble, *asked.route}
    time.sleep(2 * A_WHILE_SECONDS)
    bench.tidying.run()
    assert bench.triton.ready == models(current)


def test_what_somebodys_own_ensemble_runs_through_stays(bench: Bench) -> None:
    gone, current = bench.publish(digits=DIGITS), bench.publish(hebrew=HEBREW)
    bench.hold(current)
    route = gone.generation.tasks["digits"].route
    bench.add_model("somebodys", route)
    bench.tidying.run()
    assert bench.triton.ready == models(current) | {"somebodys", *route}
    # Under a name that is not of content it may be another one the next time.
    other = bench.publish(short=SHORT)
    bench.builder.set_current(current.generation.number)
    route = other.generation.tasks["short"].route
    bench.add_model("somebodys", route)
    bench.tidying.run()
    assert bench.triton.ready == models(current) | {"somebodys", *route}


def test_what_this_repository_never_published_stays(bench: Bench) -> None:
    gone, current = bench.publish(digits=DIGITS), bench.publish(hebrew=HEBREW)
    bench.hold(current)
    strangers = {"seg-0123456789ab": (), "theirs.0123456789ab": ("seg-0123456789ab",), "resnet": ()}
    for name, steps in strangers.items():
        bench.add_model(name, steps)
    (bench.builder.root / f"generation-{gone.generation.number}.json").unlink()
    bench.tidying.run()
    # Nor does this server know the generation that the repository has forgotten.
    assert bench.triton.ready == models(gone, current) | strangers.keys()
    bench.hold(gone, current)
    bench.hold(current)
    bench.tidying.run()
    assert bench.triton.ready == models(current) | strangers.keys()


def test_nothing_is_unloaded_while_the_repository_cannot_be_read(bench: Bench) -> None:
    gone, current = bench.publish(digits=DIGITS), bench.publish(hebrew=HEBREW)
    bench.hold(current)
    (bench.builder.root / "CURRENT").write_text("none\n")
    bench.tidying.run()
    assert bench.triton.ready == models(gone, current)
    bench.builder.set_current(current.generation.number)
    bench.tidying.run()
    assert bench.triton.ready == models(current)


def follow(bench: Bench, generation: Generation, aliases: Iterable[str]) -> None:
    """Has aliases be loaded, and then this server follow a generation."""
    bench.triton.ready.update(aliases)
    bench.fleet.followed = generation
    bench.tidying.run()


def test_aliases_of_tasks_that_are_gone_go_at_once_and_nothing_else_does(bench: Bench) -> None:
    theirs, current = bench.publish(going=DIGITS, greek=GREEK), bench.publish(hebrew=HEBREW)
    bench.hold(current)
    bench.restart(aliases=True, unload_after_seconds=1000.0)
    follow(bench, current.generation, ["going"])
    assert bench.triton.ready == models(theirs, current) | {"hebrew"}


def test_the_alias_of_a_task_that_comes_back_is_loaded_again_whoever_unloaded_it(bench: Bench) -> None:
    both, one = bench.publish(digits=DIGITS, hebrew=HEBREW), bench.publish(hebrew=HEBREW)
    bench.restart(aliases=True, unload_after_seconds=1000.0)

    def go_to(held: HeldGeneration) -> None:
        bench.hold(held)
        bench.builder.set_current(held.generation.number)
        follow(bench, held.generation, [])

    go_to(both)
    assert {"digits", "hebrew"} <= bench.triton.ready
    bench.triton.ready -= {"digits", "hebrew"}
    go_to(one)
    assert "digits" not in bench.triton.ready
    go_to(both)
    assert {"digits", "hebrew"} <= bench.triton.ready
    go_to(one)
    assert "digits" not in bench.triton.ready
    # Somebody's, until the task is back.
    bench.triton.ready.add("digits")
    go_to(both)
    assert bench.triton.num_loads["digits"] == 3


def test_aliases_are_left_alone_by_who_loads_none(bench: Bench) -> None:
    theirs, current = bench.publish(going=DIGITS), bench.publish(hebrew=HEBREW)
    bench.hold(current)
    follow(bench, current.generation, ["going"])
    # What it runs through stays with it.
    assert bench.triton.ready == models(current) | {"going", *theirs.generation.tasks["going"].route}


@pytest.mark.parametrize("steps", [[], ["seg-0123456789ab", "resnet"]])
def test_somebodys_model_with_the_name_of_a_task_that_is_gone_stays(bench: Bench, steps: list[str]) -> None:
    bench.publish(going=DIGITS)
    current = bench.publish(hebrew=HEBREW)
    bench.hold(current)
    bench.restart(aliases=True)
    (bench.builder.root / config_path("going")).unlink()
    (bench.builder.root / "going" / "labels.txt").unlink()
    (bench.builder.root / "going" / "1").rmdir()
    (bench.builder.root / "going").rmdir()
    bench.add_model("going", steps)
    follow(bench, current.generation, [])
    assert bench.triton.ready == models(current) | {"going", "hebrew"}
