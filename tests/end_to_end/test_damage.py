"""Journals, layers and data that are not what they were: each is named, with what can be recovered and how, and exit status 2."""

from __future__ import annotations

import json
import pathlib
import shutil

import numpy as np
import pytest

from evolve.journal import Journal, read_journal
from evolve.lineage import lineage_hash
from evolve.store import System
from tests.end_to_end.conftest import SETTINGS
from tests.support.commands import Commands


@pytest.fixture(scope="module")
def finished(commands: Commands, experiment: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> System:
    """Task a closed, and task b; read only."""
    folder = tmp_path_factory.mktemp("finished") / "system"
    status, said = commands.run("run", experiment, "--system", folder, "--rounds", "1", "--task", "a", "--task", "b")
    assert status == 0, said
    return System.open(folder)


@pytest.fixture
def folder(finished: System, tmp_path: pathlib.Path) -> pathlib.Path:
    """The same with task b not yet published and its journal cut after four of six children."""
    folder = pathlib.Path(shutil.copytree(finished.folder, tmp_path / "system"))
    (folder / "tasks" / "b.json").unlink()
    lines = _journal(folder).read_bytes().splitlines(keepends=True)
    kept = lines[:7]
    assert [json.loads(line)["type"] for line in kept] == ["open", "generation", "pack", "pack", "pack", "generation", "pack"]
    _journal(folder).write_bytes(b"".join(kept))
    return folder


def _journal(folder: pathlib.Path) -> pathlib.Path:
    return folder / "journal" / "b-0001.jsonl"


def _run(experiment: pathlib.Path, folder: pathlib.Path, *more: str) -> tuple[str | pathlib.Path, ...]:
    return ("run", experiment, "--system", folder, "--rounds", "1", "--task", "a", "--task", "b", *more)


def _alter(file: pathlib.Path, line: int) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    lines[line - 1] = lines[line - 1].replace(b'"type"', b'"typf"')
    file.write_bytes(b"".join(lines))


def _error(commands: Commands, *arguments: str | pathlib.Path) -> str:
    """Runs a command that must fail with exit status 2 and returns the error."""
    status, said = commands.run(*arguments)
    assert status == 2, said
    assert "Traceback" not in said
    error = said.splitlines()[-1]
    assert error.startswith("error: found ")
    return error


def test_an_altered_journal_goes_on_from_what_is_whole(commands, experiment, finished, folder):
    _alter(_journal(folder), 5)
    before = _journal(folder).read_bytes()
    error = _error(commands, *_run(experiment, folder))
    assert error.startswith(
        f"error: found an altered line 5 in {_journal(folder)}; expected what was written; "
        "the 4 lines before it are whole (1 generation planned, 2 children finished): restore the file from a copy; without one, "
        "`munet-evolve run` with --recover keeps what is whole of an unfinished search and trains the rest again, "
        "--restart starts its round over"
    )
    assert _journal(folder).read_bytes() == before
    assert commands.run("verify", "--system", folder)[0] == 1
    status, said = commands.run(*_run(experiment, folder, "--recover"))
    assert status == 0, said
    aside = folder / "journal" / "removed" / "b-0001.1.jsonl"
    assert f"b: goes on from what is whole; the journal it had is {aside}" in said
    assert "b: round 1, 6 children from a, root, going on after 2" in said or "going on after 2" in said
    assert aside.read_bytes() == before
    assert lineage_hash(System.open(folder)) == lineage_hash(finished)


def test_an_altered_journal_can_be_started_over(commands, experiment, finished, folder):
    _alter(_journal(folder), 1)
    assert "no line before it is whole" in _error(commands, *_run(experiment, folder))
    status, said = commands.run(*_run(experiment, folder, "--restart"))
    assert status == 0, said
    assert f"b: starts over; the journal it had is {folder / 'journal' / 'removed' / 'b-0001.1.jsonl'}" in said
    assert "going on after" not in said
    assert lineage_hash(System.open(folder)) == lineage_hash(finished)
    # What is finished is not started over.
    status, said = commands.run(*_run(experiment, folder, "--restart"))
    assert (status, "nothing to do" in said) == (0, True)


def test_of_restart_and_recover_one_is_meant(commands, experiment, folder):
    error = _error(commands, *_run(experiment, folder, "--restart", "--recover"))
    assert error == "error: found --restart and --recover; expected one of them"


def test_a_truncated_journal_goes_on(commands, experiment, finished, folder):
    _journal(folder).write_bytes(_journal(folder).read_bytes()[:-100])
    status, said = commands.run(*_run(experiment, folder))
    assert status == 0, said
    assert "going on after 3" in said
    assert lineage_hash(System.open(folder)) == lineage_hash(finished)


def test_a_journal_of_another_system(commands, experiment, folder, tmp_path):
    other = tmp_path / "other"
    status, said = commands.run("run", experiment, "--system", other, "--rounds", "1", "--task", "b")
    assert status == 0, said
    shutil.copy(_journal(other), _journal(folder))
    ids = [json.loads((one / "system.json").read_text())["id"] for one in (other, folder)]
    expected = (
        f"found the journal of round 1 of task 'b' of system {ids[0]} in {_journal(folder)}; "
        f"expected that of round 1 of task 'b' of system {ids[1]}; put the right one back, "
        "or start an unfinished round over with `munet-evolve run` and --restart"
    )
    assert _error(commands, *_run(experiment, folder)) == f"error: {expected}"
    status, said = commands.run("verify", "--system", folder)
    assert (status, expected in said) == (1, True)
    assert commands.run(*_run(experiment, folder, "--restart"))[0] == 0


def test_a_journal_of_another_task(commands, experiment, folder):
    shutil.copy(folder / "journal" / "a-0001.jsonl", _journal(folder))
    error = _error(commands, *_run(experiment, folder))
    assert f"found the journal of round 1 of task 'a' of system {System.open(folder).id} in {_journal(folder)}" in error


def test_a_closed_journal_without_its_end_is_found_by_verify(commands, folder):
    file = folder / "journal" / "a-0001.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    status, said = commands.run("verify", "--system", folder)
    assert status == 1
    assert f"found no last record in {file}, though its round is closed" in said
    status, said = commands.run("show", "--system", folder)
    assert status == 0, said


def test_a_damaged_closed_journal_is_named_and_hinders_nobody(commands, experiment, folder):
    _alter(folder / "journal" / "a-0001.jsonl", 2)
    status, said = commands.run("show", "--system", folder)
    assert status == 0
    assert f"warning: no lineage: found an altered line 2 in {folder / 'journal' / 'a-0001.jsonl'}" in said
    assert "lineage unknown" in said
    assert commands.run("verify", "--system", folder)[0] == 1
    assert commands.run(*_run(experiment, folder))[0] == 0
    status, said = commands.run("gc", "--system", folder, "--delete")
    assert status == 0
    assert f"warning: left as it is: found an altered line 2 in {folder / 'journal' / 'a-0001.jsonl'}" in said


def _survivor(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """A layer that only a survivor of the unfinished search has, and its path's file."""
    system = System.open(folder)
    row = next(
        child for record in read_journal(_journal(folder)) if record["type"] == "pack" for child in record["children"][::-1]
    )
    path = system.path(row["path_id"])
    own = path.layer_ids - system.root.layer_ids - system.path(system.tasks()["a"].path_id).layer_ids
    return next(folder.glob(f"layers/*/{sorted(own)[0]}.safetensors")), folder / "paths" / f"{path.id}.json"


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing"])
def test_a_damaged_layer_of_an_unfinished_search(commands, experiment, finished, folder, damage):
    file, _ = _survivor(folder)
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(data[:-8] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    error = _error(commands, *_run(experiment, folder))
    assert str(file) in error
    assert "or start a search that has just trained it over with --restart" in error
    status, said = commands.run("verify", "--system", folder)
    # Once, though it is named by each path that uses it.
    assert (status, sum(str(file) in line for line in said.splitlines())) == (1, 1), said
    assert commands.run(*_run(experiment, folder, "--restart"))[0] == 0
    assert System.open(folder).check_layer(file.stem).id == file.stem
    assert lineage_hash(System.open(folder)) == lineage_hash(finished)


def test_an_altered_layer_of_another_task_is_not_searched_on_and_not_published(commands, experiment, folder, tmp_path):
    system = System.open(folder)
    own = system.path(system.tasks()["a"].path_id).layer_ids - system.root.layer_ids
    file = next(folder.glob(f"layers/*/{sorted(own)[0]}.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for arguments in (
        _run(experiment, folder),
        ("run", experiment, "--system", folder, "--rounds", "1", "--task", "c"),
        ("export", "--system", folder, "--repository", tmp_path / "repository"),
    ):
        error = _error(commands, *arguments)
        assert f"found altered weights in {file}" in error
        assert "`munet-evolve remove` the tasks whose paths use it and evolve them again" in error
    assert not (tmp_path / "repository" / "CURRENT").exists()


@pytest.mark.parametrize("is_closed", [False, True])
def test_data_that_changed_between_resume_points(commands, experiment, folder, tmp_path, is_closed):
    other = tmp_path / "other"
    shutil.copytree(experiment.parent, other)
    name = "a" if is_closed else "b"
    arrays = dict(np.load(other / f"{name}.npz"))
    arrays["images"][0, 0, 0, 0] ^= 1
    np.savez(other / f"{name}.npz", **arrays)
    changed = other / "experiment.toml"
    if is_closed:
        error = _error(commands, "run", changed, "--system", folder, "--task", "a")
        assert "found data of task 'a' with fingerprint " in error
        assert "what its current path was evolved on; use the same data, another task name, or `munet-evolve remove`" in error
        return
    before = _journal(folder).read_bytes()
    error = _error(commands, *_run(changed, folder))
    assert "found an unfinished search of task 'b' begun otherwise: data_fingerprint = '" in error
    assert error.endswith(
        "expected the data it began with; use those, or add --restart to start this round over with the new ones"
    )
    assert _journal(folder).read_bytes() == before
    assert commands.run(*_run(changed, folder, "--restart"))[0] == 0


def test_changed_settings_are_refused_before_data_are_loaded(commands, experiment, folder):
    changed = experiment.with_name("changed.toml")
    changed.write_text(SETTINGS.replace("mutation_rate = 0.3", "mutation_rate = 0.2").replace("b.npz", "gone.npz"))
    error = _error(commands, *_run(changed, folder))
    assert "found an unfinished search of task 'b' begun otherwise: settings.search.mutation_rate = 0.3 then and 0.2 now" in error
    assert error.endswith("go back to that, or add --restart to start this round over")
    changed.write_text(SETTINGS.replace("mutation_rate = 0.3", "mutation_rate = 0.2"))
    assert commands.run(*_run(changed, folder, "--restart"))[0] == 0
    assert read_journal(_journal(folder))[0]["settings"]["search"]["mutation_rate"] == 0.2


def test_restart_waits_for_nobody(commands, experiment, folder):
    with System.open(folder).locks.evolving("b"):
        assert "another process at work on task 'b'" in _error(commands, *_run(experiment, folder, "--restart"))
    assert _journal(folder).exists()


def test_gc_without_delete_says_what_it_would_do(commands, experiment, folder):
    status, said = commands.run("gc", "--system", folder)
    assert status == 0
    assert "1 journal to compress: " in said
    assert "kept for searches that are not finished: what journal/b-0001.jsonl names" in said
    assert said.splitlines()[-1].startswith("would free ")
    status, said = commands.run("gc", "--system", folder, "--json")
    would = json.loads(said)
    assert would["deleted"] is False
    status, said = commands.run("gc", "--system", folder, "--delete")
    assert said.splitlines()[-1] == f"freed {would['num_bytes']:,} bytes"
    assert "1 journal compressed: " in said
    assert commands.run("gc", "--system", folder)[1].splitlines()[-1] == "would free 0 bytes; --delete does it"
    assert "found no system" in _error(commands, "gc", "--system", folder / "nowhere")


def test_gc_refuses_where_an_unfinished_journal_cannot_be_read(commands, folder):
    _alter(_journal(folder), 3)
    assert f"found an altered line 3 in {_journal(folder)}" in _error(commands, "gc", "--system", folder, "--delete")


def test_an_old_journal_that_was_compressed_by_hand_is_gone_on_with(commands, experiment, finished, folder):
    from evolve.journal import compress_journal

    compress_journal(_journal(folder))
    assert commands.run(*_run(experiment, folder))[0] == 0
    assert lineage_hash(System.open(folder)) == lineage_hash(finished)
    Journal(_journal(folder)).close()
