"""Going back to a generation that is kept, beside everything else that a reloader does."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import tempfile
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.canary import Label
from server.embedded.engine import EmbeddedEngine
from server.engine import Question
from server.errors import GenerationRefusedError, RollbackError
from server.generation import Generation
from tests.support.reloading import Watched, run, until
from tests.support.repository import DIGITS, GREEK, HEBREW, SHORT, RepositoryBuilder, answer, random_images
from tests.support.serving import ENGINE

PLANS = (DIGITS, HEBREW, GREEK, SHORT)


@pytest.fixture
def builder(tmp_path: pathlib.Path) -> RepositoryBuilder:
    """Three generations, of which the third is current."""
    builder = RepositoryBuilder(tmp_path / "repository")
    for number in range(3):
        builder.publish({"digits": PLANS[number]})
    return builder


@pytest.fixture
def engine() -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(ENGINE)
    yield engine
    engine.close()


def test_a_server_goes_back_and_stays_there_until_something_new_is_published(
    builder: RepositoryBuilder, engine: EmbeddedEngine
) -> None:
    async def test(watched: Watched) -> None:
        reloader = watched.reloader
        await reloader.reload()
        watch = asyncio.create_task(reloader.watch(0.005))
        assert await reloader.roll_back() == (2, 3)
        assert (watched.number, reloader.rolled_back_from) == (2, 3)
        # Neither a look at CURRENT nor a touch of its generation's file is news.
        (builder.root / "generation-3.json").touch()
        away = (builder.root / "CURRENT").rename(builder.root / "away")
        await asyncio.sleep(0.05)
        away.rename(builder.root / "CURRENT")
        await asyncio.sleep(0.05)
        assert watched.number == 2
        builder.publish({"digits": SHORT})
        await until(lambda: watched.number == 4)
        assert reloader.rolled_back_from is None
        watch.cancel()

    watched = run(builder, engine, test)
    assert [generation.number for generation in watched.swaps] == [3, 2, 4]
    assert [(attempt.number, attempt.error) for attempt in watched.attempts] == [(3, ""), (2, ""), (4, "")]
    assert {segment.name for segment in engine.statistics()} == set(watched.swaps[-1].segments)


def test_an_order_to_reload_ends_a_rollback(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        await watched.reloader.reload()
        await watched.reloader.roll_back(1)
        assert await watched.reloader.reload() is True
        assert (watched.number, watched.reloader.rolled_back_from) == (3, None)

    run(builder, engine, test)


def test_who_goes_back_to_what_current_names_can_go_back_again(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        reloader = watched.reloader
        await reloader.reload()
        assert await reloader.roll_back() == (2, 3)
        assert await reloader.roll_back(3) == (3, 2)
        assert (watched.number, reloader.rolled_back_from) == (3, None)
        assert await reloader.roll_back() == (2, 3)
        assert (watched.number, reloader.rolled_back_from) == (2, 3)

    run(builder, engine, test)


def test_a_rollback_of_the_repository_ends_that_of_a_server(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        await watched.reloader.reload()
        watch = asyncio.create_task(watched.reloader.watch(0.005))
        await watched.reloader.roll_back(1)
        builder.set_current(2)
        await until(lambda: watched.number == 2)
        watch.cancel()

    run(builder, engine, test)


def test_two_people_who_go_back_at_once_go_back_once(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        reloader = watched.reloader
        await reloader.reload()
        assert await asyncio.gather(reloader.roll_back(), reloader.roll_back()) == [(2, 3), (2, 2)]
        with pytest.raises(RollbackError, match=r"found 2 serves already instead of 3, expected one of .*: 1, 2, 3"):
            await reloader.roll_back()
        assert await reloader.roll_back(1) == (1, 2)
        assert (watched.number, reloader.rolled_back_from) == (1, 3)

    run(builder, engine, test)


def test_back_means_what_a_generation_was_published_on_top_of(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        builder.publish({"digits": SHORT})
        builder.edit(4, lambda message: setattr(message, "previous", 2))
        await watched.reloader.reload()
        assert await watched.reloader.roll_back() == (2, 4)

    run(builder, engine, test)


@pytest.mark.parametrize("number", [0, 7])
def test_there_is_no_going_where_nothing_is_kept(builder: RepositoryBuilder, engine: EmbeddedEngine, number: int) -> None:
    async def test(watched: Watched) -> None:
        await watched.reloader.reload()
        (builder.root / "generation-2.json").unlink()
        before = engine.statistics()
        with pytest.raises(RollbackError, match="expected one of those that are kept: 1, 3"):
            await watched.reloader.roll_back(number)
        assert (watched.number, watched.reloader.rolled_back_from) == (3, None)
        assert engine.statistics() == before

    run(builder, engine, test)


def test_a_generation_that_answers_wrongly_is_refused_and_current_goes_on(
    builder: RepositoryBuilder, engine: EmbeddedEngine
) -> None:
    async def test(watched: Watched) -> None:
        builder.edit(2, lambda message: message.tasks[0].golden.logits.__setitem__(0, 99.0))
        await watched.reloader.reload()
        with pytest.raises(GenerationRefusedError, match="generation 2 is refused: task 'digits': golden answer"):
            await watched.reloader.roll_back()
        assert (watched.number, watched.reloader.rolled_back_from) == (3, None)
        assert watched.reloader.last_attempt is not None
        assert watched.reloader.last_attempt.number == 2
        builder.publish({"digits": SHORT})
        assert await watched.reloader.reload() is True

    run(builder, engine, test)


class Loads:
    """Holds an engine's next load until it is let go."""

    def __init__(self, engine: EmbeddedEngine) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self._load = engine.load
        engine.load = self._slow  # type: ignore[method-assign]

    def _slow(self, generation: Generation) -> None:
        self.begun.set()
        assert self.go_on.wait(60)
        self._load(generation)


