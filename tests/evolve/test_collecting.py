"""Garbage goes, and nothing else: whatever anybody refers to, or is about to, stays."""

from __future__ import annotations

import gzip
import pathlib
import shutil
import threading

import numpy as np
import pytest

from evolve.collecting import Kind, collect
from evolve.errors import DamagedError, SystemFolderError
from evolve.journal import Journal, read_journal
from evolve.layer import HEAD, POS_EMBED
from evolve.lineage import lineage_hash, lineage_of
from evolve.store import System
from evolve.verification import verify
from tests.support.fake_trainer import FakeTrainer, derive_path
from tests.support.permissions import read_only
from tests.support.searches import Killed, MortalTrainer, evolve_tasks, small_plan


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture
def system(tmp_path: pathlib.Path) -> System:
    """Two tasks, two rounds each."""
    return evolve_tasks(tmp_path / "system")


def _files(system: System) -> dict[str, bytes]:
    files = (file for file in system.folder.rglob("*") if file.is_file() and file.suffix != ".lock")
    return {str(file.relative_to(system.folder)): file.read_bytes() for file in files}


def test_without_delete_nothing_changes_and_what_is_said_is_what_is_done_with_it(system):
    before = _files(system)
    would = collect(system, delete=False)
    assert _files(system) == before
    did = collect(system, delete=True)
    assert (would.garbage, would.journals) == (did.garbage, did.journals)
    assert {one.kind for one in did.garbage} == {Kind.PATH, Kind.LAYER}
    after = _files(system)
    assert sum(map(len, before.values())) - sum(map(len, after.values())) == did.num_bytes > 0
    again = collect(system, delete=True)
    assert (again.garbage, again.journals, again.num_bytes) == ((), (), 0)
    assert _files(system) == after


def test_a_folder_that_cannot_be_written_can_be_looked_at(system):
    expected = collect(system, delete=False)
    with read_only(system.folder):
        assert collect(system, delete=False) == expected
        with pytest.raises(SystemFolderError, match="could not"):
            collect(system, delete=True)


def test_what_is_left_is_what_current_paths_and_the_root_are_made_of(system):
    expected = lineage_hash(system)
    collect(system, delete=True)
    opened = System.open(system.folder)
    assert verify(opened) == []
    assert lineage_hash(opened) == expected
    paths = [opened.root, *(opened.path(record.path_id) for record in opened.tasks().values())]
    assert {file.stem for file in opened.folder.glob("paths/*")} == {path.id for path in paths}
    layers = {file.stem for file in opened.folder.glob("layers/*/*")}
    used = set().union(*(path.layer_ids for path in paths))
    assert layers >= used
    # Beyond them only what the root is for images of other sizes.
    assert all(opened.layer(layer_id) == opened.position_embedding(_grid(opened, layer_id)) for layer_id in layers - used)
    assert {file.name for file in opened.folder.glob("examples/*")} == {record.examples for record in opened.tasks().values()}
    assert verify(evolve_tasks(system.folder, "abc")) == []


def _grid(system: System, layer_id: str) -> int:
    return system.spec(layer_id).integer("grid_height")


def test_position_embeddings_resampled_for_the_system_stay_and_trained_ones_go(system):
    resampled = system.position_embedding(7)
    trained = system.put_layer(resampled.spec, {"weight": np.ones((50, 4), np.float32)})
    garbage = {one.file.stem for one in collect(system, delete=True).garbage}
    assert trained.id in garbage
    assert resampled.id not in garbage
    # A process that made it earlier goes on counting on it.
    assert system.check_layer(system.position_embedding(7).id) == resampled


def test_files_of_others_stay_and_half_written_ones_go(system):
    strange = [system.folder / "layers" / "ab" / "notes.txt", system.folder / "paths" / "notes.json"]
    for file in strange:
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
    half = system.folder / "paths" / ".x.json.123.part"
    half.write_bytes(b"half")
    assert [one.num_bytes for one in collect(system, delete=False).garbage if one.kind is Kind.UNFINISHED] == [4]
    assert half.exists()
    collect(system, delete=True)
    assert not half.exists()
    assert all(file.exists() for file in strange)


