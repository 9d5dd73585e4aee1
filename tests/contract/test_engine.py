"""What `server.engine.Engine` promises, asked of every implementation."""

from __future__ import annotations

import concurrent.futures
import pathlib
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from server.embedded.carriers import DeviceCarrier
from server.embedded.engine import EmbeddedEngine
from server.embedded.memory import SESSION_BYTES
from server.engine import Engine, Question
from server.errors import DeadlineError, EngineClosedError, NotLoadedError, SegmentLoadError, SegmentRunError
from server.generation import Generation
from server.repository import Repository
from server.triton.engine import TritonEngine
from tests.support.repository import DIGITS, GREEK, HEBREW, TASKS, TRAP, VOID, RepositoryBuilder, answer, random_images
from tests.support.serving import ENGINE
from tests.support.triton import triton_settings

EMBEDDED: dict[str, Callable[[], Engine]] = {
    "embedded": lambda: EmbeddedEngine(ENGINE),
    # Room for the longest route, and no more: nearly every question has something loaded, and something else go.
    "embedded, within a limit of memory": lambda: EmbeddedEngine(
        ENGINE.model_copy(update={"memory_limit_bytes": 4 * (SESSION_BYTES + 8192), "workers": 2})
    ),
    # What runs on a GPU, on the device that every machine has.
    "embedded, device values on the cpu": lambda: EmbeddedEngine(ENGINE, carrier=DeviceCarrier("cpu")),
    "embedded, cuda": lambda: EmbeddedEngine(ENGINE.model_copy(update={"device": "cuda", "workers": 2})),
}
KINDS = (*sorted(EMBEDDED), "triton")

SMALL = ("digits", "greek", "hebrew", "short")


@pytest.fixture(params=[pytest.param(kind, marks=[pytest.mark.gpu] if "cuda" in kind else []) for kind in KINDS])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def builder(kind: str, tmp_path: pathlib.Path, request: pytest.FixtureRequest) -> RepositoryBuilder:
    # One Triton for all tests, and so one folder: what is published there twice has the same name and is loaded once.
    return RepositoryBuilder(request.getfixturevalue("triton_folder") if kind == "triton" else tmp_path / "repository")


@pytest.fixture
def engine(kind: str, builder: RepositoryBuilder, request: pytest.FixtureRequest) -> Iterator[Engine]:
    if kind == "triton":
        engine: Engine = TritonEngine(triton_settings(builder.root, request.getfixturevalue("triton")))
    else:
        engine = EMBEDDED[kind]()
    yield engine
    engine.close()


@pytest.fixture
def generation(builder: RepositoryBuilder) -> Generation:
    builder.publish()
    return Repository(builder.root).read()


