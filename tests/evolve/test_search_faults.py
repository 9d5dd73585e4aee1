"""A search among kills, full disks, others that publish, and trainers and records that are wrong: all stays whole, or is named."""

from __future__ import annotations

import errno
import itertools
import json
import os

import pytest

from evolve.config import DefaultSettings, SearchSettings, TrainingSettings
from evolve.errors import DamagedError, SettingsError, SystemFolderError, TrainerError
from evolve.generation import ChildResult, PackResult
from evolve.journal import Journal, Record, read_journal
from evolve.search import SearchPlan
from evolve.snapshot import Snapshot
from evolve.store import System
from evolve.verification import verify
from tests.support.fake_trainer import FakeTrainer, tiny_root
from tests.support.full_search import run, unscaled_plan
from tests.support.searches import Killed


def _without_seconds(system: System) -> list[Record]:
    rows = []
    for file in sorted((system.folder / "journal").glob("*.jsonl")):
        for record in read_journal(file):
            row = json.loads(json.dumps(record))
            for part in (row, *row.get("children", [])):
                for name in ("seconds", "crc32", "system"):
                    part.pop(name, None)
            rows.append(row)
    return rows


def test_killed_at_any_write_a_search_ends_as_if_nothing_had_happened(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)
    plan = SearchPlan(
        3,
        DefaultSettings(),
        SearchSettings(rounds=2, children_per_task=4, generation_size=2, mutation_rate=0.3, auto_tune=True, max_seeds=3),
        TrainingSettings(),
    )

    def newest_seed_wins(generation, child):
        return 0.5 * generation.round + (0.4 if generation.index == child.index == 0 else 0.1)

    whole = System.create(tmp_path / "whole", tiny_root(), 32)
    run(whole, plan=plan, trainer=FakeTrainer(quality=newest_seed_wins))
    expected = (_without_seconds(whole), whole.tasks())
    # First root -> a -> b -> c, then a new a below c: b, whose parent was replaced, is handed on.
    first_a = read_journal(whole.journal_file("a", 0))[-1]["path_id"]
    assert whole.path(read_journal(whole.journal_file("b", 0))[-1]["path_id"]).parent_id == first_a
    assert first_a != whole.tasks()["a"].path_id
    write, append = System._write, Journal.append
    killed_after = 0
    for deadly in itertools.count():
        left = [deadly]

        def count(left=left) -> None:
            if left[0] == 0:
                raise Killed
            left[0] -= 1

        def counted_write(self, target, data, count=count):
            count()
            write(self, target, data)

        def counted_append(self, kind, fields, count=count):
            count()
            return append(self, kind, fields)

        system = System.create(tmp_path / f"killed-{deadly}", tiny_root(), 32)
        with monkeypatch.context() as patch:
            patch.setattr(System, "_write", counted_write)
            patch.setattr(Journal, "append", counted_append)
            try:
                run(system, plan=plan, trainer=FakeTrainer(quality=newest_seed_wins))
            except Killed:
                killed_after += 1
            else:
                break
        run(System.open(system.folder), plan=plan, trainer=FakeTrainer(quality=newest_seed_wins))
        assert (_without_seconds(system), system.tasks()) == expected, f"killed before write {deadly}"
        assert verify(system) == []
    assert killed_after > 50


