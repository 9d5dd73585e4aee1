"""A system in a store: two machines with nothing but the store between them, in a folder and on an S3-compatible server."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import pathlib

import pytest

from evolve import objects, working_copy
from evolve.collecting import Kind, collect
from evolve.errors import ConflictError, DamagedError, SystemFolderError
from evolve.journal import read_journal
from evolve.lineage import lineage_hash
from evolve.store import System
from evolve.verification import verify
from tests.support.fake_trainer import FakeTrainer, tiny_root
from tests.support.jobs import Jobs
from tests.support.searches import SHORT_PLAN, InterruptedTrainer, Killed, MortalTrainer, evolve_tasks, small_plan
from tests.support.stores import BUCKET, flaky_proxy, machine, s3_server, use_s3

pytestmark = pytest.mark.usefixtures("quick_disk")

_count = itertools.count()


@pytest.fixture(scope="module")
def server():
    with s3_server() as address:
        yield address


@pytest.fixture
def url(tmp_path):
    """Of an empty store in a folder."""
    return (tmp_path / "store").as_uri()


@pytest.fixture(params=["file", "s3"])
def any_url(request, tmp_path, monkeypatch):
    """Of an empty store in a folder, and on a server."""
    if request.param == "file":
        return (tmp_path / "store").as_uri()
    use_s3(monkeypatch, request.getfixturevalue("server"))
    return f"s3://{BUCKET}/{next(_count)}"


@pytest.fixture
def here(tmp_path):
    with machine(tmp_path / "here") as folder:
        yield folder


def test_a_search_in_a_store_is_the_search_in_a_folder(any_url, here, tmp_path):
    expected = evolve_tasks(tmp_path / "folder", plan=SHORT_PLAN)
    system = evolve_tasks(any_url, plan=SHORT_PLAN)
    assert lineage_hash(system) == lineage_hash(expected)
    assert system.location == any_url
    with machine(tmp_path / "there"):
        other = System.open(any_url)
        assert other.folder != system.folder
        assert lineage_hash(other) == lineage_hash(expected)
        assert verify(other) == []
        assert other.tasks() == system.tasks()


def test_another_machine_goes_on_where_one_was_lost(url, here, tmp_path):
    expected = lineage_hash(evolve_tasks(tmp_path / "folder"))
    with pytest.raises(Killed):
        evolve_tasks(url, trainer=MortalTrainer(13))
    trainer = FakeTrainer()
    with machine(tmp_path / "there"):
        system = evolve_tasks(url, trainer=trainer)
        assert lineage_hash(system) == expected
        assert verify(system) == []
    # What was shared was not trained again.
    assert sum(len(plan.children) for plan in trainer.plans) == 4 * 8 - 13


def test_two_machines_that_take_turns_at_random_moments(url, here, tmp_path):
    expected = lineage_hash(evolve_tasks(tmp_path / "folder"))
    for turn, lives in enumerate((0, 1, 5, 2, 7, 3, 100)):
        with machine(tmp_path / f"machine-{turn % 2}"):
            if lives < 100:
                with pytest.raises(Killed):
                    evolve_tasks(url, trainer=MortalTrainer(lives))
            else:
                assert lineage_hash(evolve_tasks(url)) == expected


@pytest.fixture
def told(here, tmp_path):
    """Has another machine do a round while this one is at it, and checks who wins, and what the other is told."""

    def check(url, before, plan):
        evolve_tasks(url, "a", plan=plan)

        def other_machine():
            with machine(tmp_path / "there"):
                evolve_tasks(url, "b", plan=plan, trainer=FakeTrainer(test_accuracy=0.25))

        with pytest.raises(ConflictError, match="another machine has gone on with journal/b-0001 of .*run again") as told:
            evolve_tasks(url, "b", plan=plan, trainer=InterruptedTrainer(before, other_machine))
        kept = next(here.glob("*/journal/removed/b-0001.*.jsonl"))
        assert str(kept) in str(told.value)
        system = System.open(url)
        assert system.tasks()["b"].test_accuracy == 0.25
        assert verify(system) == []
        return system

    return check


@pytest.mark.parametrize("before", [0, 3, 8])
def test_of_two_machines_in_one_round_one_wins_and_the_other_is_told(url, told, tmp_path, before):
    told(url, before, small_plan(rounds=1))
    # It goes on from what the other published.
    again = evolve_tasks(url, "b", plan=small_plan())
    assert again.tasks()["b"].rounds == 2
    assert verify(again) == []
    with machine(tmp_path / "third"):
        assert lineage_hash(System.open(url)) == lineage_hash(again)


def test_so_it_is_on_object_storage(server, monkeypatch, told):
    use_s3(monkeypatch, server)
    told(f"s3://{BUCKET}/told", 2, small_plan(rounds=1, children_per_task=4))


def test_a_machine_whose_search_was_taken_over_is_told_even_if_its_number_is_free_again(url, here, tmp_path):
    """Versions that were superseded are removed, so that the next number of the one left behind is not taken."""

    def taken_over():
        with machine(tmp_path / "there"):
            evolve_tasks(url, "a", plan=small_plan(rounds=1))

    trainer = InterruptedTrainer(1, taken_over)
    with pytest.raises(ConflictError):
        evolve_tasks(url, "a", plan=small_plan(rounds=1), trainer=trainer)
    assert trainer._before == -1, "it trained on"
    with machine(tmp_path / "third"):
        assert [record["type"] for record in read_journal(System.open(url).journals()[0].file)][-1] == "close"


def test_what_was_there_a_moment_ago_and_is_gone_was_anothers(any_url, monkeypatch):
    store = objects.open_objects(any_url)
    store.prepare()

    def is_there(*_, **__):
        raise FileExistsError

    assert store.create("journal/1", b"mine")
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "hardlink_to", is_there)
        if hasattr(store, "_system"):
            patch.setattr(store._system, "pipe_file", is_there)
        assert store.create("journal/1", b"mine"), "an earlier attempt's"
        assert not store.create("journal/1", b"another")
        assert not store.create("journal/2", b"mine"), "removed before it could be read"


def test_two_tasks_published_at_once_start_from_what_was_there(url, here, tmp_path):
    evolve_tasks(url, "a", plan=small_plan(rounds=1))

    def other_machine():
        with machine(tmp_path / "there"):
            evolve_tasks(url, "c", plan=small_plan(rounds=1))
            evolve_tasks(url, "a")

    system = evolve_tasks(url, "b", plan=small_plan(rounds=1), trainer=InterruptedTrainer(2, other_machine))
    opened = read_journal(system.journal_file("b", 0))[0]
    assert [row["name"] for row in opened["snapshot"]] == ["a"]
    records = system.tasks()
    assert set(records) == {"a", "b", "c"}
    assert records["a"].rounds == 2
    current = {record.path_id for record in records.values()} | {system.root.id}
    assert all(record.parent_id in current for record in records.values())
    assert verify(system) == []


def test_a_task_that_is_removed_hands_its_parent_on(url, here, tmp_path):
    system = evolve_tasks(url, "abcd", plan=small_plan(rounds=1, mutation_rate=0.0))
    for name in "abc":
        before = system.tasks()
        with system.evolving(name), system.locks.publishing():
            system.remove_task(name)
        after = system.tasks()
        assert name not in after
        for other, record in after.items():
            was = before[other].parent_id
            assert record.parent_id == (before[name].parent_id if was == before[name].path_id else was)
        assert verify(system) == []
    with machine(tmp_path / "there"):
        again = evolve_tasks(url, "a", plan=small_plan(rounds=1))
        assert set(again.tasks()) == {"a", "d"}
        assert verify(again) == []


def test_a_task_removed_while_another_machine_evolves_it(url, here, tmp_path):
    evolve_tasks(url, "a", plan=small_plan(rounds=1))

    def removed():
        with machine(tmp_path / "there"):
            system = System.open(url)
            with system.evolving("a"), system.locks.publishing():
                system.remove_task("a")

    with pytest.raises(ConflictError):
        evolve_tasks(url, "a", trainer=InterruptedTrainer(3, removed))
    assert System.open(url).tasks() == {}


def test_a_resampled_position_embedding_is_there_before_a_path_that_has_it(url, here, tmp_path):
    system = System.create(url, tiny_root(), 32)
    with system.evolving("a"):
        layer = system.position_embedding(4)
    with machine(tmp_path / "there"):
        assert System.open(url).layer(layer.id) == layer


def test_layers_are_fetched_once_and_checked(url, here, tmp_path, monkeypatch):
    evolve_tasks(url, "a", plan=small_plan(rounds=1))
    fetched = []
    with machine(tmp_path / "there"):
        kind = type(System.open(url)._objects)

        def counting(self, name, get=kind.get):
            fetched.append(name)
            return get(self, name)

        monkeypatch.setattr(kind, "get", counting)
        for _ in range(2):
            system = System.open(url)
            path = system.path(system.tasks()["a"].path_id)
            for layer_id in path.layer_ids:
                assert system.tensors(layer_id)
        layers = [name for name in fetched if name.startswith("layers/")]
        assert len(layers) == len(set(layers))


def test_what_was_altered_in_the_store_is_found_and_never_taken(url, here, tmp_path):
    system = evolve_tasks(url, "a", plan=small_plan(rounds=1))
    path = system.path(system.tasks()["a"].path_id)
    layer = path.layers[-1].layer.id
    name = f"layers/{layer[:2]}/{layer}.safetensors"
    data = bytearray(system._objects.get(name))
    data[-1] ^= 1
    system._objects.put(name, bytes(data))
    assert any(f"{name} altered" in finding for finding in verify(system))
    with machine(tmp_path / "there") as folder:
        with pytest.raises(DamagedError, match=f"found {url}/{name} altered"):
            System.open(url).path(path.id)
        assert not list(folder.rglob(f"{layer}.*"))


def test_two_processes_of_a_machine_fetch_each_layer_once(server, here, tmp_path, monkeypatch):
    """They open a system at the same moment, with a working copy that has nothing yet."""
    with contextlib.ExitStack() as stack:
        address, faults = stack.enter_context(flaky_proxy(server))
        use_s3(monkeypatch, address)
        jobs = stack.enter_context(Jobs(tmp_path / "errors.txt"))
        url = f"s3://{BUCKET}/{next(_count)}"
        system = System.create(url, tiny_root(), 32)
        faults.seconds = 0.1
        faults.asked.clear()
        there = tmp_path / "there"
        started = [jobs.start(location=url, cache=str(there), task="a", rounds=0) for _ in range(2)]
        assert [jobs.wait(process) for process in started] == [0, 0], jobs.errors
        fetched = collections.Counter(path.rpartition("/")[2] for method, path in faults.asked if method == "GET")
        assert fetched.pop("system.json") == 2
        layers = {f"{layer}.safetensors" for layer in system.root.layer_ids}
        assert fetched == dict.fromkeys([*layers, f"{system.root.id}.json"], 1)
        assert {file.name for file in there.rglob("*.safetensors")} == layers


def test_garbage_is_not_collected_where_no_lock_is_seen(url, here):
    system = evolve_tasks(url, "a", plan=small_plan(rounds=1))
    with pytest.raises(SystemFolderError, match="no lock keeps other machines.*--alone"):
        collect(system, delete=False)


def test_garbage_in_a_store_is_collected_by_who_is_alone(any_url, here, tmp_path):
    """A machine that knows of nobody's journals; a search of another, which is unfinished, goes on as if nothing had been."""
    plan = small_plan(rounds=1, children_per_task=4, generation_size=2)
    expected = lineage_hash(evolve_tasks(tmp_path / "folder", plan=plan))
    evolve_tasks(any_url, "a", plan=plan)
    with pytest.raises(Killed):
        evolve_tasks(any_url, "b", plan=plan, trainer=MortalTrainer(3))
    with machine(tmp_path / "there"):
        system = System.open(any_url)
        before = set(system._objects.names(""))
        would = collect(system, delete=False, alone=True)
        assert set(system._objects.names("")) == before
        did = collect(System.open(any_url), delete=True, alone=True)
        assert did.unfinished == ("journal/b-0001.jsonl",)
        assert [one.file for one in did.garbage] == [one.file for one in would.garbage]
        assert {one.kind for one in did.garbage} >= {Kind.PATH, Kind.LAYER}
        assert set(system._objects.names("")) == before - {str(one.file) for one in did.garbage}
        assert did.num_bytes > 1000
        assert collect(System.open(any_url), delete=True, alone=True).garbage == ()
    system = evolve_tasks(any_url, plan=plan)
    assert lineage_hash(system) == expected
    assert verify(system) == []
    with machine(tmp_path / "third"):
        assert lineage_hash(System.open(any_url)) == expected


