from __future__ import annotations

import logging
import pathlib
import time

import pytest

from server.config import EngineSettings
from server.embedded import batch_sizes
from server.embedded.batch_sizes import choose_rows, measure, with_measured_batches
from server.embedded.engine import EmbeddedEngine
from server.embedded.sessions import SegmentSession
from server.engine import Question
from server.generation import Generation
from server.repository import Repository
from tests.support.repository import RepositoryBuilder, random_images
from tests.support.serving import ENGINE


@pytest.fixture
def generation(tmp_path: pathlib.Path) -> Generation:
    RepositoryBuilder(tmp_path).publish()
    return Repository(tmp_path).read()


@pytest.mark.parametrize(
    ("milliseconds", "rule", "rows"),
    [
        ({1: 40.0, 2: 36.0, 3: 36.5, 4: 38.0}, 3, 3),
        ({1: 40.0, 2: 34.0, 3: 36.0, 4: 38.0}, 3, 2),
        ({1: 10.0, 2: 8.0, 4: 6.0, 8: 5.0, 16: 4.98}, 2, 8),
        ({1: 1.0}, 16, 16),
        ({2: 1.0, 4: 0.9}, 1, 1),
        ({}, 16, 16),
    ],
)
def test_the_smallest_of_the_best_is_chosen_where_it_is_clearly_better_than_the_rule(
    milliseconds: dict[int, float], rule: int, rows: int
) -> None:
    assert choose_rows({count: took / 1000 for count, took in milliseconds.items()}, rule) == rows


class TickingTime:
    """Stands for the module `time`: the clock on the wall goes on by a millisecond whenever somebody looks."""

    thread_time = staticmethod(time.thread_time)

    def __init__(self) -> None:
        self.now_seconds = 1000.0

    def perf_counter(self) -> float:
        self.now_seconds += 0.001
        return self.now_seconds


def test_the_largest_segment_is_measured_within_its_time(generation: Generation, monkeypatch: pytest.MonkeyPatch) -> None:
    ticking = TickingTime()
    monkeypatch.setattr(batch_sizes, "time", ticking)
    monkeypatch.setattr(batch_sizes, "BUDGET_SECONDS", 0.2)
    started = ticking.now_seconds
    measured = measure(ENGINE, generation, {})
    assert 0.19 < ticking.now_seconds - started < 0.25
    assert measured is not None
    assert measured.segment == max(generation.segments.values(), key=lambda segment: segment.num_parameters).name
    assert set(measured.seconds) == {1, 2, 3, 4, 6, 8}, "up to the segment's own limit"
    assert all(seconds > 0 for seconds in measured.seconds.values())
    assert measure(ENGINE.model_copy(update={"device": "cuda"}), generation, {}) is None


def test_an_engine_that_measures_runs_batches_of_the_size_it_chose(
    generation: Generation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def chosen(settings: EngineSettings, known: Generation, sessions: dict[str, SegmentSession]) -> EngineSettings:
        asked.append(known)
        monkeypatch.setattr(batch_sizes, "_time", lambda *_: {1: 5.0, 2: 1.0, 3: 4.0})
        with caplog.at_level(logging.INFO):
            return with_measured_batches(settings, known, sessions)

    monkeypatch.setattr("server.embedded.engine.with_measured_batches", chosen)
    engine = EmbeddedEngine(ENGINE.model_copy(update={"measure_batches": True}))
    engine.load(generation)
    largest = max(generation.segments.values(), key=lambda segment: segment.num_parameters).name
    assert "batches of 2 rows" in caplog.text
    assert "1: 5e+03, 2: 1e+03, 3: 4e+03; the rule says" in caplog.text
    task = next(task for task in generation.tasks.values() if largest in task.route)
    engine.answer(Question(generation, random_images(8, task.image_size), (task.name,))).result()
    found = {segment.name: segment.executions for segment in engine.statistics()}
    assert found[largest] == 4
    engine.unload(generation)
    engine.load(generation)
    assert asked == [generation], "once"
    engine.close()
