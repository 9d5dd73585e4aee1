"""The embedded engine within a limit of memory; that it keeps an engine's promises there is in tests/contract."""

from __future__ import annotations

import pathlib
import threading
import types
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from server.embedded.engine import EmbeddedEngine
from server.embedded.limited_memory import LimitedMemory
from server.embedded.memory import SESSION_BYTES
from server.embedded.residency import RETRY_SECONDS
from server.embedded.sessions import SegmentSession
from server.engine import Question
from server.errors import DeadlineError, GenerationRefusedError, SegmentUnavailableError
from server.generation import Generation
from server.reload import rehearse
from server.repository import Repository
from tests.support.repository import TASKS, RepositoryBuilder, TaskPlan, random_images
from tests.support.serving import ENGINE, ManualClock, wait_until

TIGHT = 4 * (SESSION_BYTES + 8192)
"""Room for the four segments of the longest route."""

SMALL = ("digits", "greek", "hebrew", "short")


@pytest.fixture
def generation(tmp_path: pathlib.Path) -> Generation:
    RepositoryBuilder(tmp_path).publish()
    return Repository(tmp_path).read()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def engine(generation: Generation, clock: ManualClock) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(ENGINE.model_copy(update={"memory_limit_bytes": TIGHT}), clock)
    engine.load(generation)
    yield engine
    engine.close()


def ask(engine: EmbeddedEngine, generation: Generation, task: str, deadline_seconds: float | None = None) -> Any:
    size = generation.tasks[task].image_size
    return engine.answer(Question(generation, random_images(3, size), (task,), deadline_seconds))


def head(generation: Generation, task: str) -> str:
    return generation.tasks[task].route[-1]


def num_aside(engine: EmbeddedEngine) -> int:
    """Counts the questions of which rows wait for a segment."""
    assert isinstance(engine._memory, LimitedMemory)
    with engine._lock:
        return len({number for of_segment in engine._memory._aside.values() for number in of_segment})


class Gate:
    """Holds loads of some segments until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
        self.opened = threading.Event()
        self.reached = threading.Event()
        make = SegmentSession.__init__

        def hold(session: SegmentSession, segment: Any, *arguments: Any, **options: Any) -> None:
            if segment.name in names:
                self.reached.set()
                assert self.opened.wait(20)
            make(session, segment, *arguments, **options)

        monkeypatch.setattr(SegmentSession, "__init__", hold)


def make_absent(engine: EmbeddedEngine, generation: Generation, task: str) -> None:
    """Has a task's head go out of memory, by asking others."""
    others = [name for name in generation.tasks if name != task]
    for name in others * 10:
        if head(generation, task) not in engine._memory.sessions:
            return
        assert ask(engine, generation, name).exception(timeout=20) is None
    pytest.fail(f"{task} stays")


def test_answers_are_those_without_a_limit(engine: EmbeddedEngine, generation: Generation) -> None:
    unlimited = EmbeddedEngine(ENGINE)
    unlimited.load(generation)
    for task in (*generation.tasks, *generation.tasks):
        assert np.array_equal(ask(engine, generation, task).result()[task], ask(unlimited, generation, task).result()[task])
    memory, all_of_it = engine.memory(), unlimited.memory()
    unlimited.close()
    assert memory.resident_bytes <= TIGHT == memory.limit_bytes
    assert memory.num_resident <= 4 < memory.num_segments == all_of_it.num_segments == all_of_it.num_resident
    assert memory.num_loads > 4
    assert memory.num_evictions > 4
    assert memory.num_failures == all_of_it.num_loads == 0
    assert (all_of_it.limit_bytes, all_of_it.resident_bytes > TIGHT) == (None, True)


def test_all_golden_answers_can_be_rehearsed(engine: EmbeddedEngine, generation: Generation) -> None:
    assert rehearse(engine, generation, list(generation.tasks.values())) == []


def test_a_question_may_need_more_than_there_is_room_for(engine: EmbeddedEngine, generation: Generation) -> None:
    futures = [engine.answer(Question(generation, random_images(20, 8, seed=index), SMALL)) for index in range(10)]
    assert all(set(future.result(timeout=20)) == set(SMALL) for future in futures)


