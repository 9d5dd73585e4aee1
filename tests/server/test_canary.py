"""Which requests a canary answers, and what becomes of one that may not answer."""

from __future__ import annotations

import asyncio
import math
import pathlib
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.canary import Canary, CanaryPointer, Label
from server.embedded.engine import EmbeddedEngine
from server.errors import NoCanaryError
from server.generation import Generation
from tests.support.reloading import Watched, run, until
from tests.support.repository import DIGITS, GREEK, HEBREW, LARGE, SHORT, TRAP, RepositoryBuilder
from tests.support.serving import ENGINE


@given(percent=st.floats(0, 100), count=st.integers(1, 300))
def test_of_any_requests_in_a_row_a_canary_gets_its_part(percent: float, count: int) -> None:
    canary = Canary(CanaryPointer(2, percent, {}))
    taken = [canary.draw({"digits"}) for _ in range(count)]
    for first in range(0, count, 7):
        for length in (1, 10, count - first):
            row = taken[first : first + length]
            assert abs(sum(row) - len(row) * percent / 100) < 1 + 1e-9
    assert sum(taken) == math.floor(count * percent / 100 + 0.5)


def test_each_task_has_its_own_part_and_the_smallest_counts_for_several() -> None:
    canary = Canary(CanaryPointer(2, 50, {"never": 0, "always": 100}))
    assert sum(canary.draw({"always"}) for _ in range(10)) == 10
    assert sum(canary.draw({"other", "always"}) for _ in range(10)) == 5
    assert sum(canary.draw({"never", "always", "other"}) for _ in range(10)) == 0


@pytest.fixture
def builder(tmp_path: pathlib.Path) -> RepositoryBuilder:
    """Generation 1 serves. In generation 2 `digits` is another path, `greek` the same, `short` gone and `large` new."""
    builder = RepositoryBuilder(tmp_path / "repository")
    builder.publish({"digits": DIGITS, "greek": GREEK, "short": SHORT})
    builder.publish({"digits": HEBREW, "greek": GREEK, "large": LARGE}, current=False)
    return builder


@pytest.fixture
def engine() -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(ENGINE)
    yield engine
    engine.close()


def asked(watched: Watched, *tasks: str, label: Label = Label.ANY) -> int:
    with watched.reloader.lease(label, tasks) as generation:
        return generation.number


def held(engine: EmbeddedEngine) -> set[str]:
    return {segment.name for segment in engine.statistics()}


def names(builder: RepositoryBuilder, *numbers: int) -> set[str]:
    return {segment.name for number in numbers for segment in builder.read_manifest(number).segments}


