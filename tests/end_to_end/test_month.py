"""A simulated month: 200 jobs on one system from several machines with only the store between them, killed at random.

By hand, more of it, and elsewhere:

    MUNET_TEST_JOBS=200 python -m pytest tests/end_to_end/test_month.py -k s3
"""

from __future__ import annotations

import os
import pathlib
import random

import pytest

from evolve.store import System
from tests.support.jobs import Jobs
from tests.support.month import Audit, Month
from tests.support.stores import BUCKET, machine, s3_server, use_s3

NUM_JOBS = {"folder": 24, "file": 200, "s3": 10}


@pytest.fixture(params=sorted(NUM_JOBS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def location(kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """Of a system that is not there yet: a folder with its locks, and two stores without any."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    if kind == "s3":
        with s3_server() as address:
            use_s3(monkeypatch, address)
            yield f"s3://{BUCKET}/month"
    else:
        yield str(tmp_path / "system") if kind == "folder" else (tmp_path / "store").as_uri()


@pytest.mark.timeout(1200)
def test_a_month_of_jobs_keeps_every_invariant(kind: str, location: str, tmp_path: pathlib.Path) -> None:
    num_jobs = int(os.environ.get("MUNET_TEST_JOBS", NUM_JOBS[kind]))
    machines = [tmp_path / f"machine-{number}" for number in range(3)]
    with Jobs(tmp_path / "errors.txt") as jobs:
        month = Month(jobs, location, machines, seed=int(os.environ.get("MUNET_TEST_SEED", "0")))
        month.run(num_jobs, most_kills=num_jobs // 2)
    print(f"{num_jobs} jobs, {month.num_killed} killed, {month.num_told} told of another")
    assert month.num_killed > num_jobs // 8
    with machine(tmp_path / "witness"):
        audit = Audit(System.open(location), month)
        audit.check()
        chosen = random.Random(1).sample(sorted(month.jobs), k=min(6, num_jobs))
        for task, number in chosen:
            audit.check_rerun(task, number, tmp_path / "again" / f"{task}-{number}")