def test_who_goes_back_while_something_loads_comes_after_it(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        reloader = watched.reloader
        await reloader.reload()
        watch = asyncio.create_task(reloader.watch(0.005))
        loads = Loads(engine)
        builder.publish({"digits": SHORT})
        await until(loads.begun.is_set)
        back = asyncio.create_task(reloader.roll_back(1))
        await asyncio.sleep(0.02)
        with reloader.lease() as generation:
            assert generation.number == 3
        loads.go_on.set()
        assert await back == (1, 4)
        await asyncio.sleep(0.05)
        assert (watched.number, reloader.rolled_back_from) == (1, 4)
        watch.cancel()

    run(builder, engine, test)


def test_what_is_published_while_somebody_goes_back_comes_after_that(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        reloader = watched.reloader
        await reloader.reload()
        watch = asyncio.create_task(reloader.watch(0.005))
        loads = Loads(engine)
        back = asyncio.create_task(reloader.roll_back())
        await until(loads.begun.is_set)
        builder.publish({"digits": SHORT})
        loads.go_on.set()
        assert await back == (2, 3)
        await until(lambda: watched.number == 4)
        watch.cancel()

    run(builder, engine, test)


class Turmoil:
    """Publishes, goes back and tries, while somebody asks."""

    def __init__(self, folder: pathlib.Path, engine: EmbeddedEngine) -> None:
        self.builder = RepositoryBuilder(folder)
        self.engine = engine
        self._images = random_images(1, 8)
        for _ in range(3):
            self.publish()

    def publish(self, current: bool = True) -> int:
        return self.builder.publish({"digits": PLANS[self.builder.newest() % len(PLANS)]}, current=current)

    async def move(self, watched: Watched, move: str) -> None:
        if move == "publish":
            self.publish()
        elif move == "canary":
            self.builder.set_canary(self.publish(current=False), 50)
        elif move == "no canary":
            (self.builder.root / "CANARY").unlink(missing_ok=True)
        elif move == "reload":
            await watched.reloader.reload()
        elif move == "back":
            with contextlib.suppress(RollbackError):
                await watched.reloader.roll_back()
        else:
            await watched.reloader.roll_back(int(move))

    async def ask(self, watched: Watched) -> None:
        while True:
            with watched.reloader.lease(Label.ANY, ["digits"]) as generation:
                expected = answer(PLANS[(generation.number - 1) % len(PLANS)], self._images)
                logits = await asyncio.wrap_future(self.engine.answer(Question(generation, self._images, ("digits",))))
                np.testing.assert_allclose(logits["digits"], expected, atol=1e-4)
            await asyncio.sleep(0)


MOVES = st.sampled_from(["publish", "reload", "back", "1", "2", "3", "canary", "no canary"])


@settings(max_examples=12)
@given(moves=st.lists(MOVES, min_size=3, max_size=8))
def test_whatever_happens_at_once_no_answer_is_torn_and_nothing_stays_loaded(moves: list[str]) -> None:
    async def test(watched: Watched) -> None:
        await watched.reloader.reload()
        asking = asyncio.create_task(turmoil.ask(watched))
        watch = asyncio.create_task(watched.reloader.watch(0.001))
        making = []
        for move in moves:
            making.append(asyncio.create_task(turmoil.move(watched, move)))
            await asyncio.sleep(0.002)
        await asyncio.gather(*making)
        assert not asking.done()
        assert not watch.done()
        watch.cancel()
        asking.cancel()
        await turmoil.move(watched, "no canary")
        await watched.reloader.reload()
        assert watched.number == int((turmoil.builder.root / "CURRENT").read_text())
        await watched.reloader.close()
        assert {segment.name for segment in turmoil.engine.statistics()} == set(watched.swaps[-1].segments)

    with tempfile.TemporaryDirectory() as folder, contextlib.closing(EmbeddedEngine(ENGINE)) as engine:
        turmoil = Turmoil(pathlib.Path(folder), engine)
        run(turmoil.builder, engine, test)