def test_layers_of_a_removed_task_go_and_its_journal_stays_compressed(system):
    with system.locks.publishing():
        system.remove_task("b")
    path = system.path(read_journal(system.removed_journals()[-1])[-1]["path_id"])
    own = path.layer_ids - system.root.layer_ids - system.path(system.tasks()["a"].path_id).layer_ids
    assert own
    collection = collect(system, delete=True)
    resampled = {layer.id for position, layer in path.layers if position == POS_EMBED}
    assert own <= {one.file.stem for one in collection.garbage} | resampled
    assert [file.name for file in system.removed_journals()] == ["b-0001.1.jsonl.gz", "b-0002.1.jsonl.gz"]
    assert read_journal(system.removed_journals()[0])[-1]["type"] == "close"
    # Another one to be set aside under the same name does not meet it.
    evolve_tasks(system.folder)
    with system.locks.publishing():
        system.remove_task("b")
    assert [file.name for file in system.removed_journals()] == [
        *("b-0001.1.jsonl.gz", "b-0001.2.jsonl", "b-0002.1.jsonl.gz", "b-0002.2.jsonl")
    ]


# Unfinished searches


@pytest.mark.parametrize("lives", [0, 1, 3, 4, 7, 8, 11, 16, 20, 25, 31])
def test_an_unfinished_search_ends_as_if_nothing_had_been_collected(tmp_path, lives):
    expected = lineage_hash(evolve_tasks(tmp_path / "whole"))
    with pytest.raises(Killed):
        evolve_tasks(tmp_path / "system", trainer=MortalTrainer(lives))
    system = System.open(tmp_path / "system")
    assert len(collect(system, delete=True).unfinished) == 1
    assert verify(system) == []
    trainer = FakeTrainer()
    assert lineage_hash(evolve_tasks(system.folder, trainer=trainer)) == expected
    assert sum(len(plan.children) for plan in trainer.plans) == 32 - lives


def test_the_snapshot_of_an_unfinished_search_stays_though_all_of_it_was_replaced_and_removed(tmp_path):
    folder = tmp_path / "system"
    evolve_tasks(folder, "ab", small_plan(rounds=1))
    with pytest.raises(Killed):
        evolve_tasks(folder, "c", small_plan(rounds=1), MortalTrainer(5))
    unharmed = pathlib.Path(shutil.copytree(folder, tmp_path / "unharmed"))
    system = System.open(folder)
    seen = {row["path_id"] for row in read_journal(system.journal_file("c", 0))[0]["snapshot"]}
    evolve_tasks(folder, "a", small_plan(rounds=2), FakeTrainer(quality=lambda *_: 1.0))
    with system.locks.publishing():
        system.remove_task("b")
    assert not seen & {record.path_id for record in system.tasks().values()}
    collect(system, delete=True)
    assert seen <= {file.stem for file in folder.glob("paths/*")}
    ends = [evolve_tasks(where, "c", small_plan(rounds=1)) for where in (folder, unharmed)]
    one, other = (lineage_of(read_journal(end.journal_file("c", 0))) for end in ends)
    assert one == other
    collect(system, delete=True)
    assert seen & {file.stem for file in folder.glob("paths/*")} == set(), "nobody needs them any more"
    assert verify(System.open(folder)) == []