def alike(engine: Engine, one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two answers to the same are the same: to the bit on a CPU, within 1e-5 on a GPU, whose kernels depend on the batch."""
    return np.array_equal(one, other) if "cuda" not in engine.name else np.allclose(one, other, rtol=0, atol=1e-5)


def rows_by_layer(engine: Engine, generation: Generation, task: str) -> list[tuple[int, int, int]]:
    """Requested rows, computed rows and executions of each segment along a task's route."""
    by_name = {segment.name: segment for segment in engine.statistics()}
    found = (by_name[name] for name in generation.tasks[task].route)
    return [(segment.rows_requested, segment.rows_computed, segment.executions) for segment in found]


def test_answers_are_those_of_the_reference(engine: Engine, generation: Generation) -> None:
    engine.load(generation)
    for size, tasks in ((8, SMALL), (16, ("large",))):
        images = random_images(5, size, seed=3)
        logits = engine.answer(Question(generation, images, tasks)).result()
        assert list(logits) == list(tasks)
        for name in tasks:
            assert logits[name].dtype == np.float32
            np.testing.assert_allclose(logits[name], answer(TASKS[name], images), atol=1e-4, rtol=0)


def test_what_routes_share_from_the_image_on_is_computed_once(engine: Engine, generation: Generation) -> None:
    engine.load(generation)
    engine.answer(Question(generation, random_images(1, 8), SMALL)).result()
    # The clone's route rejoins the shared segment: the same weights, but another history and so a row of its own. The two may run in one
    # batch.
    together = rows_by_layer(engine, generation, "digits")[2][2]
    assert together in (1, 2)
    assert rows_by_layer(engine, generation, "digits") == [(4, 1, 1), (3, 1, 1), (3, 2, together), (1, 1, 1)]
    assert rows_by_layer(engine, generation, "hebrew")[1:3] == [(1, 1, 1), (3, 2, together)]


def test_answers_do_not_depend_on_what_else_is_asked(engine: Engine, generation: Generation) -> None:
    engine.load(generation)
    images = random_images(6, 8, seed=5)
    together = engine.answer(Question(generation, images, SMALL)).result()
    for name in SMALL:
        alone = [engine.answer(Question(generation, images[row : row + 1], (name,))).result()[name] for row in range(6)]
        assert alike(engine, np.concatenate(alone), together[name])
    crowd = [engine.answer(Question(generation, images[row : row + 1], (SMALL[row % 4],))) for row in range(6)]
    for row, future in enumerate(crowd):
        assert alike(engine, future.result()[SMALL[row % 4]][0], together[SMALL[row % 4]][row])


def test_concurrent_questions_of_different_tasks_share_executions(engine: Engine, generation: Generation) -> None:
    engine.load(generation)
    images = random_images(1, 8)
    for asked in range(200, 4200, 200):
        futures = [engine.answer(Question(generation, images, (SMALL[index % 4],))) for index in range(200)]
        for future in futures:
            future.result()
        requested, computed, executions = rows_by_layer(engine, generation, "digits")[0]
        assert (requested, computed) == (asked, asked)
        # Questions that come slower than they are answered share nothing; then they are asked again.
        if executions < asked - 50:
            return
    pytest.fail(f"{executions} executions of {asked} rows: next to nothing was shared")


def test_rehearsals_are_not_counted(engine: Engine, generation: Generation) -> None:
    engine.load(generation)
    engine.answer(Question(generation, random_images(2, 8), SMALL, counted=False)).result()
    assert all(segment.executions == segment.rows_requested == 0 for segment in engine.statistics())


@pytest.mark.parametrize(
    ("images", "tasks"),
    [
        (random_images(1, 8), ()),
        (random_images(1, 8), ("digits", "digits")),
        (random_images(1, 8), ("unknown",)),
        (random_images(1, 16), ("digits",)),
        (random_images(1, 8)[:0], ("digits",)),
        (random_images(1, 8)[0], ("digits",)),
        (random_images(1, 8).astype(np.float32), ("digits",)),
    ],
)
def test_impossible_questions_raise(engine: Engine, generation: Generation, images: np.ndarray, tasks: tuple[str, ...]) -> None:
    engine.load(generation)
    with pytest.raises(ValueError, match="found"):
        engine.answer(Question(generation, images, tasks))


def test_a_generation_must_be_loaded(engine: Engine, generation: Generation) -> None:
    future = engine.answer(Question(generation, random_images(1, 8), ("digits",)))
    with pytest.raises(NotLoadedError):
        future.result()


def test_generations_answer_side_by_side_and_share_segments(engine: Engine, builder: RepositoryBuilder) -> None:
    repository = Repository(builder.root)
    first = repository.read(builder.publish({"digits": DIGITS, "greek": GREEK}))
    second = repository.read(builder.publish({"digits": HEBREW, "greek": GREEK}))
    images = random_images(2, 8)
    engine.load(first)
    engine.load(first)
    old = engine.answer(Question(first, images, ("digits", "greek"))).result()
    engine.load(second)
    assert len(engine.statistics()) == len(first.segments.keys() | second.segments.keys())
    futures = [engine.answer(Question(generation, images, ("digits", "greek"))) for generation in (first, second)]
    both = [future.result() for future in futures]
    assert alike(engine, both[0]["digits"], old["digits"])
    assert alike(engine, both[1]["greek"], old["greek"])
    np.testing.assert_allclose(both[1]["digits"], answer(HEBREW, images), atol=1e-4, rtol=0)
    engine.unload(first)
    assert {segment.name for segment in engine.statistics()} == set(second.segments)
    again = engine.answer(Question(second, images, ("greek",))).result()
    assert alike(engine, again["greek"], old["greek"])


def test_questions_outlive_their_generation(engine: Engine, generation: Generation) -> None:
    engine.load(generation)
    images = random_images(16, 8)
    futures = [engine.answer(Question(generation, images, SMALL)) for _ in range(50)]
    engine.unload(generation)
    engine.unload(generation)
    with pytest.raises(NotLoadedError):
        engine.answer(Question(generation, images, SMALL)).result()
    answers = [future.result() for future in futures]
    assert all(alike(engine, logits["digits"], answers[0]["digits"]) for logits in answers)
    deadline = time.monotonic() + 60
    while engine.statistics() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.statistics() == []


def test_a_load_that_fails_changes_nothing(engine: Engine, builder: RepositoryBuilder) -> None:
    repository = Repository(builder.root)
    first = repository.read(builder.publish({"digits": DIGITS}))
    engine.load(first)
    before = engine.statistics()
    second = repository.read(builder.publish({"digits": DIGITS, "hebrew": HEBREW}))
    broken = next(segment for name, segment in second.segments.items() if name not in first.segments)
    broken.model.write_bytes(b"no model")
    with pytest.raises(SegmentLoadError, match=broken.name):
        engine.load(second)
    assert engine.statistics() == before
    assert engine.answer(Question(first, random_images(1, 8), ("digits",))).result()
    with pytest.raises(NotLoadedError):
        engine.answer(Question(second, random_images(1, 8), ("digits",))).result()


def test_a_passed_deadline_fails_before_it_costs_anything(engine: Engine, generation: Generation) -> None:
    engine.load(generation)
    late = engine.answer(Question(generation, random_images(1, 8), ("digits",), deadline_seconds=time.monotonic() - 1))
    with pytest.raises(DeadlineError):
        late.result()
    assert rows_by_layer(engine, generation, "digits")[0] == (0, 0, 0)
    in_time = engine.answer(Question(generation, random_images(1, 8), ("digits",), deadline_seconds=time.monotonic() + 60))
    assert in_time.result()


def test_deadlines_hold_while_questions_wait(engine: Engine, generation: Generation) -> None:
    engine.load(generation)
    images = random_images(64, 8)
    patient = [engine.answer(Question(generation, images, SMALL)) for _ in range(100)]
    hurried = [engine.answer(Question(generation, images, SMALL, time.monotonic() + 1e-4)) for _ in range(100)]
    outcomes = [future.exception() for future in hurried]
    assert any(isinstance(error, DeadlineError) for error in outcomes)
    assert all(error is None or isinstance(error, DeadlineError) for error in outcomes)
    assert all(future.exception() is None for future in patient)


def test_cancelling_drops_what_waits_and_disturbs_nobody(engine: Engine, generation: Generation) -> None:
    engine.load(generation)
    images = random_images(8, 8, seed=9)
    expected = engine.answer(Question(generation, images, SMALL)).result()
    before = rows_by_layer(engine, generation, "digits")[0][1]
    futures = [engine.answer(Question(generation, images, SMALL)) for _ in range(1000)]
    for index, future in enumerate(futures):
        if index % 10:
            future.cancel()
    for future in futures[::10]:
        logits = future.result()
        assert all(alike(engine, logits[name], expected[name]) for name in SMALL)
    computed = rows_by_layer(engine, generation, "digits")[0][1] - before
    assert 100 * 8 <= computed < 1000 * 8
    with pytest.raises(concurrent.futures.CancelledError):
        next(future for future in futures if future.cancelled()).result()


def test_a_failing_row_fails_alone(engine: Engine, builder: RepositoryBuilder) -> None:
    builder.publish({"trap": TRAP, "digits": DIGITS})
    generation = Repository(builder.root).read()
    engine.load(generation)
    good = random_images(1, 8, seed=1)
    bad = good.copy()
    bad[0, 0, 0, 0] = 255
    expected = engine.answer(Question(generation, good, ("trap", "digits"))).result()
    futures = [engine.answer(Question(generation, bad if i % 5 == 0 else good, ("trap", "digits"))) for i in range(100)]
    for index, future in enumerate(futures):
        if index % 5 == 0:
            assert isinstance(future.exception(), SegmentRunError)
        else:
            assert alike(engine, future.result()["trap"], expected["trap"])
            assert alike(engine, future.result()["digits"], expected["digits"])


def test_a_row_without_numbers_fails_alone(engine: Engine, builder: RepositoryBuilder) -> None:
    builder.publish({"void": VOID, "digits": DIGITS})
    generation = Repository(builder.root).read()
    engine.load(generation)
    good = random_images(1, 8, seed=1)
    bad = good.copy()
    bad[0, 0, 0, 0] = 255
    expected = engine.answer(Question(generation, good, ("void", "digits"))).result()
    futures = [engine.answer(Question(generation, bad if i % 5 == 0 else good, ("void", "digits"))) for i in range(100)]
    for index, future in enumerate(futures):
        if index % 5 == 0:
            error = future.exception()
            assert isinstance(error, SegmentRunError)
            assert "no numbers" in str(error)
        else:
            assert alike(engine, future.result()["void"], expected["void"])
            assert alike(engine, future.result()["digits"], expected["digits"])


def test_many_threads_may_ask_load_and_unload(engine: Engine, builder: RepositoryBuilder) -> None:
    repository = Repository(builder.root)
    steady = repository.read(builder.publish())
    others = [repository.read(builder.publish({"digits": plan})) for plan in (GREEK, HEBREW)]
    engine.load(steady)
    images = random_images(3, 8)
    expected = engine.answer(Question(steady, images, SMALL)).result()
    wrong: list[object] = []

    def ask() -> None:
        for _ in range(40):
            logits = engine.answer(Question(steady, images, SMALL)).result()
            wrong.extend(name for name in SMALL if not alike(engine, logits[name], expected[name]))

    def swap(generation: Generation) -> None:
        for _ in range(20):
            engine.load(generation)
            future = engine.answer(Question(generation, images, ("digits",)))
            engine.unload(generation)
            if future.exception() is not None:
                wrong.append(future.exception())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    threads += [threading.Thread(target=swap, args=(generation,)) for generation in others]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert {segment.name for segment in engine.statistics()} >= set(steady.segments)


def test_closing_fails_what_is_open(engine: Engine, generation: Generation) -> None:
    engine.load(generation)
    images = random_images(32, 8)
    # Far more than are answered while they are asked, and a while after that.
    futures = [engine.answer(Question(generation, images, SMALL)) for _ in range(500)]
    engine.close()
    engine.close()
    assert all(future.done() for future in futures)
    assert any(isinstance(future.exception(), EngineClosedError) for future in futures)
    with pytest.raises(EngineClosedError):
        engine.answer(Question(generation, random_images(1, 8), SMALL)).result()
    with pytest.raises(EngineClosedError):
        engine.load(generation)
    assert engine.statistics() == []


def test_it_has_a_name(engine: Engine) -> None:
    assert engine.name
