"""Atomic writes."""

import hashlib

import pytest

from munet.files import make_folder, sha256_of, write_atomically


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