def test_a_search_killed_between_its_last_record_and_its_publication_keeps_its_examples(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(System, "put_task", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            evolve_tasks(tmp_path / "system", "a")
    system = System.open(tmp_path / "system")
    collect(system, delete=True)
    trainer = FakeTrainer()
    evolve_tasks(system.folder, "a", small_plan(rounds=1), trainer)
    assert (trainer.plans, trainer.examined) == ([], [])
    assert verify(system) == []


def test_an_unfinished_baseline_keeps_what_it_names_and_a_finished_one_nothing(system):
    path = derive_path(system, system.root, "a", {HEAD: 5.0})
    system.put_path(path)
    lone = system.put_layer(path.layer(HEAD).spec, {"weight": np.full(3, 7, np.float32)})
    journal = Journal(system.folder / "baselines" / "finetune" / "a.jsonl")
    journal.append("open", {"format": 1, "system": system.id})
    journal.append("pack", {"path_id": path.id, "kept": {"head": [lone.id]}})
    assert collect(system, delete=True).unfinished == ("baselines/finetune/a.jsonl",)
    assert System.open(system.folder).path(path.id) == path
    assert system.check_layer(lone.id) == lone
    journal.append("close", {"path_id": path.id})
    journal.close()
    garbage = {one.file.stem for one in collect(system, delete=True).garbage}
    assert garbage == {path.id, path.layer(HEAD).id, lone.id}
    assert [file.name for file in system.baseline_journals()] == ["a.jsonl.gz"]
    assert [record["type"] for record in read_journal(journal.file)] == ["open", "pack", "close"]
    assert verify(system) == []


def test_nothing_is_removed_while_it_cannot_be_known_what_an_unfinished_search_needs(tmp_path):
    with pytest.raises(Killed):
        evolve_tasks(tmp_path / "system", trainer=MortalTrainer(20))
    system = System.open(tmp_path / "system")
    (unfinished,) = [journal.file for journal in system.journals() if not journal.is_closed]
    lines = unfinished.read_bytes().splitlines(keepends=True)
    unfinished.write_bytes(b"".join([*lines[:2], lines[2].replace(b"quality", b"qualitz"), *lines[3:]]))
    before = _files(system)
    with pytest.raises(DamagedError, match=f"altered line 3 in {unfinished}"):
        collect(system, delete=True)
    assert _files(system) == before
    unfinished.write_bytes(b"".join(lines))
    file = next(system.folder.glob("tasks/a.json"))
    file.write_text("{}")
    with pytest.raises(DamagedError, match=r"unreadable task .*a\.json"):
        collect(system, delete=True)


def test_a_damaged_journal_of_a_closed_search_is_left_as_it_is(system):
    first, *rest = [journal.file for journal in system.journals()]
    first.write_bytes(first.read_bytes().replace(b"quality", b"qualitz", 1))
    altered = first.read_bytes()
    collection = collect(system, delete=True)
    assert len(collection.left) == 1
    assert f"in {first}" in collection.left[0]
    assert first.read_bytes() == altered
    assert all(not file.exists() for file in rest)


# Compressed journals


def test_a_compressed_journal_is_the_same_journal_under_either_name(system):
    files = [journal.file for journal in system.journals()]
    before = {file: read_journal(file) for file in files}
    listed = [(journal.task, journal.round, journal.is_closed) for journal in system.journals()]
    assert listed == [("a", 0, True), ("a", 1, True), ("b", 0, True), ("b", 1, True)]
    collection = collect(system, delete=True)
    assert sum(one.after for one in collection.journals) < 0.3 * sum(one.before for one in collection.journals)
    assert [(journal.task, journal.round, journal.is_closed) for journal in system.journals()] == listed
    assert [journal.file.name for journal in system.journals("b")] == ["b-0001.jsonl.gz", "b-0002.jsonl.gz"]
    for journal, file in zip(system.journals(), files, strict=True):
        assert not file.exists()
        assert read_journal(file) == read_journal(journal.file) == before[file]
        assert gzip.decompress(journal.file.read_bytes()).count(b"\n") == len(before[file])


def test_a_crash_between_compressing_and_removing_leaves_one_journal(system):
    files = [journal.file for journal in system.journals()]
    for file in files:
        (file.parent / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    assert [journal.file for journal in system.journals()] == files
    assert verify(system) == []
    collect(system, delete=True)
    assert [journal.file.suffix for journal in system.journals()] == [".gz"] * 4


def test_a_compressed_journal_becomes_plain_for_whoever_opens_it(system):
    file = system.journals()[0].file
    records = read_journal(file)
    collect(system, delete=True)
    journal = Journal(file)
    assert journal.records == records
    journal.append("note", {})
    journal.close()
    assert [other.name for other in file.parent.glob("a-0001*")] == ["a-0001.jsonl"]
    assert len(read_journal(file)) == len(records) + 1


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data[:-6] + b"wrong!", lambda data: b"none"]
)
def test_a_damaged_compressed_journal_is_named(system, damage):
    collect(system, delete=True)
    file = system.journals()[0].file
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DamagedError, match=f"could not read {file} .*restore the file from a copy"):
        read_journal(file)
    assert any(str(file) in finding for finding in verify(system))


