"""Disks that are full or read-only, and files of newer formats: every command says what it found, exits with 2 and leaves all whole."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
import safetensors.numpy

from evolve.store import System
from evolve.verification import verify
from server.client import AdminClient
from server.repository import Repository
from tests.end_to_end.conftest import SETTINGS
from tests.support.commands import Commands
from tests.support.permissions import read_only
from tests.support.processes import ServerProcess, server

RECIPE = """
scripts = ["GREEK"]
train_per_class = 1
validation_per_class = 1
width = 16
heads = 2
blocks = 1
steps = 1
batch_size = 2
threads = 1
device = "cpu"
"""


def tree(folder: pathlib.Path) -> dict[str, bytes]:
    """Content of every file, but for locks, which are empty."""
    files = (file for file in folder.rglob("*") if file.is_file() and not file.name.endswith(".lock"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def check_whole(folder: pathlib.Path) -> None:
    """Whatever a failure left of the system and the repository in a folder is whole, and there is nothing else."""
    assert not list(folder.rglob("*.part"))
    for journal in folder.rglob("*.jsonl"):
        assert journal.read_bytes()[-1:] in (b"", b"\n"), "a torn line was left"
    if System.exists(folder / "system"):
        assert verify(System.open(folder / "system")) == []
    if (folder / "repository" / "CURRENT").exists():
        Repository(folder / "repository").read()


@pytest.fixture(scope="module")
def pristine(commands: Commands, experiment: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A system of one task in `system`, published in `repository`; read only."""
    folder = tmp_path_factory.mktemp("pristine")
    status, said = commands.run(*run(experiment, folder))
    assert status == 0, said
    return folder