@pytest.mark.parametrize("looks", ["sizes", "names"])
def test_what_is_named_while_garbage_is_looked_for_stays(url, here, tmp_path, monkeypatch, looks):
    """Somebody was at work after all: what was named by the time that journals are read stays."""
    evolve_tasks(url, "a", plan=small_plan(rounds=1))
    with machine(tmp_path / "there"):
        system = System.open(url)

        look = getattr(objects._Folder, looks)

        def evolved_meanwhile(self, folder):
            monkeypatch.undo()
            with machine(tmp_path / "third"):
                evolve_tasks(url, "b", plan=small_plan(rounds=1))
            return look(self, folder)

        monkeypatch.setattr(objects._Folder, looks, evolved_meanwhile)
        assert collect(system, delete=True, alone=True).garbage
        assert set(system.tasks()) == {"a", "b"}
        assert verify(System.open(url)) == []


def test_what_killed_writers_left_in_a_share_goes_with_its_garbage(url, here, tmp_path):
    system = evolve_tasks(url, "a", plan=small_plan(rounds=1))
    left = next((tmp_path / "store" / "layers").glob("*/")) / ".x.safetensors.y.part"
    left.write_bytes(b"half")
    assert Kind.UNFINISHED in {one.kind for one in collect(system, delete=True, alone=True).garbage}
    assert not left.exists()


