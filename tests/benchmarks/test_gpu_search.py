"""The script for a GPU machine that searches piece by piece, tried on the CPU."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from tests.support.processes import TOP, environment

EXPERIMENT = """
[search]
rounds = 1
children_per_task = 2
generation_size = 2

[training]
batch_size = 32
intervals = 1
batches_per_interval = 2
threads = 1

[[tasks]]
name = "digits"
source = "digits"
"""


def search(python, folder, seconds):
    work, out = folder / "work", folder / "out"
    out.mkdir(exist_ok=True)
    experiment = folder / "experiment.toml"
    experiment.write_text(EXPERIMENT)
    # The script takes the machine's own Python.
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "python3").unlink(missing_ok=True)
    (folder / "bin" / "python3").symlink_to(python)
    path = os.pathsep.join([str(folder / "bin"), os.environ["PATH"]])
    variables = {
        "PATH": path,
        "WORK": str(work),
        "OUT": str(out),
        "DEVICE": "cpu",
        "SECONDS_A_CALL": str(seconds),
        "SITE": str(folder),
    }
    command = [TOP / "benchmarks" / "gpu" / "search.sh", folder, experiment]
    done = subprocess.run(command, env=environment() | variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr, out


@pytest.mark.slow
def test_it_says_to_call_again_until_it_is_finished(tmp_path, warm_python):
    status, said, _ = search(warm_python, tmp_path, 0.1)
    assert (status, "call again" in said) == (75, True), said
    status, said, out = search(warm_python, tmp_path, 250)
    assert status == 0, said
    assert "every layer and path is as it was written" in said
    (task,) = json.loads((out / "search.json").read_text())["tasks"]
    assert task["rounds"] == 1


def test_an_error_is_no_reason_to_call_again(tmp_path, warm_python):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "system").write_text("no folder")
    status, said, _ = search(warm_python, tmp_path, 250)
    assert (status, "call again" in said) == (2, False), said
