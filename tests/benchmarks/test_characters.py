"""The characters benchmark, tiny: stopped, gone on with, reported in part and whole."""

from __future__ import annotations

import json
import pathlib
import subprocess
import tomllib
from typing import Any

import pytest

from benchmarks.characters import SETTINGS, Benchmark, BenchmarkSettings, Job, to_toml
from evolve.config import Experiment, load_settings
from tests.support.processes import TOP, environment

TIMEOUT_SECONDS = 900
TINY = """
seeds = 1
tuned_replicas = 2
tasks = ["digits"]
kinds = []
[search]
rounds = 1
children_per_task = 2
generation_size = 2
[training]
intervals = 1
batches_per_interval = 2
threads = 1
device = "cpu"
[searches.scaled]
scale_factor = 0.5
"""


@pytest.fixture
def tiny(tmp_path: pathlib.Path) -> pathlib.Path:
    file = tmp_path / "tiny.toml"
    file.write_text(TINY)
    return file


def _benchmark(python: pathlib.Path, tiny: pathlib.Path, *arguments: str) -> list[dict[str, Any]]:
    command = [str(python), "-m", "benchmarks.characters", "--settings", str(tiny), "--work", str(tiny.parent / "work")]
    done = subprocess.run(
        [*command, *arguments],
        cwd=TOP, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_it_goes_on_where_it_was_stopped_and_says_what_is_missing(tiny, warm_python):
    methods = ("search", "search scaled", "finetune", "finetune (tuned)")
    first = _benchmark(warm_python, tiny, "--minutes", "0")
    assert first[-2]["partial"] is True
    assert sorted(first[-2]["missing"]) == sorted(f"{method}, seed 0 (0 of 1 tasks)" for method in methods)
    assert first[-1]["summary"] == {}
    # How far it gets in a second is the machine's: what is not reported is missing, however many that are.
    stopped = _benchmark(warm_python, tiny, "--minutes", "0.02")
    reported = {line["run"] for line in stopped if "run" in line}
    missing = {name.partition(",")[0] for line in stopped for name in line.get("missing", ())}
    assert (reported | missing, reported & missing) == (set(methods), set())
    lines = _benchmark(warm_python, tiny, "--results", str(tiny.parent / "results"), "--hardware", "Some 1 CPU")
    assert {"partial": False, "missing": []} in lines
    runs = {(line["run"], line["seed"]) for line in lines if "run" in line}
    assert runs == {(method, 0) for method in methods}
    images = {line["num_trained_images"] for line in lines if "run" in line}
    assert images == {2 * 2 * 64}, "the same number of steps for all"
    assert {"Q1", "Q2", "Q2 scaled", "Q2 scaled loss", "Q8", "Q8 parameters"} <= lines[-1]["summary"].keys()
    (written,) = (tiny.parent / "results").iterdir()
    assert [json.loads(line) for line in written.read_text().splitlines()] == lines
    assert lines[-1]["summary"].pop("Q3")["value"] == 0
    again = _benchmark(warm_python, tiny, "--report-only", "--hardware", "Some 1 CPU")
    assert again == [line for line in lines if line.get("figure") != "Q3"]


def test_other_settings_in_the_same_folder_are_refused(tiny, tmp_path):
    settings = load_settings(tiny, BenchmarkSettings)
    Benchmark(settings, tmp_path / "work")
    Benchmark(settings, tmp_path / "work")
    with pytest.raises(SystemExit, match="other settings"):
        Benchmark(settings.model_copy(update={"searches": {"scaled": {"scale_factor": 0.9}}}), tmp_path / "work")


@pytest.mark.parametrize("name", [file.stem for file in sorted(SETTINGS.glob("characters-*.toml"))])
def test_settings_change_lengths_alone_and_whole_comparisons_come_first(name, tmp_path):
    settings = load_settings(SETTINGS / f"{name}.toml", BenchmarkSettings)
    benchmark = Benchmark(settings, tmp_path / "work")
    recipe = load_settings(TOP / "evolve" / "recipes" / "characters.toml", Experiment)
    jobs = benchmark.jobs()
    assert [job.method for job in jobs[:5]] == ["search", "finetune", "freeze:1", "adapters:32", "search scaled"]
    for job in (Job("search", 2), Job("search scaled", 0), Job("freeze:1", 1), Job("finetune (tuned)", 0)):
        command = benchmark.command(job)
        written = load_settings(pathlib.Path(command[4]), Experiment)
        assert written.seed == job.seed
        assert written.defaults == recipe.defaults
        assert written.root == recipe.root
        assert all(task in recipe.tasks for task in written.tasks)
        assert written.search.auto_tune
        assert written.search.scale_factor == (0.7 if job.method == "search scaled" else 1)
        assert ("--tune" in command) == job.method.endswith("(tuned)")
    if name != "characters-smoke":
        assert written.tasks == recipe.tasks


def test_settings_are_written_as_toml():
    values = {
        "seed": 3,
        "search": {"auto_tune": True, "rate": 0.1},
        "tasks": [{"name": 'a "b"'}, {"name": "c", "max_classes": 2}],
    }
    assert tomllib.loads(to_toml(values)) == values
    assert tomllib.loads(to_toml({"left_out": None, "kept": 1})) == {"kept": 1}
