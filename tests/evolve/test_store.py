"""A system on disk: content-addressed, atomic, verified."""

import errno
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from evolve import store
from evolve.documents import TaskRecord
from evolve.errors import BusyError, DamagedError, SystemFolderError
from evolve.layer import HEAD, POS_EMBED, LayerKind, LayerSpec
from evolve.store import System
from evolve.verification import verify
from tests.support.fake_trainer import WIDTH, derive_path, tiny_root
from tests.support.permissions import read_only

SPEC = LayerSpec.of(LayerKind.NORM, width=WIDTH)


@pytest.fixture
def system(tmp_path):
    return System.create(tmp_path / "system", tiny_root(), 32, {"source": "test"})


def _record(system: System, name: str, **changes) -> TaskRecord:
    values = {
        "name": name,
        "path_id": system.root.id,
        "parent_id": system.root.id,
        "num_children": 0,
        "rounds": 1,
        "order": 1,
        "private": False,
        "labels": ("a", "b"),
        "quality": 0.5,
        "test_accuracy": None,
        "examples": system.put_examples(np.zeros((1, 32, 32, 3), dtype=np.uint8)),
        "data_fingerprint": "f",
        "settings": {},
    }
    return TaskRecord(**{**values, **changes})


def test_what_was_created_opens_again(system):
    opened = System.open(system.folder)
    assert opened.root == system.root
    assert opened.id == system.id
    assert opened.root_source == {"source": "test"}
    assert verify(opened) == []


def test_layers_are_stored_once_and_come_back_bit_by_bit(system):
    weights = {"weight": np.array([1.0, -0.0, np.float32(1e-38), 3.5], dtype=np.float32)}
    layer = system.put_layer(SPEC, weights)
    file = next((system.folder / "layers").glob(f"*/{layer.id}.safetensors"))
    stamp = file.stat().st_mtime_ns
    assert system.put_layer(SPEC, weights) == layer
    assert file.stat().st_mtime_ns == stamp
    again = System.open(system.folder)
    assert again.layer(layer.id) == layer
    assert again.tensors(layer.id)["weight"].tobytes() == weights["weight"].tobytes()


def test_weights_in_another_memory_layout_are_the_same_layer(system):
    weights = np.arange(8, dtype=np.float32).reshape(2, 4)
    one = system.put_layer(SPEC, {"weight": weights})
    assert system.put_layer(SPEC, {"weight": np.asfortranarray(weights)}) == one
    assert verify(system) == []


def test_resampled_position_embeddings_are_one_per_size_and_the_native_one_is_itself(system):
    native = system.root.layer(POS_EMBED)
    assert system.position_embedding(2) == native
    resampled = system.position_embedding(3)
    assert System.open(system.folder).position_embedding(3) == resampled
    weight, native_weight = system.tensors(resampled.id)["weight"], system.tensors(native.id)["weight"]
    assert weight.shape == (10, WIDTH)
    np.testing.assert_array_equal(weight[0], native_weight[0])
    # Corners aligned: corners stay, the middle is the mean of the four.
    np.testing.assert_allclose(weight[[1, 3, 7, 9]], native_weight[1:], rtol=1e-6)
    np.testing.assert_allclose(weight[5], native_weight[1:].mean(axis=0), rtol=1e-5, atol=1e-7)


