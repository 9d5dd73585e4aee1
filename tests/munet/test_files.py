"""Atomic writes."""

import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

from munet.files import make_folder, remove_unfinished, sha256_of, write_atomically


def test_writes_and_replaces(tmp_path):
    target = tmp_path / "new" / "file"
    write_atomically(target, b"one")
    write_atomically(target, b"two")
    assert target.read_bytes() == b"two"
    assert list(target.parent.iterdir()) == [target]
    assert sha256_of(target) == hashlib.sha256(b"two").hexdigest()


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_atomically(target, b"one")

    def fail(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(target, b"two")
    assert target.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [target]


def test_new_folders_are_made_durable_from_the_top(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr("munet.files.sync_folder", lambda folder: synced.append(folder))
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [tmp_path, tmp_path / "a"]


def test_a_folder_below_a_file_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        make_folder(tmp_path / "file" / "below" / "it")


def test_what_killed_writers_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    """Whatever any clock says: times of files may come from another machine."""
    write_atomically(tmp_path / "whole", b"whole")
    (tmp_path / ".not-ours").touch()
    script = (
        "import os, pathlib, sys, time\n"
        "from munet import files\n"
        "def stop(descriptor):\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "os.fsync = stop\n"
        "files.write_atomically(pathlib.Path(sys.argv[1]) / 'whole', b'never')\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    top = str(pathlib.Path(__file__).parents[2])
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": top}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        (unfinished,) = tmp_path.glob(".whole.*.part")
        os.utime(unfinished, (0, 0))
        remove_unfinished(tmp_path)
        assert unfinished.exists()
        process.kill()
    os.utime(unfinished, (1e10, 1e10))
    remove_unfinished(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".not-ours", "whole"]
    assert (tmp_path / "whole").read_bytes() == b"whole"


def test_who_tidies_up_between_the_making_of_a_file_and_its_lock_does_no_harm(tmp_path, monkeypatch):
    made = []
    mkstemp = tempfile.mkstemp

    def watched(**options):
        handle, name = mkstemp(**options)
        if not made:
            remove_unfinished(tmp_path)
        made.append(name)
        return handle, name

    monkeypatch.setattr(tempfile, "mkstemp", watched)
    write_atomically(tmp_path / "file", b"content")
    assert len(made) == 2
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"content"