@pytest.fixture
def grown(pristine: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of it to change."""
    return pathlib.Path(shutil.copytree(pristine, tmp_path / "grown"))


def run(experiment: pathlib.Path, folder: pathlib.Path, task: str = "a", rounds: int = 1) -> tuple[str | pathlib.Path, ...]:
    where = ("--system", folder / "system", "--repository", folder / "repository")
    return ("run", experiment, *where, "--task", task, "--rounds", str(rounds))


@pytest.mark.parametrize("max_file_bytes", [1000, 3000, 10_000, 25_000])
def test_no_room_for_a_file_and_room_again(
    commands: Commands, experiment: pathlib.Path, tmp_path: pathlib.Path, max_file_bytes: int
) -> None:
    """From the first layer to the last segment: the larger the files may be, the later a write is cut short."""
    status, said = commands.run(*run(experiment, tmp_path), max_file_bytes=max_file_bytes)
    assert status == 2, said
    error = said.splitlines()[-1]
    assert error.startswith(("error: could not write", "error: could not publish to"))
    assert str(tmp_path) in error
    assert "(File too large); expected a writable folder with free space" in error
    check_whole(tmp_path)
    status, said = commands.run(*run(experiment, tmp_path))
    assert status == 0, said
    check_whole(tmp_path)


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 1 MB, where mounting is permitted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted; test_no_room_for_a_file_and_room_again needs no leave")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_and_a_less_full_one(commands: Commands, experiment: pathlib.Path, small_disk: pathlib.Path) -> None:
    """A run fails, room is made, and it goes on, until it is done."""
    filler = [small_disk / f"filler-{number}" for number in range(32)]
    for file in filler:
        file.write_bytes(bytes(32 * 1024 - 4096))
    (small_disk / "last").write_bytes(bytes(4096))
    places = set()
    for free in (0, 1, 2, 4, 6, 8, 10, 14, 32):
        for file in filler[:free]:
            file.unlink(missing_ok=True)
        status, said = commands.run(*run(experiment, small_disk))
        check_whole(small_disk)
        if status == 0:
            break
        error = said.splitlines()[-1]
        assert status == 2, said
        assert error.startswith(("error: could not write", "error: could not publish to"))
        assert str(small_disk) in error
        assert "(No space left on device); expected a writable folder with free space" in error
        places.add(error.split(" (")[0])
    assert status == 0, said
    assert len(places) >= 3, places
    assert commands.run("verify", "--system", small_disk / "system")[0] == 0


def test_a_folder_that_may_only_be_read(commands: Commands, experiment: pathlib.Path, grown: pathlib.Path) -> None:
    system, repository = grown / "system", grown / "repository"
    recipe = experiment.with_name("recipe.toml")
    recipe.write_text(RECIPE)
    before = tree(grown)
    with read_only(grown):
        for arguments, place in (
            (run(experiment, grown, "b"), system),
            (run(experiment, grown, "a", 2), system),
            (("remove", "--system", system, "--task", "a"), system),
            (("export", "--system", system, "--repository", repository), repository),
            (run(experiment, grown / "new"), grown / "new" / "system"),
            (("pretrain", recipe, "--out", grown / "root.safetensors"), grown / "root.safetensors"),
            (("pretrain", recipe, "--out", grown / "new" / "root.safetensors"), grown / "new" / "root.safetensors"),
        ):
            status, said = commands.run(*arguments)
            assert status == 2, said
            assert f"{place} (Permission denied); expected a" in said.splitlines()[-1]
            assert "Traceback" not in said
        # What only reads goes on.
        assert commands.run("verify", "--system", system)[0] == 0
        assert commands.run("show", "--system", system)[0] == 0
        assert commands.run("export", "--system", system, "--repository", grown.parent / "elsewhere")[0] == 0
    assert tree(grown) == before


def test_no_room_for_a_pretrained_root(commands: Commands, experiment: pathlib.Path, tmp_path: pathlib.Path) -> None:
    recipe = experiment.with_name("recipe.toml")
    recipe.write_text(RECIPE)
    out = tmp_path / "new" / "root.safetensors"
    status, said = commands.run("pretrain", recipe, "--out", out, max_file_bytes=5000)
    assert status == 2, said
    assert f"error: could not write {out} (File too large); expected a" in said
    assert list(out.parent.iterdir()) == []
    assert commands.run("pretrain", recipe, "--out", out)[0] == 0


def _renumber(file: pathlib.Path) -> None:
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "format": 2}))


def test_a_system_of_a_newer_format(commands: Commands, experiment: pathlib.Path, grown: pathlib.Path) -> None:
    system = grown / "system"
    _renumber(system / "system.json")
    before = tree(grown)
    for arguments in (
        run(experiment, grown, "b"),
        ("show", "--system", system),
        ("verify", "--system", system),
        ("remove", "--system", system, "--task", "a"),
        ("export", "--system", system, "--repository", grown / "repository"),
    ):
        status, said = commands.run(*arguments)
        assert status == 2
        assert (
            said == f"error: found a system of format 2 in {system}; expected format 1; use the version of munet that wrote it\n"
        )
    assert tree(grown) == before


def test_a_journal_of_a_newer_format(commands: Commands, experiment: pathlib.Path, grown: pathlib.Path) -> None:
    from evolve.journal import Journal

    file = grown / "system" / "journal" / "b-0001.jsonl"
    journal = Journal(file)
    journal.append("open", {"format": 2})
    journal.close()
    before = tree(grown)
    for arguments in (run(experiment, grown, "b"), ("verify", "--system", grown / "system")):
        status, said = commands.run(*arguments)
        assert status == 2
        assert said.endswith(
            f"found a journal of format 2 in {file}; expected format 1; use the version of munet that wrote it\n"
        )
    assert tree(grown) == before


def test_a_root_of_a_newer_format(commands: Commands, experiment: pathlib.Path, tmp_path: pathlib.Path) -> None:
    newer = experiment.with_name("newer.safetensors")
    safetensors.numpy.save_file({"x": np.zeros(1, np.float32)}, newer, {"format": "munet-root-2"})
    other = experiment.with_name("other-root.toml")
    other.write_text(SETTINGS.replace("root.safetensors", "newer.safetensors"))
    status, said = commands.run(*run(other, tmp_path))
    assert status == 2
    assert f"error: found format 'munet-root-2' in {newer}; expected munet-root-1; use the version of munet that wrote it" in said
    assert tree(tmp_path) == {}


def test_a_published_generation_of_a_newer_format(commands: Commands, grown: pathlib.Path) -> None:
    repository = grown / "repository"
    with ServerProcess(repository) as process, AdminClient(process.admin_address) as admin:
        newer = repository / "generation-2.json"
        shutil.copy(repository / "generation-1.json", newer)
        _renumber(newer)
        (repository / "CURRENT").write_text("2\n")
        before = tree(repository)
        message = f"{newer}: found format 2, expected at most 1; update this server before publishing for it"
        result = server("reload", "--admin", process.admin_address)
        assert result.returncode == 2
        assert message in result.stderr
        status = admin.status()
        assert status.generation == 1
        assert status.last_reload is not None
        assert message in status.last_reload.error
    for command in ("check", "serve"):
        result = server(command, "--repository", repository)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.endswith(f"munet-server: {message}\n")
    status, said = commands.run("export", "--system", grown / "system", "--repository", repository)
    assert status == 2
    assert f"found a generation of format 2 in {newer}; expected format 1; use the version of munet that wrote it" in said
    assert tree(repository) == before