def test_a_canary_answers_its_part_of_what_it_answers_otherwise(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        builder.set_canary(2, 20)
        await watched.reloader.reload()
        assert watched.number == 1
        assert held(engine) == names(builder, 1, 2)
        assert [asked(watched, "digits") for _ in range(10)] == [1, 1, 2, 1, 1, 1, 1, 2, 1, 1]
        # What both answer alike, what the canary does not have, what only it has, and nothing at all: all stay.
        for tasks in (["greek"], ["short"], ["digits", "short"], ["large"], ["unknown"], []):
            assert {asked(watched, *tasks) for _ in range(10)} == {1}
        assert sum(asked(watched, "greek", "digits") == 2 for _ in range(10)) == 2
        assert (asked(watched, "digits", label=Label.CANARY), asked(watched, "digits", label=Label.STABLE)) == (2, 1)
        assert watched.reloader.canary is not None
        assert watched.reloader.canary.num_requests == 5

    run(builder, engine, test)


def test_a_new_percentage_loads_nothing(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        builder.set_canary(2, 0)
        await watched.reloader.reload()
        watch = asyncio.create_task(watched.reloader.watch(0.005))
        loads = count_loads(engine)
        assert {asked(watched, "digits") for _ in range(10)} == {1}
        builder.set_canary(2, 0, digits=100)
        await until(lambda: asked(watched, "digits") == 2)
        builder.set_canary(2, 100, digits=0)
        await until(lambda: asked(watched, "digits") == 1)
        assert loads == []
        watch.cancel()

    run(builder, engine, test)


def count_loads(engine: EmbeddedEngine) -> list[int]:
    """Returns a list that gets the number of each generation that is loaded from now on."""
    loads: list[int] = []
    load = engine.load

    def counting(generation: Generation) -> None:
        loads.append(generation.number)
        load(generation)

    engine.load = counting  # type: ignore[method-assign]
    return loads


def test_a_promoted_canary_serves_without_being_loaded_again(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        builder.set_canary(2, 10)
        await watched.reloader.reload()
        loads = count_loads(engine)
        builder.set_current(2)
        assert await watched.reloader.reload() is True
        # As a publisher leaves it that was killed before it removed CANARY.
        assert (watched.number, watched.reloader.canary, loads) == (2, None, [])
        await watched.reloader.close()
        assert held(engine) == names(builder, 2)

    assert [generation.number for generation in run(builder, engine, test).swaps] == [1, 2]


def test_a_canary_that_is_gone_is_unloaded_when_its_last_request_is(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        builder.set_canary(2, 100)
        await watched.reloader.reload()
        with watched.reloader.lease(Label.CANARY) as generation:
            (builder.root / "CANARY").unlink()
            await watched.reloader.reload()
            await watched.reloader.close()
            assert (generation.number, asked(watched, "digits")) == (2, 1)
            assert held(engine) == names(builder, 1, 2)
        await watched.reloader.close()
        assert held(engine) == names(builder, 1)

    run(builder, engine, test)


def break_golden(builder: RepositoryBuilder) -> None:
    builder.edit(2, lambda message: message.tasks[0].golden.logits.__setitem__(0, 99.0))


def break_file(builder: RepositoryBuilder) -> None:
    builder.alter(f"{builder.read_manifest(2).tasks[0].route[1]}/1/model.onnx")


def point_nowhere(builder: RepositoryBuilder) -> None:
    builder.set_canary(7, 50)


def write_nonsense(builder: RepositoryBuilder) -> None:
    (builder.root / "CANARY").write_text("[2]")


def ask_too_much(builder: RepositoryBuilder) -> None:
    builder.set_canary(2, 101)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (break_golden, "generation 2 is refused: task 'digits': golden answer"),
        (break_file, "generation 2 is refused: files: "),
        (point_nowhere, "generation 7 is refused: generation-7.json: found No such file"),
        (write_nonsense, "CANARY: found "),
        (ask_too_much, "percentages from 0 to 100"),
    ],
)
def test_a_canary_with_faults_is_refused_whole(
    builder: RepositoryBuilder, engine: EmbeddedEngine, spoil: Callable[[RepositoryBuilder], None], words: str
) -> None:
    async def test(watched: Watched) -> None:
        builder.set_canary(2, 50)
        spoil(builder)
        await watched.reloader.reload()
        assert watched.number == 1
        assert watched.reloader.canary is not None
        assert words in watched.reloader.canary.refusal
        assert {asked(watched, "digits") for _ in range(10)} == {1}
        with pytest.raises(NoCanaryError):
            asked(watched, "digits", label=Label.CANARY)
        assert held(engine) == names(builder, 1)
        watch = asyncio.create_task(watched.reloader.watch(0.005))
        await asyncio.sleep(0.05)
        num_attempts = len(watched.attempts)
        # Mended, it answers.
        builder.publish({"digits": SHORT, "greek": GREEK}, current=False)
        builder.set_canary(3, 100)
        await until(lambda: asked(watched, "digits") == 3)
        assert num_attempts == 2
        watch.cancel()

    attempts = run(builder, engine, test).attempts
    assert [bool(attempt.error) for attempt in attempts] == [False, True, False]


def test_a_canary_survives_a_newer_stable_generation_only_if_it_is_newer_still(
    builder: RepositoryBuilder, engine: EmbeddedEngine
) -> None:
    async def test(watched: Watched) -> None:
        builder.publish({"digits": DIGITS, "trap": TRAP}, number=9, current=False)
        builder.set_canary(9, 100)
        await watched.reloader.reload()
        builder.set_current(2)
        await watched.reloader.reload()
        assert (watched.number, asked(watched, "digits"), asked(watched, "greek")) == (2, 9, 2)
        builder.publish({"digits": DIGITS})
        await watched.reloader.reload()
        assert (watched.number, watched.reloader.canary) == (10, None)

    run(builder, engine, test)


def test_going_back_ends_the_canary_of_this_server(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        builder.publish({"digits": HEBREW})
        builder.publish({"digits": SHORT}, current=False)
        builder.set_canary(4, 100)
        await watched.reloader.reload()
        assert asked(watched, "digits") == 4
        assert await watched.reloader.roll_back() == (2, 3)
        assert (asked(watched, "digits"), watched.reloader.canary) == (2, None)
        assert await watched.reloader.reload() is True
        assert asked(watched, "digits") == 4

    run(builder, engine, test)