def test_a_store_that_lets_nobody_delete_says_so(url, here, monkeypatch):
    system = evolve_tasks(url, "a", plan=small_plan(rounds=1))
    monkeypatch.setattr(objects._Folder, "remove", lambda *_: None)
    with pytest.raises(SystemFolderError, match=r"could not remove \d+ of \d+ objects in .*lets this user delete"):
        collect(system, delete=True, alone=True)


def test_nothing_in_a_store_is_ever_changed(tmp_path, here, monkeypatch):
    """But journals that were superseded, which are removed."""
    store = tmp_path / "store"
    seen: dict[pathlib.Path, bytes] = {}

    def look(self, names, remove=objects._Folder.remove):
        check()
        remove(self, names)

    def check():
        for file in store.rglob("*.*"):
            if file.is_file() and not file.name.startswith("."):
                assert seen.setdefault(file, file.read_bytes()) == file.read_bytes()

    monkeypatch.setattr(objects._Folder, "remove", look)
    evolve_tasks(store.as_uri())
    check()
    gone = {file.parent.parent.name for file in seen if not file.exists() and not file.name.startswith("probe")}
    assert gone == {"journal"}
    assert len(list((store / "journal").glob("*/*"))) == 4
    assert sorted(file.name for file in (store / "tasks" / "a").iterdir()) == ["1.json", "2.json"]
    assert json.loads((store / "tasks/a/1.json").read_text())["record"]["rounds"] == 1


def test_working_copies_lie_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.delenv("MUNET_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = working_copy.working_folder("s3://bucket/my system")
    assert folder.parent == tmp_path / "munet"
    assert folder.name.startswith("my-system-")
    assert folder != working_copy.working_folder("s3://other/my system")
    with machine(tmp_path / "chosen"):
        assert working_copy.working_folder("s3://bucket/my system").parent == tmp_path / "chosen"
