"""Scalars for TensorBoard: what is written, and what is shown of it after a search went on."""

from __future__ import annotations

import pathlib
import struct

import pytest
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from evolve.closing import ActiveTask
from evolve.config import DefaultSettings, SearchSettings, TrainingSettings
from evolve.errors import SystemFolderError
from evolve.hyperparameters import Hyperparameters
from evolve.journal import child_records, read_journal
from evolve.observers import Observers
from evolve.search import SearchPlan, run_rounds
from evolve.store import System
from evolve.tensorboard import TensorBoardObserver, numbers
from tests.support.fake_trainer import FakeTrainer, QuietObserver, tiny_root


class _Killed(Exception):
    """Stands for the end of a process."""


def _read(file: pathlib.Path) -> list[Event]:
    """Returns the events of a file: records of length, checksum, content, checksum."""
    data, events, start = file.read_bytes(), [], 0
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        events.append(Event.FromString(data[start + 12 : start + 12 + length]))
        start += 12 + length + 4
    return events


def _shown(run: pathlib.Path) -> dict[str, dict[int, float]]:
    """Returns what TensorBoard shows of a run by name and step: at a new start, it forgets all from that step on.

    A point that would be shown twice is an error.
    """
    points: dict[str, dict[int, float]] = {}
    for file in sorted(run.iterdir()):
        for event in _read(file):
            if event.session_log.status == SessionLog.START:
                points = {name: {s: v for s, v in values.items() if s < event.step} for name, values in points.items()}
            for value in event.summary.value:
                assert event.step not in points.setdefault(value.tag, {}), f"{value.tag} twice at {event.step}"
                points[value.tag][event.step] = value.simple_value
    return points


def _run(system: System, observer, trainer=None, rounds: int = 1) -> None:
    plan = SearchPlan(
        0,
        DefaultSettings(),
        SearchSettings(rounds=rounds, children_per_task=8, generation_size=4, auto_tune=True),
        TrainingSettings(batch_size=8, batches_per_interval=5),
    )
    task = ActiveTask("one", ("a", "b"), 100, "f")
    run_rounds(system, [(task, lambda: trainer or FakeTrainer())], plan, observer)


@pytest.fixture
def system(tmp_path) -> System:
    return System.create(tmp_path / "system", tiny_root(), 32)


def _check(system: System, folder: pathlib.Path, round_number: int = 0) -> None:
    """Checks that each child is shown once, with what the journal says of it."""
    shown = _shown(folder / "one" / f"round-{round_number + 1}")
    rows = list(child_records(read_journal(system.journal_file("one", round_number))))
    steps = list(range(1, 9))
    assert list(shown["child/quality"]) == steps
    assert list(shown["child/quality"].values()) == pytest.approx([row["quality"] for _, row in rows])
    assert list(shown["child/accounted_parameters"].values()) == pytest.approx([row["accounted_parameters"] for _, row in rows])
    assert list(shown["child/survived"].values()) == [float(row["survived"]) for _, row in rows]
    assert list(shown["child/seconds"].values()) == [3.0] * 8
    for name in ("score", "quality"):
        # Of those that survived: what was dropped is never current.
        best = [max((row[name] for _, row in rows[:step] if row["survived"]), default=0.0) for step in steps]
        assert list(shown[f"best/{name}"].values()) == pytest.approx(best)
    rates = [plan["hyperparameters"]["learning_rate"] for plan, _ in rows]
    assert list(shown["hyperparameters/learning_rate"].values()) == pytest.approx(rates)
    assert shown["current/test_accuracy"] == {8: 0.5}
    assert {name for name in shown if name.startswith("hyperparameters/")} == {
        f"hyperparameters/{name}" for name in Hyperparameters(num_blocks=1).to_dict()
    }


def test_each_child_is_a_point_and_each_round_a_run(system, tmp_path):
    _run(system, TensorBoardObserver(tmp_path / "scalars"), rounds=2)
    assert sorted(run.name for run in (tmp_path / "scalars" / "one").iterdir()) == ["round-1", "round-2"]
    for round_number in range(2):
        _check(system, tmp_path / "scalars", round_number)


@pytest.mark.parametrize("num_children", [0, 1, 6])
def test_a_search_that_goes_on_shows_no_point_twice(system, tmp_path, monkeypatch, num_children):
    observer = TensorBoardObserver(tmp_path / "scalars")
    finished = observer.child_finished

    def die(plan, record):
        finished(plan, record)
        if observer._step > num_children:
            raise _Killed

    monkeypatch.setattr(observer, "child_finished", die)
    # Files of one second have one name: here they are told apart, as those of a search that ran for longer.
    monkeypatch.setattr("tensorboardX.event_file_writer.time.time", iter(range(1_000_000_000, 1_000_001_000)).__next__)
    with pytest.raises(_Killed):
        _run(system, observer)
    observer.stop()
    later = TensorBoardObserver(tmp_path / "scalars")
    _run(system, later)
    run = tmp_path / "scalars" / "one" / "round-1"
    assert len(list(run.iterdir())) == 2
    _check(system, tmp_path / "scalars")


def test_words_and_switches_are_numbers():
    found = numbers(Hyperparameters(num_blocks=2, schedule="restarts", momentum=None, nesterov=True, flip=False).to_dict())
    assert (found["schedule"], found["momentum"], found["nesterov"], found["flip"], found["num_blocks"]) == (
        2.0,
        0.0,
        1.0,
        0.0,
        2.0,
    )


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "scalars").write_text("a file")
    with pytest.raises(SystemFolderError, match="could not write in .*scalars"):
        TensorBoardObserver(tmp_path / "scalars" / "below")


def test_a_full_disk_costs_the_scalars_and_not_the_search(system, tmp_path, monkeypatch, capsys):
    written = []

    def full(self, event):
        # The first, which says what sort of file it is, still has room.
        written.append(event)
        if len(written) > 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(EventsWriter, "write_event", full)
    _run(system, TensorBoardObserver(tmp_path / "scalars"))
    assert system.tasks()["one"].rounds == 1
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1
    assert "this round goes on without TensorBoard" in said


def test_several_observers_are_told_the_same(system, tmp_path):
    one, two = QuietObserver(), QuietObserver()
    _run(system, Observers([one, TensorBoardObserver(tmp_path / "scalars"), two]))
    assert one.opened == two.opened
    assert len(one.opened) == 1
    assert [plan.index for plan in one.generations] == [plan.index for plan in two.generations] == [0, 1]
    assert len(one.children) == 8
    assert one.children == two.children
    assert one.closed == two.closed == [system.tasks()["one"].path_id]
    assert (tmp_path / "scalars" / "one" / "round-1").is_dir()