def test_what_rows_of_several_histories_run_on_makes_room_for_the_next_history(tmp_path: pathlib.Path) -> None:
    plans = {
        f"{stem}-{block}": TaskPlan((f"stem:8:{stem}", f"block:{block}", f"head:{stem}-{block}:3"), ("one", "two", "three"))
        for stem in "ab"
        for block in ("x", "y", "z")
    }
    RepositoryBuilder(tmp_path).publish(plans)
    generation = Repository(tmp_path).read()
    engine = EmbeddedEngine(ENGINE.model_copy(update={"memory_limit_bytes": TIGHT // 4 * 3}))
    engine.load(generation)
    answer = engine.answer(Question(generation, random_images(1, 8), tuple(plans))).result(timeout=20)
    assert set(answer) == set(plans)
    engine.close()


def test_a_limit_below_the_largest_route_is_refused(generation: Generation) -> None:
    engine = EmbeddedEngine(ENGINE.model_copy(update={"memory_limit_bytes": TIGHT // 2}))
    words = rf"memory_limit_bytes: found {TIGHT // 2} bytes, expected at least \d+, .* task 'greek'; serve with a larger --memory"
    with pytest.raises(GenerationRefusedError, match=words):
        engine.load(generation)
    assert engine.memory().num_segments == 0
    engine.close()


def test_others_do_not_wait_for_a_load(generation: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where there is room for one route alone, a head that comes is waited for: it would else push out what is shared.
    engine = EmbeddedEngine(ENGINE.model_copy(update={"memory_limit_bytes": TIGHT + SESSION_BYTES + 8192}))
    engine.load(generation)
    make_absent(engine, generation, "hebrew")
    gate = Gate(monkeypatch, head(generation, "hebrew"))
    slow = ask(engine, generation, "hebrew")
    assert gate.reached.wait(20)
    # One worker, which would be the one that waits.
    assert len(ask(engine, generation, "short").result(timeout=20)["short"]) == 3
    assert not slow.done()
    gate.opened.set()
    assert len(slow.result(timeout=20)["hebrew"]) == 3
    engine.close()


def test_deadlines_hold_while_a_segment_is_loaded(
    engine: EmbeddedEngine, generation: Generation, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_absent(engine, generation, "hebrew")
    gate = Gate(monkeypatch, head(generation, "hebrew"))
    patient = ask(engine, generation, "hebrew")
    hurried = ask(engine, generation, "hebrew", deadline_seconds=clock.now_seconds + 0.1)
    assert gate.reached.wait(20)
    # Both, but maybe not of the same segment: the head that comes may take the place of one that the later question has yet to run.
    wait_until(lambda: num_aside(engine) == 2)
    clock.now_seconds += 1
    assert isinstance(hurried.exception(timeout=20), DeadlineError)
    assert not patient.done()
    gate.opened.set()
    assert patient.exception(timeout=20) is None


def test_a_deadline_in_ten_thousand_years_ends_no_worker(
    engine: EmbeddedEngine, generation: Generation, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a stranger may set it: gRPC takes eight digits of hours."""
    make_absent(engine, generation, "hebrew")
    gate = Gate(monkeypatch, head(generation, "hebrew"))
    patient = ask(engine, generation, "hebrew", deadline_seconds=clock.now_seconds + 99_999_999 * 3600)
    wait_until(lambda: num_aside(engine) == 1)
    seconds = engine._memory.seconds_to_deadline(clock.now_seconds)
    assert seconds is not None
    assert seconds < threading.TIMEOUT_MAX
    gate.opened.set()
    assert patient.exception(timeout=20) is None
    assert all(worker.is_alive() for worker in engine._workers)


def test_deadlines_of_what_is_over_are_forgotten(clock: ManualClock) -> None:
    lock = threading.Lock()
    memory = LimitedMemory("cpu", lock, 1, clock, on_ready=lambda rows: None, on_failure=lambda numbers, segment: [])
    tree = types.SimpleNamespace(branches=[types.SimpleNamespace(segment="seg")])
    with lock:
        for number in range(1000):
            question = types.SimpleNamespace(deadline_seconds=clock.now_seconds + 1e6)
            opened: Any = types.SimpleNamespace(number=number, question=question, tree=tree)
            rows: Any = types.SimpleNamespace(lane=tree.branches[0], payload=types.SimpleNamespace(open_question=opened))
            assert memory.put_aside(rows)
            if number:
                memory.end(opened)
        assert memory.expired(clock.now_seconds) == []
        assert len(memory._deadlines) < 100
        assert (clock.now_seconds + 1e6, 0) in memory._deadlines
        memory.close()
    memory.join()


def test_cancelling_while_a_segment_is_loaded_keeps_nothing(
    engine: EmbeddedEngine, generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_absent(engine, generation, "hebrew")
    gate = Gate(monkeypatch, *generation.tasks["hebrew"].route)
    images = random_images(3, 8)
    alive = weakref.ref(images)
    cancelled = engine.answer(Question(generation, images, ("hebrew",)))
    other = ask(engine, generation, "hebrew")
    assert gate.reached.wait(20)
    del images
    assert cancelled.cancel()
    del cancelled
    wait_until(lambda: alive() is None)
    gate.opened.set()
    assert other.exception(timeout=20) is None


@pytest.mark.parametrize("fault", ["gone", "altered"])
def test_a_segment_that_cannot_be_loaded_fails_only_those_who_need_it_and_is_tried_again(
    engine: EmbeddedEngine, generation: Generation, clock: ManualClock, tmp_path: pathlib.Path, fault: str
) -> None:
    make_absent(engine, generation, "hebrew")
    name = head(generation, "hebrew")
    file = generation.segments[name].model
    content = file.read_bytes()
    if fault == "gone":
        file.unlink()
    else:
        RepositoryBuilder(tmp_path).alter(f"{name}/1/model.onnx")
    for _ in range(2):
        error = ask(engine, generation, "hebrew").exception(timeout=20)
        assert isinstance(error, SegmentUnavailableError)
        assert error.segment == name
    assert engine.memory().num_failures == 1, "not tried for every question"
    assert ask(engine, generation, "short").exception(timeout=20) is None
    file.write_bytes(content)
    assert isinstance(ask(engine, generation, "hebrew").exception(timeout=20), SegmentUnavailableError)
    clock.now_seconds += RETRY_SECONDS
    assert ask(engine, generation, "hebrew").exception(timeout=20) is None


def test_a_generation_that_is_unloaded_while_a_segment_comes_leaves_nothing(
    engine: EmbeddedEngine, generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_absent(engine, generation, "hebrew")
    gate = Gate(monkeypatch, head(generation, "hebrew"))
    future = ask(engine, generation, "hebrew")
    assert gate.reached.wait(20)
    engine.unload(generation)
    future.cancel()
    assert (engine.memory().num_segments, engine.memory().resident_bytes) == (0, 0)
    gate.opened.set()
    engine.load(generation)
    assert ask(engine, generation, "hebrew").exception(timeout=20) is None
    assert engine.memory().num_resident <= 4


def test_what_is_shared_stays_so_beside_a_canary_that_does_not_share_it(
    engine: EmbeddedEngine, generation: Generation, tmp_path: pathlib.Path
) -> None:
    """Or heads would push it out from now on, also when the canary is gone."""
    RepositoryBuilder(tmp_path).publish({"digits": TASKS["digits"]})
    canary = Repository(tmp_path).read()
    trunk = canary.tasks["digits"].route[1]
    segments = engine._memory._residency._segments
    alone = segments[trunk].num_tasks
    assert alone > 1
    engine.load(canary)
    assert segments[trunk].num_tasks == alone
    engine.unload(generation)
    assert segments[trunk].num_tasks == 1
    engine.load(generation)
    engine.unload(canary)
    assert segments[trunk].num_tasks == alone


def test_closing_does_not_hang_on_what_waits_for_a_load(
    engine: EmbeddedEngine, generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_absent(engine, generation, "hebrew")
    gate = Gate(monkeypatch, head(generation, "hebrew"))
    future = ask(engine, generation, "hebrew")
    assert gate.reached.wait(20)
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert future.exception(timeout=20) is not None
    gate.opened.set()
    closing.join(timeout=20)
    assert not closing.is_alive()


def test_tasks_in_the_default_system_do_not_fit_all() -> None:
    """Otherwise nothing above would ever be loaded on demand."""
    assert len({layer for plan in TASKS.values() for layer in plan.route}) > 4