# Beside others


def test_whoever_is_about_to_name_what_was_stored_is_waited_for(tmp_path, monkeypatch):
    """A collection begins after each layer, path and file of examples, and ends before the search goes on, unless it has to wait."""
    folder = tmp_path / "system"
    expected = lineage_hash(evolve_tasks(tmp_path / "whole"))
    threads = []

    def collect_meanwhile(self, *arguments, act):
        result = act(self, *arguments)
        waits = threading.Event()

        def go() -> None:
            try:
                collect(System.open(folder), delete=True, waits=waits.set)
            finally:
                waits.set()

        threads.append(threading.Thread(target=go))
        threads[-1].start()
        assert waits.wait(30)
        return result

    system = evolve_tasks(folder, "")
    for name in ("put_layer", "put_path", "put_examples"):
        act = getattr(System, name)
        monkeypatch.setattr(System, name, lambda self, *a, act=act: collect_meanwhile(self, *a, act=act))
    evolve_tasks(folder)
    for thread in threads:
        thread.join()
    assert len(threads) > 60
    assert verify(system) == []
    assert lineage_hash(system) == expected


def test_a_search_that_opens_is_waited_for_until_its_journal_says_what_it_saw(tmp_path, monkeypatch):
    folder = tmp_path / "system"
    evolve_tasks(folder, "a", small_plan(rounds=1))
    collections = []
    append = Journal.append

    def others_come_in_between(self, kind, fields):
        if kind == "open" and not collections:
            old = System.open(folder).tasks()["a"].path_id
            collections.append(threading.Thread(target=collect, args=(System.open(folder),), kwargs={"delete": True}))
            # The path that was just seen is replaced.
            evolve_tasks(folder, "a", small_plan(rounds=2), FakeTrainer(quality=lambda *_: 1.0))
            assert System.open(folder).tasks()["a"].path_id != old
            collections[0].start()
            collections[0].join(0.3)
        return append(self, kind, fields)

    monkeypatch.setattr(Journal, "append", others_come_in_between)
    evolve_tasks(folder, "b", small_plan(rounds=1))
    collections[0].join()
    assert verify(System.open(folder)) == []


def test_a_reader_is_waited_for(system):
    waits = threading.Event()
    done = []
    with system.locks.reading():
        thread = threading.Thread(target=lambda: done.append(collect(System.open(system.folder), delete=True, waits=waits.set)))
        thread.start()
        assert waits.wait(30)
        thread.join(0.1)
        assert done == []
        # Others may go on reading and storing; a collection that waits keeps nobody out.
        with system.locks.storing(), system.locks.reading():
            pass
    thread.join()
    assert len(done) == 1


def test_a_kill_while_paths_and_layers_go_leaves_no_path_without_its_layers(tmp_path, monkeypatch):
    whole = evolve_tasks(tmp_path / "whole")
    expected = lineage_hash(whole)
    unlink = pathlib.Path.unlink
    count = len(collect(whole, delete=False).garbage) + 4
    for deadly in range(0, count, 3):
        folder = pathlib.Path(shutil.copytree(whole.folder, tmp_path / str(deadly)))
        left = [deadly]

        def die(self, *arguments, left=left, **options):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return unlink(self, *arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, "unlink", die)
            with pytest.raises(Killed):
                collect(System.open(folder), delete=True)
        system = System.open(folder)
        assert verify(system) == []
        assert lineage_hash(system) == expected
        collect(system, delete=True)
        assert lineage_hash(System.open(folder)) == expected
        assert collect(system, delete=True).num_bytes == 0


def test_a_folder_that_cannot_be_written_is_named(system, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(pathlib.Path, "unlink", refuse)
    with pytest.raises(SystemFolderError, match=f"could not remove files in {system.folder} .Read-only file system.; expected"):
        collect(system, delete=True)
