"""Q3: the order in which searches are published again, and what counts as a change. test_characters runs the whole of it."""

from __future__ import annotations

import math

import numpy as np

from benchmarks.unchanged import closed_searches, difference
from evolve.closing import ActiveTask
from evolve.config import DefaultSettings, SearchSettings, TrainingSettings
from evolve.journal import compress_journal
from evolve.search import SearchPlan, run_rounds
from evolve.store import System
from tests.support.fake_trainer import FakeTrainer, QuietObserver, tiny_root


def test_searches_come_in_the_order_in_which_they_were_closed(tmp_path):
    system = System.create(tmp_path / "system", tiny_root(), 32)
    plan = SearchPlan(
        0,
        DefaultSettings(),
        SearchSettings(rounds=2, children_per_task=8, generation_size=4),
        TrainingSettings(batch_size=8),
    )
    observer = QuietObserver()
    tasks = [(ActiveTask(name, ("a", "b"), 20, f"f-{name}"), FakeTrainer) for name in ("two", "one", "three")]
    run_rounds(system, tasks, plan, observer)
    # As `munet-evolve gc` does it.
    compress_journal(system.journal_file("one", 0))
    replayed = list(closed_searches(system))
    assert [record.name for record in replayed] == ["two", "one", "three"] * 2
    assert [record.path_id for record in replayed] == observer.closed
    assert [record.order for record in replayed] == [1, 2, 3, 4, 5, 6]
    last = {record.name: record for record in replayed}
    for name, record in system.tasks().items():
        assert (last[name].path_id, last[name].labels, last[name].examples) == (record.path_id, record.labels, record.examples)


def test_a_difference_is_seen_however_small_and_what_cannot_be_compared_is_infinite():
    logits = np.array([[1.0, 2.0]], dtype=np.float32)
    assert difference(logits, logits.copy()) == 0
    assert difference(logits, np.nextafter(logits, np.float32(9))) > 0
    assert difference(logits, logits * np.nan) == math.inf
    assert difference(logits, logits[:, :1]) == math.inf
