"""The environment that the wheel's Triton runs in: made once, recognised when half-made, never over somebody else's files."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from server.errors import TritonEnvironmentError
from server.triton import environment
from server.triton.environment import find_environment, install
from server.triton.process import TritonProcess
from tests.server.triton.quick_install import HOLD
from tests.support.processes import TOP
from tests.support.processes import environment as variables
from tests.support.repository import SHORT, RepositoryBuilder, answer, random_images
from tests.support.triton import FOLDER, Caller, wait_until

RECORD = "munet-triton.json"


def test_a_killed_install_is_recognised_and_the_next_one_makes_it_whole(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "triton"
    command = [sys.executable, "-m", "tests.server.triton.quick_install", "triton", "install", "--into", str(folder)]
    killed = subprocess.Popen(command, cwd=TOP, env=variables() | {HOLD: ""}, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_until(lambda: (folder / "pyvenv.cfg").exists())
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    with pytest.raises(TritonEnvironmentError, match="found a half-made environment, expected a whole one; run `make triton`"):
        find_environment(folder)
    (folder / "left behind").touch()
    # Two at once: one makes it, the other waits and finds it.
    both = [subprocess.Popen(command, cwd=TOP, env=variables(), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(text.endswith(f"Triton's environment in {folder} is ready\n") for text in said)
    assert not (folder / "left behind").exists()
    builder = RepositoryBuilder(tmp_path / "repository")
    segments = [segment.name for segment in builder.read_manifest(builder.publish({"short": SHORT})).segments]
    images = random_images(2, 8)
    with TritonProcess(find_environment(folder), builder.root) as triton, Caller(triton.addresses.grpc) as caller:
        caller.load(*segments, "short")
        assert caller.infer("short", images)["logits"] == pytest.approx(answer(SHORT, images), abs=1e-4)


def test_what_is_whole_is_left_alone() -> None:
    record = FOLDER / RECORD
    before = record.stat().st_mtime_ns
    assert install(FOLDER) == find_environment(FOLDER)
    assert record.stat().st_mtime_ns == before


def test_packages_that_cannot_be_had_are_named_with_what_pip_said(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What only takes time: its pip is the one that runs the tests.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setattr(environment.venv, "create", lambda *_, **__: None)
    monkeypatch.setattr(environment, "REQUIREMENTS", ("./no-such-package",))
    made = environment.TritonEnvironment(tmp_path, "3.11", "")
    with pytest.raises(
        TritonEnvironmentError, match=r"(?s)found pip ended with status 1:.*expected \./no-such-package; see .*log"
    ):
        environment._install_packages(made)


def test_other_versions_are_no_environment(tmp_path: pathlib.Path) -> None:
    values = json.loads((FOLDER / RECORD).read_text())
    (tmp_path / RECORD).write_text(json.dumps(values | {"requirements": ["nvidia-pytriton==0.6.0"]}))
    with pytest.raises(TritonEnvironmentError, match="found an environment of other versions, expected nvidia-pytriton==0.7.0"):
        find_environment(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no json", b"[]"])
def test_a_damaged_record_is_no_environment(tmp_path: pathlib.Path, content: bytes) -> None:
    (tmp_path / RECORD).write_bytes(content)
    with pytest.raises(TritonEnvironmentError, match=f"found {RECORD} unreadable .*; run `make triton`"):
        find_environment(tmp_path)


def test_a_folder_of_somebody_else_is_refused_and_kept(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.txt").write_text("chapter 1")
    for use in (find_environment, install):
        with pytest.raises(TritonEnvironmentError, match="found a folder of something else"):
            use(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_no_folder(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(TritonEnvironmentError, match="expected a folder to make it in"):
        install(tmp_path / "file")


def test_other_machines_and_pythons_are_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.platform, "machine", lambda: "aarch64")
    with pytest.raises(TritonEnvironmentError, match="found linux on aarch64, expected Linux on x86_64; use a container"):
        install(tmp_path)
    monkeypatch.setattr(environment, "PYTHON_VERSIONS", ("3.9",))
    with pytest.raises(TritonEnvironmentError, match=r"found Python 3\.\d+, expected Python 3\.9"):
        install(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_python_without_a_shared_library_is_told(tmp_path: pathlib.Path) -> None:
    found = find_environment(FOLDER)
    # The wheel has a stub for a Python as old as this, and no machine has that.
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "python3.8").symlink_to(found.folder / "lib" / f"python{found.python_version}")
    old = environment.TritonEnvironment(tmp_path, "3.8", found.library_folder)
    with pytest.raises(
        TritonEnvironmentError, match=r"libpython3\.8\.so.*expected a shared libpython3\.8; .*apt install libpython3\.8"
    ):
        environment._copy_backends(old)


def test_the_backend_is_that_of_this_package(tmp_path: pathlib.Path) -> None:
    found = find_environment(FOLDER)
    copy = environment.TritonEnvironment(tmp_path, found.python_version, found.library_folder)
    shutil.copytree(found.backends / "onnxruntime", tmp_path / "backends" / "onnxruntime")
    model = copy.backends / "onnxruntime" / "model.py"
    model.write_text("old")
    copy.refresh()
    assert model.read_text() == (TOP / "server" / "triton" / "backend" / "model.py").read_text()


def test_nothing_of_the_callers_python_leaks_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
        monkeypatch.setenv(name, "/elsewhere")
    found = find_environment(FOLDER).variables()
    assert not {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"} & found.keys()
    assert found["PATH"].startswith(str(FOLDER.resolve() / "bin"))