def test_a_disk_that_is_full_at_any_write_leaves_all_whole_and_the_search_goes_on(tmp_path, monkeypatch):
    plan = SearchPlan(
        3,
        DefaultSettings(),
        SearchSettings(rounds=1, children_per_task=4, generation_size=2, mutation_rate=0.3),
        TrainingSettings(),
    )
    monkeypatch.setattr("os.fsync", lambda _: None)
    whole = System.create(tmp_path / "whole", tiny_root(), 32)
    run(whole, ["a", "b"], plan)
    expected = (_without_seconds(whole), whole.tasks())
    write = os.write
    num_failures = 0
    # Every fifth: writes come in twos, so that each kind of them is met.
    for room in itertools.count(step=5):
        folder = tmp_path / f"full-{room}"
        left = [room]

        def use_room(left=left) -> None:
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left[0] -= 1

        def write_some(descriptor, data, use_room=use_room):
            try:
                use_room()
            except OSError:
                write(descriptor, data[: len(data) // 2])
                raise
            return write(descriptor, data)

        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", lambda _, use_room=use_room: use_room())
            patch.setattr("os.write", write_some)
            try:
                system = System.open(folder) if System.exists(folder) else System.create(folder, tiny_root(), 32)
                run(system, ["a", "b"], plan)
                break
            except SystemFolderError as error:
                said = str(error)
        num_failures += 1
        assert str(folder) in said
        assert "(No space left on device); expected a writable folder with free space" in said
        assert not list(folder.rglob("*.part"))
        assert all(file.read_bytes()[-1:] in (b"", b"\n") for file in folder.rglob("*.jsonl")), "a torn line was left"
        system = System.open(folder) if System.exists(folder) else System.create(folder, tiny_root(), 32)
        assert verify(system) == []
        run(system, ["a", "b"], plan)
        assert (_without_seconds(system), system.tasks()) == expected, f"full after {room} writes"
    assert num_failures > 20


def test_what_killed_processes_left_half_written_goes_when_a_search_opens(tmp_path):
    system = System.create(tmp_path / "system", tiny_root(), 32)
    run(system, ["a"], unscaled_plan(rounds=1))
    for folder in (system.folder, *(entry for entry in system.folder.rglob("*") if entry.is_dir())):
        if folder.name not in ("locks", "journal", "layers"):
            (folder / ".file.0123.part").write_bytes(b"half")
    assert len(list(system.folder.rglob("*.part"))) > 5
    run(system, ["b"], unscaled_plan(rounds=1))
    assert not list(system.folder.rglob(".*.part"))


def test_a_search_begun_on_another_device_is_not_gone_on_with(tmp_path):
    system = System.create(tmp_path / "system", tiny_root(), 32)

    class Mortal(FakeTrainer):
        def train(self, plan):
            yield next(super().train(plan))
            raise Killed

    with pytest.raises(Killed):
        run(system, ["a"], trainer=Mortal())
    other = FakeTrainer()
    other.versions = {"device": "cuda"}
    with pytest.raises(SettingsError, match="trainer.device = 'none' then and 'cuda' now"):
        run(system, ["a"], trainer=other)


def test_the_snapshot_is_taken_while_nobody_publishes(tmp_path, monkeypatch):
    """A publication between two reads would show a parent that is no longer current; reading paths, which stay, holds up nobody."""
    system = System.create(tmp_path / "system", tiny_root(), 32)
    run(system, ["a"])

    def held(name: str) -> bool:
        import fcntl

        with (system.folder / "locks" / f"{name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    found = {}

    def watched(name: str, inner):
        def look(*arguments):
            found.setdefault(name, (held("tasks"), held("files")))
            return inner(*arguments)

        return look

    monkeypatch.setattr(System, "tasks", watched("records", System.tasks))
    monkeypatch.setattr(Snapshot, "of", staticmethod(watched("paths", Snapshot.of)))
    run(system, ["b"])
    assert found == {"records": (True, True), "paths": (False, True)}


class ForgetfulTrainer(FakeTrainer):
    """Leaves out what it is told to."""

    def __init__(self, *, child: bool) -> None:
        super().__init__()
        self.forgets_child = child

    def train(self, plan):
        packs = list(super().train(plan))
        if self.forgets_child:
            packs = packs[:-1]
        else:
            first = packs[0].children[0]
            packs[0] = PackResult((ChildResult(**{**first.__dict__, "trained": {}}),))
        yield from packs


@pytest.mark.parametrize(("child", "message"), [(True, "7 results"), (False, "no weights of head of child 0")])
def test_a_trainer_that_breaks_its_promises_is_told_so(tmp_path, child, message):
    system = System.create(tmp_path / "system", tiny_root(), 32)
    with pytest.raises(TrainerError, match=message):
        run(system, ["a"], trainer=ForgetfulTrainer(child=child))


def test_a_parent_that_is_not_current_is_damage(tmp_path):
    system = System.create(tmp_path / "system", tiny_root(), 32)
    run(system, ["a"])
    file = system.folder / "tasks" / "a.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "parent_id": "0" * 32}))
    assert any("parent of task 'a'" in finding for finding in verify(system))
    with pytest.raises(DamagedError, match="current for no task"):
        run(system, ["b"])