def test_verify_names_every_damaged_file(system):
    system.put_task(_record(system, "odd"))
    layer = system.put_layer(SPEC, {"weight": np.ones(4, dtype=np.float32)})
    file = next((system.folder / "layers").glob(f"*/{layer.id}.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    path_file = next((system.folder / "paths").glob("*.json"))
    path_file.write_text(path_file.read_text().replace('"image_size": 32', '"image_size": 48'))
    findings = verify(system)
    assert any(layer.id in finding for finding in findings)
    assert any("path" in finding and system.root.id in finding for finding in findings)


def test_missing_layers_are_damage(system):
    for file in (system.folder / "layers").glob("*/*.safetensors"):
        file.unlink()
    with pytest.raises(DamagedError, match="no readable layer"):
        System.open(system.folder)


def test_removing_a_task_hands_its_parent_on(system):
    system.put_task(_record(system, "one", path_id="p1", parent_id="p0"))
    system.put_task(_record(system, "two", path_id="p2", parent_id="p1"))
    system.remove_task("one")
    assert list(system.tasks()) == ["two"]
    assert system.tasks()["two"].parent_id == "p0"


def test_removing_an_unknown_task_names_the_known_ones(system):
    system.put_task(_record(system, "one"))
    with pytest.raises(SystemFolderError, match=r"no task 'onne'.*\['one'\]"):
        system.remove_task("onne")


def test_a_second_system_in_the_same_folder_is_refused(system):
    with pytest.raises(SystemFolderError, match="choose another folder"):
        System.create(system.folder, tiny_root(), 32)


def test_a_newer_format_is_refused(system):
    document = json.loads((system.folder / "system.json").read_text())
    (system.folder / "system.json").write_text(json.dumps({**document, "format": 99}))
    with pytest.raises(SystemFolderError, match="format 99.*expected format 1"):
        System.open(system.folder)


def test_a_folder_without_a_system_is_refused(tmp_path):
    with pytest.raises(SystemFolderError, match="found no system"):
        System.open(tmp_path)


def test_a_full_disk_leaves_nothing_half_written(system, monkeypatch):
    before = sorted(system.folder.rglob("*"))

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SystemFolderError, match="No space left on device.*writable folder with free space"):
        system.put_path(
            store.Path.of(
                task=None, layers=system.root.layers, hyperparameters=system.root.hyperparameters, parent_id="x", quality=None
            )
        )
    assert sorted(system.folder.rglob("*")) == before


def test_two_processes_cannot_evolve_one_task(system):
    script = (
        "import pathlib, sys, time\n"
        "from evolve.store import System\n"
        "with System.open(pathlib.Path(sys.argv[1])).locks.evolving('digits'):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(system.folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "held"
        with pytest.raises(BusyError, match="another process at work on task .digits."), system.locks.evolving("digits"):
            pass
        with system.locks.evolving("other"):
            pass
        process.kill()
        process.wait()
        with system.locks.evolving("digits"):
            pass


def test_nothing_but_whole_files_is_left_by_a_kill_while_writing(tmp_path):
    script = (
        "import pathlib, sys, itertools, numpy as np\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from evolve.store import System\n"
        "from evolve.layer import LayerKind, LayerSpec\n"
        "from tests.support.fake_trainer import tiny_root\n"
        "system = System.create(pathlib.Path(sys.argv[1]), tiny_root(), 32)\n"
        "print('ready', flush=True)\n"
        "for i in itertools.count():\n"
        "    system.put_layer(LayerSpec.of(LayerKind.NORM, width=4), {'weight': np.full(50_000, i, dtype=np.float32)})\n"
    )
    folder = tmp_path / "system"
    here = str(pathlib.Path(__file__).parents[2])
    with subprocess.Popen([sys.executable, "-c", script, str(folder), here], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        while len(list((folder / "layers").glob("*/*.safetensors"))) < 12:
            pass
        process.kill()
    assert verify(System.open(folder)) == []


def test_two_processes_that_create_one_system_agree_on_one(tmp_path):
    script = (
        "import pathlib, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "from evolve.errors import SystemFolderError\n"
        "from evolve.store import System\n"
        "from tests.support.fake_trainer import tiny_root\n"
        "sys.stdin.read(1)\n"
        "try:\n"
        "    system = System.create(pathlib.Path(sys.argv[1]), tiny_root(int(sys.argv[3])), 32)\n"
        "    print(system.id, system.root.id)\n"
        "except SystemFolderError as error:\n"
        "    print(error)\n"
    )
    here = str(pathlib.Path(__file__).parents[2])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "system"), here, str(blocks)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for blocks in (2, 3)
    ]
    outputs = [process.communicate("x")[0].strip() for process in processes]
    opened = System.open(tmp_path / "system")
    assert f"{opened.id} {opened.root.id}" in outputs
    assert any("found a system in" in output for output in outputs)
    assert verify(opened) == []


def test_an_unfinished_search_can_be_removed_too(system):
    system.journal_file("a", 0).parent.mkdir()
    system.journal_file("a", 0).touch()
    system.remove_task("a")
    assert not system.journal_file("a", 0).exists()
    with pytest.raises(SystemFolderError, match="no task 'a'"):
        system.remove_task("a")


def test_verify_reads_the_journals(system):
    file = system.journal_file("a", 0)
    file.parent.mkdir()
    file.write_text("no record\n")
    assert any("altered line 1" in finding for finding in verify(system))


def test_a_task_that_is_removed_while_tasks_are_read_is_left_out(system, monkeypatch):
    for name in ("one", "two"):
        system.put_task(_record(system, name))
    read = System._read_task

    def removed_in_between(self, file):
        if file.stem == "two":
            file.unlink(missing_ok=True)
        return read(self, file)

    monkeypatch.setattr(System, "_read_task", removed_in_between)
    assert list(system.tasks()) == ["one"]


def test_verify_finds_nothing_wrong_with_what_changes_meanwhile(system, monkeypatch):
    """Another process closes a round between two reads: it hands the parent on, then replaces its path."""
    child, parent, newer = (
        derive_path(system, system.root, name, {HEAD: weight}) for name, weight in (("a", 1.0), ("b", 2.0), ("b", 3.0))
    )
    for path in (child, parent, newer):
        system.put_path(path)
    system.put_task(_record(system, "a", path_id=child.id, parent_id=parent.id))
    system.put_task(_record(system, "b", path_id=parent.id))
    assert verify(system) == []
    is_closed = []

    def closed_at_last(self, file, read=System._read_task):
        record = read(self, file)
        if file.stem == "a" and not is_closed:
            is_closed.append(True)
            system.replace_parent(parent.id, system.root.id)
            system.put_task(_record(system, "b", path_id=newer.id))
        return record

    monkeypatch.setattr(System, "_read_task", closed_at_last)
    assert verify(system) == []
    assert system.tasks()["a"].parent_id == system.root.id
    system.put_task(_record(system, "a", path_id=child.id, parent_id=parent.id))
    assert any("as the parent of task 'a'" in finding for finding in verify(system)), "a real fault would be found"


def test_verify_reads_all_records_once_not_once_for_each_task(system, monkeypatch):
    names = [f"task-{number}" for number in range(8)]
    paths = {name: derive_path(system, system.root, name, {HEAD: float(number)}) for number, name in enumerate(names)}
    for name, parent in zip(names, [system.root.id, *(path.id for path in paths.values())], strict=False):
        system.put_path(paths[name])
        system.put_task(_record(system, name, path_id=paths[name].id, parent_id=parent))
    read = []

    def counted(self, file, inner=System._read_task):
        read.append(file.stem)
        return inner(self, file)

    monkeypatch.setattr(System, "_read_task", counted)
    assert verify(system) == []
    # Once for its own sake, once for whose parents are current, once to know which journals are closed.
    assert max(map(read.count, names)) <= 3


def test_a_folder_that_nobody_may_look_into(system):
    with read_only(system.folder):
        system.folder.chmod(0)
        with pytest.raises(SystemFolderError, match=f"could not read {system.folder} .Permission denied.; expected"):
            System.open(system.folder)
    assert verify(System.open(system.folder)) == []
