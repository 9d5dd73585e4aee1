"""What may go wrong with Tritons, on real ones: whoever can answer does, the server says who is wrong and why, and nobody cleans up."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from server.client import ClassifyTasksResult, Client
from server.engine import Question
from server.errors import (
    EndpointError,
    GenerationRefusedError,
    NoEndpointError,
    SegmentLoadError,
    ServerError,
)
from server.generation import Generation
from server.repository import Repository
from server.triton.engine import TritonEngine
from server.triton.fleet import EndpointReport, State
from server.triton.process import TritonProcess
from tests.support.background import Background
from tests.support.repository import DIGITS, GREEK, HEBREW, RepositoryBuilder, TaskPlan, answer, random_images
from tests.support.serving import serving
from tests.support.triton import Caller, engine_on, environment, segment_process, triton_settings, wait_until

IMAGES = random_images(3, 8, seed=11)
PLANS = {"digits": DIGITS, "greek": GREEK}
TASKS = ("digits", "greek")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def tritons(folder: pathlib.Path) -> Iterator[list[TritonProcess]]:
    with contextlib.ExitStack() as stack:
        logs = (folder.with_name(f"{folder.name}-{index}.log") for index in range(2))
        started = [stack.enter_context(TritonProcess(environment(), folder, log=log)) for log in logs]
        yield started
        for triton in started:
            # Ending well would take it seconds, which prove nothing here.
            os.kill(triton.pid, signal.SIGKILL)


@pytest.fixture
def pair(tritons: list[TritonProcess]) -> list[TritonProcess]:
    for triton in tritons:
        if not triton.is_running:
            triton.start()
    return tritons


@pytest.fixture
def builder(folder: pathlib.Path) -> RepositoryBuilder:
    return RepositoryBuilder(folder)


def publish(builder: RepositoryBuilder, **plans: TaskPlan) -> Generation:
    return Repository(builder.root).read(builder.publish(plans))


def with_head(name: str) -> TaskPlan:
    """Returns a plan whose head nobody has loaded yet."""
    return TaskPlan((*DIGITS.route[:3], f"head:{name}:3"), ("a", "b", "c"))


def check(engine: TritonEngine, generation: Generation, plans: dict[str, TaskPlan] = PLANS) -> None:
    logits = engine.answer(Question(generation, IMAGES, tuple(plans))).result(20)
    for name, plan in plans.items():
        np.testing.assert_allclose(logits[name], answer(plan, IMAGES), atol=1e-4, rtol=0)


def report(engine: TritonEngine, triton: TritonProcess) -> EndpointReport:
    (found,) = (one for one in engine.endpoints() if one.address == triton.addresses.grpc)
    return found


def is_sound(engine: TritonEngine, triton: TritonProcess) -> bool:
    found = report(engine, triton)
    return found.state is State.SERVING and not found.reason


def wait_until_sound(engine: TritonEngine, triton: TritonProcess) -> None:
    """Waits until a Triton answers everything again. It is started if it ended, as who runs it would: at times it does so by itself."""

    def is_back() -> bool:
        if not triton.is_running:
            triton.start()
        return is_sound(engine, triton)

    wait_until(is_back)


class Asker(Background):
    """Asks all the time, and keeps what failed."""

    def __init__(self, engine: TritonEngine, generation: Generation) -> None:
        self._engine = engine
        self._generation = generation
        self._expected = {name: answer(plan, IMAGES) for name, plan in PLANS.items()}
        super().__init__([functools.partial(self._run, tasks) for tasks in (TASKS, ("digits",), ("greek",))])
        self.num_answers = 0
        self.errors: list[BaseException] = []

    def _run(self, tasks: tuple[str, ...], stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                logits = self._engine.answer(Question(self._generation, IMAGES, tasks, time.monotonic() + 20)).result(30)
                for name in tasks:
                    np.testing.assert_allclose(logits[name], self._expected[name], atol=1e-4, rtol=0)
                self.num_answers += 1
            except (ServerError, AssertionError, TimeoutError) as error:
                self.errors.append(error)
            time.sleep(0.03)


def test_a_triton_killed_while_it_infers_costs_no_answer(builder: RepositoryBuilder, pair: list[TritonProcess]) -> None:
    generation = publish(builder, **PLANS)
    with engine_on(builder, *pair) as engine:
        engine.load(generation)
        with Asker(engine, generation) as asker:
            for killed, other in (pair, reversed(pair)):
                wait_until(lambda: asker.num_answers > 20)
                os.kill(killed.pid, signal.SIGKILL)
                wait_until(lambda: report(engine, killed).state is State.DOWN)  # noqa: B023
                before = asker.num_answers
                wait_until(lambda: asker.num_answers > before + 20)  # noqa: B023
                assert is_sound(engine, other)
                # Back with nothing loaded, it is brought to the generation before it is asked: else the next kill would cost answers.
                killed.start()
                wait_until_sound(engine, killed)
                assert report(engine, killed).generations == (generation.number,)
        assert asker.errors == []


def test_where_the_only_triton_is_killed_the_error_says_so_until_it_is_back(
    builder: RepositoryBuilder, pair: list[TritonProcess]
) -> None:
    generation = publish(builder, **PLANS)
    (only, _) = pair
    with engine_on(builder, only) as engine:
        engine.load(generation)
        check(engine, generation)
        before = engine.statistics()
        os.kill(only.pid, signal.SIGKILL)
        error = engine.answer(Question(generation, IMAGES, TASKS)).exception(20)
        assert isinstance(error, NoEndpointError)
        assert f"without a Triton that computes digits, greek ({only.addresses.grpc} is down: " in str(error)
        only.start()
        wait_until_sound(engine, only)
        check(engine, generation)
        after = engine.statistics()
        # Counters go on where they were, though Triton's own began again.
        assert [(one.name, one.rows_computed + 3) for one in before if one.name in generation.tasks["digits"].route[:3]] == [
            (one.name, one.rows_computed) for one in after if one.name in generation.tasks["digits"].route[:3]
        ]


@pytest.mark.parametrize("has_other", [True, False])
def test_a_triton_killed_while_it_loads(builder: RepositoryBuilder, pair: list[TritonProcess], has_other: bool) -> None:
    first = publish(builder, **PLANS)
    second = publish(builder, **PLANS, new=with_head(f"killed-{has_other}"))
    used = pair if has_other else pair[:1]
    with engine_on(builder, *used) as engine:
        engine.load(first)
        outcome: list[BaseException | None] = []

        def load() -> None:
            try:
                engine.load(second)
            except ServerError as error:
                outcome.append(error)
            else:
                outcome.append(None)

        loader = threading.Thread(target=load)
        loader.start()
        new = second.tasks["new"].route[-1]
        wait_until(lambda: segment_process(pair[0], new))
        os.kill(pair[0].pid, signal.SIGKILL)
        loader.join()
        if has_other:
            # The other one holds it, so that it answers; this one is brought to both.
            assert outcome == [None]
            check(engine, second)
        else:
            assert isinstance(outcome[0], NoEndpointError)
            assert pair[0].addresses.grpc in str(outcome[0])
        pair[0].start()
        wait_until_sound(engine, pair[0])
        check(engine, first)
        engine.load(second)
        check(engine, second)
        assert report(engine, pair[0]).generations == (first.number, second.number)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_segment_whose_process_is_lost_is_loaded_again(
    builder: RepositoryBuilder, pair: list[TritonProcess], number: signal.Signals
) -> None:
    generation = publish(builder, **PLANS)
    # Longer than the second in which Triton itself notices a dead process: else all of it seems to be silent.
    with engine_on(builder, *pair, probe_timeout_seconds=5.0) as engine:
        engine.load(generation)
        with Asker(engine, generation) as asker:
            wait_until(lambda: asker.num_answers > 20)
            os.kill(segment_process(pair[0], generation.tasks["digits"].route[1]), number)
            wait_until(lambda: report(engine, pair[0]).reason)
            assert report(engine, pair[0]).state is State.SERVING
            assert generation.tasks["digits"].route[1] in report(engine, pair[0]).reason
            wait_until_sound(engine, pair[0])
        assert asker.errors == []


def test_what_needs_no_dead_segment_goes_on(builder: RepositoryBuilder, pair: list[TritonProcess]) -> None:
    generation = publish(builder, **PLANS)
    head = generation.tasks["digits"].route[-1]
    (only, _) = pair
    # Not mended before it was asked: a probe finds it no sooner than a question.
    with engine_on(builder, only, probe_interval_seconds=5.0) as engine:
        engine.load(generation)
        os.kill(segment_process(only, head), signal.SIGKILL)
        error = engine.answer(Question(generation, IMAGES, ("digits",))).exception(20)
        assert isinstance(error, NoEndpointError)
        assert f"{only.addresses.grpc} is serving: {head}: " in str(error)
        check(engine, generation, {"greek": GREEK})
        wait_until_sound(engine, only)
        check(engine, generation)


def test_an_idle_dead_segment_is_noticed(builder: RepositoryBuilder, pair: list[TritonProcess]) -> None:
    generation = publish(builder, **PLANS)
    with engine_on(builder, pair[0]) as engine:
        engine.load(generation)
        pid = segment_process(pair[0], generation.tasks["digits"].route[-1])
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: report(engine, pair[0]).reason)
        wait_until_sound(engine, pair[0])
        check(engine, generation)


def test_several_faults_at_once_are_mended(builder: RepositoryBuilder, pair: list[TritonProcess]) -> None:
    generation = publish(builder, **PLANS)
    with engine_on(builder, *pair) as engine:
        engine.load(generation)
        with Asker(engine, generation) as asker:
            wait_until(lambda: asker.num_answers > 20)
            # Neither ensemble can answer before both segments do.
            for segment in (generation.tasks["digits"].route[1], generation.tasks["greek"].route[-1]):
                os.kill(segment_process(pair[0], segment), signal.SIGKILL)
            with Caller(pair[0].addresses.grpc) as caller:
                caller.unload(generation.tasks["greek"].ensemble, generation.ensembles[8])
            wait_until(lambda: report(engine, pair[0]).reason)
            wait_until_sound(engine, pair[0])
        assert asker.errors == []


def test_a_triton_that_hangs_is_given_up(builder: RepositoryBuilder, pair: list[TritonProcess]) -> None:
    generation = publish(builder, **PLANS)
    with engine_on(builder, *pair, probe_timeout_seconds=3.0) as engine:
        engine.load(generation)
        with Asker(engine, generation) as asker:
            wait_until(lambda: asker.num_answers > 20)
            os.kill(pair[0].pid, signal.SIGSTOP)
            try:
                wait_until(lambda: report(engine, pair[0]).state is State.DOWN)
                before = asker.num_answers
                wait_until(lambda: asker.num_answers > before + 20)
            finally:
                os.kill(pair[0].pid, signal.SIGCONT)
            wait_until_sound(engine, pair[0])
        assert asker.errors == []


def test_a_triton_with_another_repository_is_told_of_and_not_asked(
    builder: RepositoryBuilder, pair: list[TritonProcess], tmp_path: pathlib.Path
) -> None:
    generation = publish(builder, **PLANS)
    with TritonProcess(environment(), tmp_path, log=tmp_path.with_suffix(".log")) as other:
        with engine_on(builder, pair[0], other) as engine:
            engine.load(generation)
            check(engine, generation)
            assert is_sound(engine, pair[0])
            assert report(engine, other).state is State.DOWN
            assert "models missing in its model repository" in report(engine, other).reason
        with (
            engine_on(builder, other) as engine,
            pytest.raises(EndpointError, match=f"Triton at {other.addresses.grpc}: found .* missing"),
        ):
            engine.load(generation)


def _break_segment(builder: RepositoryBuilder, generation: Generation) -> str:
    segment = generation.segments[generation.tasks["new"].route[-1]]
    segment.model.write_bytes(b"no model")
    return segment.name


def _remove_model(builder: RepositoryBuilder, generation: Generation) -> str:
    segment = generation.segments[generation.tasks["new"].route[-1]]
    segment.model.unlink()
    return segment.name


def _break_ensemble(builder: RepositoryBuilder, generation: Generation) -> str:
    ensemble = generation.tasks["new"].ensemble
    (builder.root / ensemble / "labels.txt").unlink()
    return ensemble


def _break_golden(builder: RepositoryBuilder, generation: Generation) -> str:
    generation.tasks["new"].golden.logits.setflags(write=True)
    generation.tasks["new"].golden.logits[0, 0] += 1
    return "golden answer at"


@pytest.mark.parametrize("spoil", [_break_segment, _remove_model, _break_ensemble, _break_golden])
def test_what_is_broken_is_refused_and_the_old_generation_goes_on(
    builder: RepositoryBuilder, pair: list[TritonProcess], spoil: Callable[[RepositoryBuilder, Generation], str]
) -> None:
    first = publish(builder, **PLANS)
    second = publish(builder, **PLANS, new=with_head(spoil.__name__.strip("_")))
    words = spoil(builder, second)
    with engine_on(builder, *pair) as engine:
        engine.load(first)
        with Asker(engine, first) as asker:
            with pytest.raises((SegmentLoadError, GenerationRefusedError), match=words) as caught:
                engine.load(second)
            wait_until(lambda: asker.num_answers > 10)
        assert any(triton.addresses.grpc in str(caught.value) for triton in pair)
        assert asker.errors == []
        assert [one.generations for one in engine.endpoints()] == [(first.number,)] * 2
        assert all(is_sound(engine, triton) for triton in pair)
        # The next good one is loaded as if nothing had been.
        third = publish(builder, **PLANS, hebrew=HEBREW)
        engine.load(third)
        check(engine, third, PLANS | {"hebrew": HEBREW})


def test_what_one_triton_refuses_none_answers(
    builder: RepositoryBuilder, pair: list[TritonProcess], tmp_path: pathlib.Path
) -> None:
    first = publish(builder, **PLANS)
    shutil.copytree(builder.root, tmp_path / "copy")
    with TritonProcess(environment(), tmp_path / "copy", log=tmp_path / "log") as late:
        with engine_on(builder, pair[0], late) as engine:
            engine.load(first)
            second = publish(builder, **PLANS, new=with_head("late"))
            with pytest.raises(EndpointError, match=f"Triton at {late.addresses.grpc}: found .* models missing"):
                engine.load(second)
            assert [one.generations for one in engine.endpoints()] == [(first.number,)] * 2
            with Asker(engine, first) as asker:
                wait_until(lambda: asker.num_answers > 10)
                assert is_sound(engine, pair[0])
                assert is_sound(engine, late)
                shutil.copytree(builder.root, tmp_path / "copy", dirs_exist_ok=True)
                engine.load(second)
            assert asker.errors == []
            assert [one.generations for one in engine.endpoints()] == [(first.number, second.number)] * 2
            check(engine, second)
        os.kill(late.pid, signal.SIGKILL)


def ready(triton: TritonProcess) -> set[str]:
    with Caller(triton.addresses.grpc) as caller:
        return caller.ready()


def segments_at(triton: TritonProcess) -> set[str]:
    return {name for name in ready(triton) if name.startswith("seg-")}


def test_two_servers_on_one_triton_leave_each_others_generations(builder: RepositoryBuilder, pair: list[TritonProcess]) -> None:
    only = pair[0]
    first = publish(builder, **PLANS)
    with (
        engine_on(builder, only, unload_after_seconds=1.5) as one,
        engine_on(builder, only, unload_after_seconds=1.5) as other,
    ):
        one.load(first)
        other.load(first)
        second = publish(builder, digits=DIGITS, hebrew=HEBREW)
        one.load(second)
        one.unload(first)
        # The other one is slow to follow: what it holds and nobody asks stays, because it keeps asking.
        time.sleep(4.0)
        check(other, first)
        assert ready(only) >= {first.tasks["greek"].ensemble, first.ensembles[8], *first.segments}
        other.load(second)
        other.unload(first)
        wanted = {*second.segments, *(task.ensemble for task in second.tasks.values()), *second.ensembles.values()}
        wait_until(lambda: ready(only) == wanted)
        check(one, second, {"digits": DIGITS, "hebrew": HEBREW})
        check(other, second, {"digits": DIGITS, "hebrew": HEBREW})


def test_what_a_killed_server_left_is_unloaded_by_the_next(builder: RepositoryBuilder, pair: list[TritonProcess]) -> None:
    only = pair[0]
    first = publish(builder, **PLANS)
    with engine_on(builder, only) as engine:
        # Closing unloads nothing, and neither does being killed.
        engine.load(first)
    second = publish(builder, hebrew=HEBREW)
    assert ready(only) >= set(first.segments)
    with engine_on(builder, only, unload_after_seconds=0.0) as engine:
        engine.load(second)
        wait_until(lambda: ready(only) == {*second.segments, second.tasks["hebrew"].ensemble, second.ensembles[8]})
        check(engine, second, {"hebrew": HEBREW})


def test_what_was_collected_from_the_repository_is_unloaded_all_the_same(
    builder: RepositoryBuilder, pair: list[TritonProcess]
) -> None:
    only = pair[0]
    first = publish(builder, **PLANS, collected=with_head("collected"))
    with engine_on(builder, only, unload_after_seconds=0.5) as engine:
        engine.load(first)
        second = publish(builder, **PLANS)
        engine.load(second)
        gone = {first.tasks["collected"].ensemble, first.ensembles[8], first.tasks["collected"].route[-1]}
        for name in (*gone, "collected"):
            shutil.rmtree(builder.root / name)
        (builder.root / f"generation-{first.number}.json").unlink()
        # Whoever is slow to follow is answered all the same.
        logits = engine.answer(Question(first, IMAGES, ("collected",))).result(20)["collected"]
        assert logits.shape == (len(IMAGES), 3)
        assert ready(only) >= gone
        engine.unload(first)
        wait_until(lambda: ready(only).isdisjoint(gone))
        check(engine, second)


def test_reloads_on_two_tritons_fail_and_tear_no_answer(builder: RepositoryBuilder, pair: list[TritonProcess]) -> None:
    moved = {"digits": DIGITS, "greek": TaskPlan((*GREEK.route[:-1], "head:moved:3"), ("a", "b", "c"))}
    systems = (PLANS, moved)
    expected = [{name: answer(plan, IMAGES[:1])[0] for name, plan in system.items()} for system in systems]
    first = publish(builder, **PLANS)
    seen: list[ClassifyTasksResult] = []
    errors: list[BaseException] = []

    def ask(stop: threading.Event) -> None:
        with Client(server.address) as client:
            while not stop.wait(0.03):
                try:
                    seen.append(client.classify_tasks(IMAGES[0], list(TASKS), include_logits=True))
                except Exception as error:
                    errors.append(error)

    told = triton_settings(builder.root, *pair, unload_after_seconds=0.2)
    with (
        serving(builder.root, engine=told.engine, triton=told.triton) as server,
        Background([ask] * 4),
    ):
        wait_until(lambda: errors or seen)
        for index in range(1, 6):
            last = publish(builder, **systems[index % 2])
            wanted = {*last.segments, *(task.ensemble for task in last.tasks.values())}
            wait_until(lambda: errors or (seen and seen[-1].generation == last.number))  # noqa: B023  # called at once
            # Nobody is answered by it before both have all of it.
            assert errors or all(ready(triton) >= wanted for triton in pair)
            # What only the other needs goes, so that it has to be loaded again.
            wait_until(lambda: errors or all(segments_at(triton) == set(last.segments) for triton in pair))  # noqa: B023  # at once
    assert errors == []
    assert {result.generation for result in seen} >= {first.number, last.number}
    for result in seen:
        for found in result.tasks:
            right = expected[(result.generation - first.number) % 2][found.task]
            np.testing.assert_allclose(found.classification.logits, right, atol=1e-4)
