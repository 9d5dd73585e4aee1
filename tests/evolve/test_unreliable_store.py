"""A store that is not there, not ours, away for a while, late or full: what is wrong is said, and nothing that was finished is lost."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import pathlib
import shutil
import subprocess
import time
import types

import pytest

from evolve import objects, shared_journals
from evolve.errors import DamagedError, StoreError, SystemFolderError
from evolve.lineage import lineage_hash
from evolve.store import System
from evolve.verification import verify
from tests.support.fake_trainer import FakeTrainer, tiny_root
from tests.support.searches import SHORT_PLAN, InterruptedTrainer, Killed, MortalTrainer, evolve_tasks, small_plan
from tests.support.stores import BUCKET, flaky_proxy, machine, s3_server, use_s3

pytestmark = pytest.mark.usefixtures("quick_disk")

_count = itertools.count()


@pytest.fixture(scope="module")
def server():
    with s3_server() as address:
        yield address


@pytest.fixture
def here(tmp_path):
    with machine(tmp_path / "here") as folder:
        yield folder


def wait_by(monkeypatch, function):
    """Has this function in place of waiting, in what waits for a store alone: other threads of this process wait, too."""
    for module in (objects, shared_journals):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=time.monotonic, sleep=function))


def test_another_system_at_the_same_url_is_not_mixed_with_the_earlier_one(tmp_path, here):
    url = (tmp_path / "store").as_uri()
    evolve_tasks(url, "a", plan=small_plan(rounds=1))
    (tmp_path / "store").rename(tmp_path / "moved")
    with pytest.raises(SystemFolderError, match=r"found no system in file:.* any more"):
        evolve_tasks(url, "a")
    with machine(tmp_path / "there"):
        evolve_tasks(url, "b", plan=small_plan(rounds=1))
    with pytest.raises(SystemFolderError, match="a working copy of system .*remove that folder"):
        System.open(url)


def test_a_store_and_a_folder_are_not_taken_for_one_another(tmp_path, here):
    evolve_tasks(tmp_path / "folder", "a", plan=small_plan(rounds=1))
    evolve_tasks((tmp_path / "store").as_uri(), "a", plan=small_plan(rounds=1))
    for location in (tmp_path / "store", (tmp_path / "folder").as_uri()):
        with pytest.raises(SystemFolderError, match="a system in a store is opened by a URL"):
            System.open(location)


def test_a_store_that_is_not_there_or_not_for_us(server, here, tmp_path, monkeypatch):
    use_s3(monkeypatch, server)
    with pytest.raises(SystemFolderError, match=f"found no system in s3://{BUCKET}/none"):
        System.open(f"s3://{BUCKET}/none")
    with pytest.raises(StoreError, match="could not use s3://no-such-bucket/a .*bucket does not exist"):
        System.create("s3://no-such-bucket/a", tiny_root(), 32)
    with pytest.raises(StoreError, match=r"three slashes"):
        System.open("file://relative/folder")
    with pytest.raises(StoreError, match=r"other processes"):
        System.open("memory://a")
    with pytest.raises(StoreError, match=r"could not use odd://a"):
        System.open("odd://a")
    with pytest.raises(StoreError, match=r"found no package for gs://a .*gcsfs"):
        System.open("gs://a")


def test_without_credentials_nobody_waits(server, here, monkeypatch):
    use_s3(monkeypatch, server)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("MUNET_STORE_PATIENCE", "600")
    with pytest.raises(StoreError, match="credentials"):
        System.create(f"s3://{BUCKET}/without-{next(_count)}", tiny_root(), 32)


def test_without_its_package_a_store_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(StoreError, match=r"pip install '.\[s3\]'"):
        System.open("s3://a/b")


def test_a_store_that_replaces_what_is_there_is_refused(tmp_path, here, monkeypatch):
    monkeypatch.setattr(objects._Folder, "create", lambda self, name, data: self.put(name, data) or True)
    with pytest.raises(StoreError, match="conditional writes"):
        System.create((tmp_path / "store").as_uri(), tiny_root(), 32)


def test_a_store_that_refuses_a_clock_that_is_off_says_so_at_once(server, here, monkeypatch):
    with flaky_proxy(server) as (address, faults):
        use_s3(monkeypatch, address)
        faults.is_skewed = True
        wait_by(monkeypatch, lambda _: pytest.fail("no waiting mends a clock"))
        with pytest.raises(StoreError, match=r"(Forbidden|is too large).*the clock of this machine"):
            System.open(f"s3://{BUCKET}/skewed")


def test_through_a_proxy_that_loses_requests_and_answers_the_search_is_the_same(server, here, tmp_path, monkeypatch):
    expected = lineage_hash(evolve_tasks(tmp_path / "folder", plan=SHORT_PLAN))
    with flaky_proxy(server) as (address, faults):
        use_s3(monkeypatch, address)
        wait_by(monkeypatch, lambda _: None)
        url = f"s3://{BUCKET}/{next(_count)}"
        faults.share = 0.1
        system = evolve_tasks(url, plan=SHORT_PLAN)
        assert lineage_hash(system) == expected
        assert faults.num_failed > 10
        faults.share = 0.0
        assert verify(system) == []


def test_a_folder_that_is_not_mounted_for_a_while(tmp_path, here, monkeypatch, caplog):
    store = tmp_path / "mount" / "store"
    expected = lineage_hash(evolve_tasks(tmp_path / "folder", plan=small_plan(rounds=1)))

    def unmounted():
        store.parent.rename(tmp_path / "away")

    waits = []

    def mounted_again(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            (tmp_path / "away").rename(store.parent)

    wait_by(monkeypatch, mounted_again)
    store.parent.mkdir()
    system = evolve_tasks(store.as_uri(), "ab", plan=small_plan(rounds=1), trainer=InterruptedTrainer(2, unmounted))
    assert waits == [1.0, 2.0, 4.0]
    assert f"{store.as_uri()} does not answer (EHOSTDOWN" in caplog.text
    assert lineage_hash(system) == expected


def test_a_folder_that_is_not_mounted_when_it_is_looked_at_is_not_taken_for_an_empty_one(tmp_path, here, monkeypatch):
    store = tmp_path / "mount"
    evolve_tasks(store.as_uri(), "a", plan=SHORT_PLAN)
    with machine(tmp_path / "there"):
        system = System.open(store.as_uri())
        looks = (
            lambda: system.pull() or system.tasks()["a"].rounds == 2,
            lambda: system._objects.has("tasks/a/2.json"),
            lambda: system.path_document(system.tasks()["a"].path_id),
        )
        waits = []

        def mounted_again(seconds):
            waits.append(seconds)
            store.rmdir()
            (tmp_path / "away").rename(store)

        wait_by(monkeypatch, mounted_again)
        for number, look in enumerate(looks, start=1):
            store.rename(tmp_path / "away")
            store.mkdir()
            assert look()
            assert len(waits) == number


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(tmp_path, here, monkeypatch):
    system = evolve_tasks((tmp_path / "store").as_uri(), "a", plan=SHORT_PLAN)
    scans, waits = [], []

    def stale(folder, scandir=objects.os.scandir):
        scans.append(folder)
        if len(scans) == 1:
            raise OSError(errno.ESTALE, "Stale file handle", folder)
        return scandir(folder)

    monkeypatch.setattr(objects.os, "scandir", stale)
    wait_by(monkeypatch, waits.append)
    system.pull()
    assert list(system.tasks()) == ["a"]
    assert waits == [1.0]


def test_a_share_needs_no_locks(tmp_path, here, monkeypatch):
    """Some have none."""
    store = tmp_path / "store"

    def flock(descriptor, mode, locked=fcntl.flock):
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        if pathlib.Path(f"/proc/self/fd/{number}").readlink().is_relative_to(store):
            raise OSError(errno.ENOLCK, "No locks available")
        locked(descriptor, mode)

    monkeypatch.setattr(fcntl, "flock", flock)
    assert list(evolve_tasks(store.as_uri(), "a", plan=SHORT_PLAN).tasks()) == ["a"]
    assert not [file for file in store.rglob(".*") if file.is_file()]


def test_a_journal_that_was_taken_out_of_the_store_is_put_there_again(tmp_path, here, monkeypatch):
    wait_by(monkeypatch, lambda _: pytest.fail("nobody has it"))
    store = tmp_path / "store"
    with pytest.raises(Killed):
        evolve_tasks(store.as_uri(), "a", trainer=MortalTrainer(5))
    shutil.rmtree(store / "journal")
    trainer = FakeTrainer()
    system = evolve_tasks(store.as_uri(), "a", trainer=trainer)
    assert lineage_hash(system) == lineage_hash(evolve_tasks(tmp_path / "folder", "a"))
    assert sum(len(plan.children) for plan in trainer.plans) == 2 * 8 - 5


def test_what_is_listed_and_is_not_there_is_not_looked_for_for_ever(tmp_path, here, monkeypatch):
    with pytest.raises(Killed):
        evolve_tasks((tmp_path / "store").as_uri(), "a", trainer=MortalTrainer(5))
    waits = []
    wait_by(monkeypatch, waits.append)
    with machine(tmp_path / "there"):
        system = System.open((tmp_path / "store").as_uri())
        names = system._objects.names
        # As the listing of a share that is late.
        monkeypatch.setattr(
            system._objects,
            "names",
            lambda folder: [*names(folder), *["journal/a-0001/999.jsonl"][: folder.startswith("journal")]],
        )
        with pytest.raises(DamagedError, match=r"found journal/a-0001/999\.jsonl listed in .*, and no such object"):
            system.journals("a")
    assert 10 < len(waits) < 1000


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where mounting is permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("full", ["the disk of the working copy", "the share"])
def test_a_full_disk_costs_nothing_that_was_finished(tmp_path, small_disk, full):
    """Room is made again and again, until it is enough."""
    plan = small_plan(rounds=1)
    copy, share = (small_disk, tmp_path / "share") if full.endswith("copy") else (tmp_path / "copy", small_disk)
    filler = [small_disk / f"filler-{number}" for number in range(250)]
    with contextlib.suppress(OSError):
        for file in filler:
            file.write_bytes(bytes(4000))
    errors = []
    system = None
    with machine(copy):
        while system is None:
            try:
                system = evolve_tasks(share.as_uri(), "a", plan)
            except SystemFolderError as error:
                errors.append(str(error))
                for _ in range(len(errors)):
                    filler.pop().unlink(missing_ok=True)
        assert lineage_hash(system) == lineage_hash(evolve_tasks(tmp_path / "folder", "a", plan))
        assert verify(system) == []
    assert all("No space left on device" in error for error in errors)
    assert len(errors) > 3
    with machine(tmp_path / "there"):
        assert lineage_hash(System.open(share.as_uri())) == lineage_hash(system)


def test_a_store_that_stays_away_costs_no_training(tmp_path, here, monkeypatch):
    store = tmp_path / "mount" / "store"
    expected = lineage_hash(evolve_tasks(tmp_path / "folder", plan=small_plan(rounds=1)))
    store.parent.mkdir()
    monkeypatch.setenv("MUNET_STORE_PATIENCE", "0")
    with pytest.raises(
        StoreError, match="did not answer for 0 seconds.*run again once it can be: nothing that was finished is lost"
    ):
        evolve_tasks(
            store.as_uri(),
            plan=small_plan(rounds=1),
            trainer=InterruptedTrainer(2, lambda: store.parent.rename(tmp_path / "away")),
        )
    (tmp_path / "away").rename(store.parent)
    trainer = FakeTrainer()
    system = evolve_tasks(store.as_uri(), plan=small_plan(rounds=1), trainer=trainer)
    assert lineage_hash(system) == expected
    assert sum(len(plan.children) for plan in trainer.plans) == 2 * 8 - 3
