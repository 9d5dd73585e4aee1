from __future__ import annotations

import asyncio
import pathlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from server.embedded.engine import EmbeddedEngine
from server.engine import Question
from server.errors import GenerationRefusedError, NoEndpointError, RepositoryError, UnavailableError
from server.generation import Generation
from server.reload import ReloadAttempt, Reloader
from server.repository import Repository
from tests.support.reloading import Watched, run, until
from tests.support.repository import DIGITS, GREEK, HEBREW, TRAP, RepositoryBuilder, random_images
from tests.support.serving import ENGINE


@pytest.fixture
def builder(tmp_path: pathlib.Path) -> RepositoryBuilder:
    builder = RepositoryBuilder(tmp_path / "repository")
    builder.publish({"digits": DIGITS, "greek": GREEK})
    return builder


@pytest.fixture
def engine() -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(ENGINE)
    yield engine
    engine.close()


def test_a_swap_replaces_all_tasks_and_unloads_what_was_before(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        reloader = watched.reloader
        with pytest.raises(UnavailableError), reloader.lease():
            pass
        assert await reloader.reload() is True
        assert await reloader.reload() is False
        builder.publish({"digits": HEBREW})
        assert await reloader.reload() is True
        assert reloader.generation is watched.swaps[-1]

    watched = run(builder, engine, test)
    assert [generation.number for generation in watched.swaps] == [1, 2]
    assert [(attempt.number, attempt.error) for attempt in watched.attempts] == [(1, ""), (2, "")]
    assert {segment.name for segment in engine.statistics()} == set(watched.swaps[1].segments)


def test_a_lease_keeps_its_generation_answerable(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    images = random_images(2, 8)

    async def test(watched: Watched) -> None:
        reloader = watched.reloader
        await reloader.reload()
        with reloader.lease() as first:
            before = engine.answer(Question(first, images, ("digits",))).result()
            for plan in (HEBREW, GREEK, HEBREW):
                builder.publish({"digits": plan})
                await reloader.reload()
            after = engine.answer(Question(first, images, ("digits",))).result()
            assert np.array_equal(before["digits"], after["digits"])
        await reloader.close()
        assert {segment.name for segment in engine.statistics()} == set(reloader.generation.segments)

    run(builder, engine, test)


def test_rollback_is_the_same_swap(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        await watched.reloader.reload()
        builder.publish({"digits": HEBREW})
        await watched.reloader.reload()
        builder.set_current(1)
        await watched.reloader.reload()

    assert [generation.number for generation in run(builder, engine, test).swaps] == [1, 2, 1]


def test_a_repository_made_anew_is_another_generation(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        await watched.reloader.reload()
        builder.publish({"digits": HEBREW}, number=1)
        assert await watched.reloader.reload() is True

    assert [list(generation.tasks) for generation in run(builder, engine, test).swaps] == [["digits", "greek"], ["digits"]]


def break_golden(builder: RepositoryBuilder) -> None:
    builder.edit(2, lambda message: message.tasks[0].golden.logits.__setitem__(0, 99.0))


def break_model(builder: RepositoryBuilder) -> None:
    route = builder.read_manifest(2).tasks[1].route
    builder.replace_file(2, f"{route[1]}/1/model.onnx", b"no model")


def break_config(builder: RepositoryBuilder) -> None:
    builder.replace_file(2, f"{builder.read_manifest(2).tasks[1].ensemble}/config.pbtxt", b"nonsense")


def break_file(builder: RepositoryBuilder) -> None:
    builder.alter(f"{builder.read_manifest(2).tasks[1].route[1]}/1/model.onnx")


def remove_file(builder: RepositoryBuilder) -> None:
    (builder.root / builder.read_manifest(2).tasks[1].route[1] / "1" / "model.onnx").unlink()


def break_route(builder: RepositoryBuilder) -> None:
    builder.edit(2, lambda message: message.tasks[1].route.reverse())


@pytest.mark.parametrize("spoil", [break_golden, break_model, break_config, break_file, remove_file, break_route])
def test_a_bad_generation_is_refused_whole(
    builder: RepositoryBuilder, engine: EmbeddedEngine, spoil: Callable[[RepositoryBuilder], None]
) -> None:
    async def test(watched: Watched) -> None:
        await watched.reloader.reload()
        before = engine.statistics()
        # A changed task and a new one: `digits` is asked its golden answers again only because its route changed.
        builder.publish({"digits": HEBREW, "hebrew": HEBREW, "trap": TRAP}, current=False)
        spoil(builder)
        builder.set_current(2)
        with pytest.raises(GenerationRefusedError, match="generation 2 is refused"):
            await watched.reloader.reload()
        assert watched.reloader.generation is watched.swaps[0]
        assert engine.statistics() == before

    watched = run(builder, engine, test)
    assert len(watched.swaps) == 1
    assert watched.attempts[-1].number == 2
    assert watched.reloader.last_attempt == watched.attempts[-1]
    assert watched.attempts[-1].error.startswith("generation 2 is refused: ")


def test_watching_serves_what_is_published(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        await watched.reloader.reload()
        watch = asyncio.create_task(watched.reloader.watch(0.005))
        for number in (2, 3):
            builder.publish({"digits": HEBREW if number == 2 else DIGITS})
            await until(lambda: watched.swaps[-1].number == number)  # noqa: B023
        watch.cancel()

    run(builder, engine, test)


def test_a_bad_generation_is_tried_again_when_something_changes_and_not_before(
    builder: RepositoryBuilder, engine: EmbeddedEngine
) -> None:
    async def test(watched: Watched) -> None:
        await watched.reloader.reload()
        watch = asyncio.create_task(watched.reloader.watch(0.005))
        builder.publish({"digits": HEBREW}, current=False)
        path = builder.root / builder.read_manifest(2).tasks[0].route[1] / "1" / "model.onnx"
        content = path.read_bytes()
        path.unlink()
        builder.set_current(2)
        await until(lambda: len(watched.attempts) == 2)
        await asyncio.sleep(0.2)
        assert len(watched.attempts) == 2
        path.write_bytes(content[:100])
        await until(lambda: len(watched.attempts) >= 3)
        path.write_bytes(content)
        await until(lambda: len(watched.swaps) == 2)
        watch.cancel()

    assert run(builder, engine, test).attempts[-1].error == ""


class LateEngine(EmbeddedEngine):
    """Cannot load a second generation for a while, through no fault of the generation."""

    num_refusals = 0

    def load(self, generation: Generation) -> None:
        if generation.number == 2 and self.num_refusals < 3:
            self.num_refusals += 1
            raise NoEndpointError(["digits"], ["127.0.0.1:8001 is down"])
        super().load(generation)


def test_where_the_engine_may_be_to_blame_a_generation_is_tried_again_after_a_while(builder: RepositoryBuilder) -> None:
    engine = LateEngine(ENGINE)

    async def test() -> tuple[list[ReloadAttempt], float]:
        attempts: list[ReloadAttempt] = []
        reloader = Reloader(Repository(builder.root), engine, lambda _: None, attempts.append, retry_seconds=0.1)
        await reloader.reload()
        watch = asyncio.create_task(reloader.watch(0.005))
        builder.publish({"digits": HEBREW})
        started = time.monotonic()
        await until(lambda: len(attempts) == 5)
        watch.cancel()
        return attempts, time.monotonic() - started

    try:
        attempts, seconds = asyncio.run(test())
    finally:
        engine.close()
    assert [bool(attempt.error) for attempt in attempts] == [False, True, True, True, False]
    assert seconds >= 3 * 0.1


def test_watching_outlives_a_repository_that_goes_and_comes(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        await watched.reloader.reload()
        watch = asyncio.create_task(watched.reloader.watch(0.005))
        away = builder.root.with_name("away")
        builder.root.rename(away)
        await until(lambda: len(watched.attempts) == 2)
        (builder.root).write_text("a file where the folder was")
        await asyncio.sleep(0.05)
        builder.root.unlink()
        away.rename(builder.root)
        builder.publish({"digits": HEBREW})
        await until(lambda: len(watched.swaps) == 2)
        assert not watch.done()
        watch.cancel()

    assert "munet-evolve export" in run(builder, engine, test).attempts[1].error


def test_an_unreadable_current_is_refused(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        await watched.reloader.reload()
        (builder.root / "CURRENT").write_text("nonsense")
        with pytest.raises(RepositoryError, match="nonsense"):
            await watched.reloader.reload()

    assert [attempt.number for attempt in run(builder, engine, test).attempts] == [1, 0]


def test_a_caller_who_leaves_leaves_a_whole_reload_behind(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    async def test(watched: Watched) -> None:
        await watched.reloader.reload()
        builder.publish({"digits": HEBREW})
        for _ in range(3):
            caller = asyncio.create_task(watched.reloader.reload())
            await asyncio.sleep(0.001)
            caller.cancel()
        await until(lambda: len(watched.swaps) == 2)

    assert len(run(builder, engine, test).swaps) == 2


def test_only_changed_tasks_are_rehearsed(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    asked: list[tuple[str, ...]] = []
    answer = engine.answer

    def listening(question: Question) -> Any:
        asked.append(question.tasks)
        return answer(question)

    engine.answer = listening  # type: ignore[method-assign]

    async def test(watched: Watched) -> None:
        await watched.reloader.reload()
        builder.publish({"digits": DIGITS, "greek": GREEK, "hebrew": HEBREW})
        await watched.reloader.reload()

    run(builder, engine, test)
    assert asked == [("digits", "greek"), ("hebrew",)]


def test_reloads_do_not_block_the_loop(builder: RepositoryBuilder, engine: EmbeddedEngine) -> None:
    loading = threading.Event()
    go_on = threading.Event()
    load = engine.load

    def slow(generation: Generation) -> None:
        loading.set()
        go_on.wait(60)
        load(generation)

    async def test(watched: Watched) -> None:
        await watched.reloader.reload()
        engine.load = slow  # type: ignore[method-assign]
        builder.publish({"digits": HEBREW})
        reload = asyncio.create_task(watched.reloader.reload())
        await until(loading.is_set)
        with watched.reloader.lease() as generation:
            assert generation.number == 1
        go_on.set()
        assert await reload is True

    run(builder, engine, test)
