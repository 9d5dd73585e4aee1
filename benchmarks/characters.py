"""The characters benchmark: a search beside its baselines on eight tasks, in equal training steps. Q1, Q2, Q3 and Q8.

    python -m benchmarks.characters [--smoke] [--work DIR] [--minutes N] [--workers N] [--report-only] [--results benchmarks/results]

Tasks, splits and distortion are those of evolve/recipes/characters.toml; benchmarks/settings/ says how long everything trains. Runs, each
a `munet-evolve` process of its own: the search (with auto-tune), the further searches that the settings name (such as one with scale
control), full fine-tuning, `freeze:0` to `freeze:3`, `adapters:8`, `:32` and `:128`, and tuned baselines. Every seed: all searches,
fine-tuning, the best of each other kind and the best tuned baselines; the first seed alone: the rest. Whole comparisons come early.

It may be stopped at any moment, and `--minutes` stops it cleanly: the same command goes on where it was. What is there by then is reported,
and what is missing is named. `--workers` runs train at once, each with the threads of the settings; seconds are those of runs beside
each other.

Q1  mean test accuracy of the search minus that of full fine-tuning, in points, over the seeds that both have; `Q1 others` is the
    least margin over a baseline of another kind, with the default hyperparameters.
Q2  accounted parameters per task over those of full fine-tuning; `Q2 NAME` those of a further search, `Q2 NAME loss` its margin over
    fine-tuning.
Q8  mean test accuracy minus that of the best tuned baseline: random search over learning rate, warm-up and augmentation; `Q8 NAME` that
    of a further search.

Q3  when all is there: whether the logits of other tasks changed as the first search published task after task; see
    benchmarks.unchanged.

Prints a table, then JSON lines, the last one sums up. With --smoke it takes a few minutes and measures nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from benchmarks.comparison import (
    FINETUNE,
    SEARCH,
    TUNED,
    Run,
    TaskOutcome,
    best_of,
    figures_of,
    is_search,
    rows_of,
    table_of,
)
from benchmarks.reporting import TOP, Report, add_arguments
from evolve.config import Experiment, Settings, load_settings
from evolve.journal import child_records, read_journal
from evolve.report.baselines import read_baselines
from evolve.store import System
from evolve.summary import summarise

RECIPE = TOP / "evolve" / "recipes" / "characters.toml"
SETTINGS = pathlib.Path(__file__).parent / "settings"
WORK = TOP / ".benchmarks"
KINDS: Mapping[str, tuple[str, ...]] = {
    "freeze": ("freeze:0", "freeze:1", "freeze:2", "freeze:3"),
    "adapters": ("adapters:8", "adapters:32", "adapters:128"),
}
FIRST = (SEARCH, FINETUNE, "freeze:1", "adapters:32")


class BenchmarkSettings(Settings):
    """What a benchmark changes in the recipe.

    Attributes:
        seeds: how many, from 0.
        tasks: only these; all by default.
        tuned_replicas: draws of a tuned baseline, which share the steps of the search.
        kinds: which baselines beside fine-tuning; all by default.
        search: settings of the search that differ from the recipe's.
        training: settings of training that differ from the recipe's.
        searches: further searches, each in a system of its own: a name, and what differs from `search`.
    """

    seeds: int
    tuned_replicas: int
    tasks: tuple[str, ...] | None = None
    kinds: tuple[str, ...] = tuple(KINDS)
    search: dict[str, Any]
    training: dict[str, Any]
    searches: dict[str, dict[str, Any]]


def experiment_of(settings: BenchmarkSettings) -> dict[str, Any]:
    """Returns the recipe with what a benchmark changes in it, as `to_toml` takes it."""
    recipe = load_settings(RECIPE, Experiment).model_dump(mode="json", exclude_defaults=True)
    recipe["tasks"] = [task for task in recipe["tasks"] if settings.tasks is None or task["name"] in settings.tasks]
    for part in ("search", "training"):
        recipe[part] = {**recipe.get(part, {}), **getattr(settings, part)}
    return recipe


@dataclasses.dataclass(frozen=True)
class Job:
    """A method to run with a seed."""

    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, seed {self.seed}"


class Benchmark:
    """The runs of one settings file in one folder."""

    def __init__(self, settings: BenchmarkSettings, folder: pathlib.Path) -> None:
        """Prepares the folder.

        Raises:
            SystemExit: it holds runs of other settings.
        """
        self.settings = settings
        self.folder = folder
        recipe = self.experiment = experiment_of(settings)
        self.tasks = [str(task["name"]) for task in recipe["tasks"]]
        self.rounds = Experiment.model_validate(recipe).search.rounds
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / "experiment.json"
        content = json.dumps([recipe, settings.searches, settings.tuned_replicas], indent=1)
        if written.exists() and written.read_text() != content:
            raise SystemExit(f"{folder} holds runs of other settings: choose another --work, or remove it")
        written.write_text(content)

    def system(self, job: Job) -> pathlib.Path:
        """Returns the folder of a job's system; baselines are kept in that of the search."""
        return self.folder / f"seed-{job.seed}" / (job.method.rpartition(" ")[2] if is_search(job.method) else SEARCH)

    def command(self, job: Job) -> list[str]:
        """Writes the experiment of a job and returns the command that runs it or goes on with it."""
        system = self.system(job)
        changes = self.settings.searches.get(system.name, {})
        experiment = {**self.experiment, "seed": job.seed, "search": {**self.experiment["search"], **changes}}
        system.parent.mkdir(parents=True, exist_ok=True)
        file = system.with_suffix(".toml")
        file.write_text(to_toml(experiment))
        command = [sys.executable, "-m", "evolve.cli"]
        if is_search(job.method):
            return [*command, "run", str(file), "--system", str(system)]
        tune = ["--tune", "--replicas", str(self.settings.tuned_replicas)] if job.method.endswith(TUNED) else []
        return [*command, "baseline", str(file), "--system", str(system), "--method", job.method.removesuffix(TUNED), *tune]

    def run_of(self, job: Job) -> Run:
        """Returns what a job has given so far."""
        folder = self.system(job)
        outcomes: Iterator[TaskOutcome] = iter(())
        if System.exists(folder):
            outcomes = self._searched(folder) if is_search(job.method) else self._trained(folder, job)
        return Run(job.method, job.seed, tuple(outcomes), len(self.tasks))

    def _searched(self, folder: pathlib.Path) -> Iterator[TaskOutcome]:
        system = System.open(folder)
        records = system.tasks()
        summaries = {task.name: task for task in summarise(system).tasks}
        for name in self.tasks:
            if name not in records or records[name].rounds < self.rounds:
                continue
            journals = [read_journal(system.journal_file(name, number)) for number in range(self.rounds)]
            children = [child for records in journals for _, child in child_records(records)]
            yield TaskOutcome(
                task=name,
                quality=records[name].quality,
                test_accuracy=records[name].test_accuracy or 0.0,
                accounted_parameters=summaries[name].accounted_parameters,
                num_trained_images=sum(child["num_trained_images"] for child in children),
                flops=sum(child["flops"] for child in children),
                seconds=sum(sum(child["seconds"].values()) for child in children),
            )

    def _trained(self, folder: pathlib.Path, job: Job) -> Iterator[TaskOutcome]:
        baselines, _ = read_baselines(folder)
        finished = {base.task: base for base in baselines if base.method == job.method}
        for base in (finished[name] for name in self.tasks if name in finished):
            yield TaskOutcome(
                task=base.task,
                quality=base.quality,
                test_accuracy=base.test_accuracy or 0.0,
                accounted_parameters=base.accounted_parameters,
                num_trained_images=base.num_trained_images,
                flops=base.flops,
                seconds=base.train_seconds + base.evaluate_seconds,
            )

    # Order

    def jobs(self) -> list[Job]:
        """Returns all jobs that are known by now, in order. Which baselines every seed runs is known when the first seed's are there."""
        kinds = [KINDS[name] for name in self.settings.kinds]
        every = [method for kind in kinds for method in kind]
        searches = [f"{SEARCH} {name}" for name in self.settings.searches]
        first = [*(method for method in FIRST if method in (SEARCH, FINETUNE) or method in every), *searches]
        later = range(1, self.settings.seeds)
        jobs = [Job(method, 0) for method in first]
        jobs += [Job(method, seed) for seed in later for method in (SEARCH, FINETUNE, *searches)]
        jobs += [Job(FINETUNE + TUNED, 0), *(Job(method, 0) for method in every if method not in first)]
        runs = [self.run_of(job) for job in jobs if job.seed == 0]
        if not all(run.is_complete for run in runs):
            return jobs
        chosen = [best.method for name in self.settings.kinds if (best := best_of(rows_of(runs), tuned=False, kind=name))]
        jobs += [Job(method + TUNED, 0) for method in chosen]
        jobs += [Job(method, seed) for seed in later for method in (*chosen, FINETUNE + TUNED)]
        runs = [self.run_of(job) for job in jobs if job.seed == 0]
        best = best_of(rows_of(runs), tuned=True)
        if best is not None and all(run.is_complete for run in runs):
            jobs += [Job(best.method, seed) for seed in later if Job(best.method, seed) not in jobs]
        return jobs

    def runs(self) -> list[Run]:
        """Returns what every known job has given so far."""
        return [self.run_of(job) for job in self.jobs()]

    # Running

    def execute(self, workers: int, minutes: float) -> None:
        """Runs what is not complete, until all is or time is up.

        Raises:
            SystemExit: a run failed.
        """
        # A shell that starts this in the background lets it, and whatever it starts, ignore SIGINT: time would never be up.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        deadline = time.monotonic() + 60 * minutes
        running: dict[Job, subprocess.Popen[bytes]] = {}
        try:
            while time.monotonic() < deadline:
                for job in [job for job, process in running.items() if process.poll() is not None]:
                    status = running.pop(job).returncode
                    if status != 0 or not self.run_of(job).is_complete:
                        raise SystemExit(f"{job} ended with status {status}; see {self._log(job)}")
                    say(f"finished: {job}")
                if len(running) < workers:
                    waiting = [job for job in self.jobs() if job not in running and not self.run_of(job).is_complete]
                    for job in waiting[: workers - len(running)]:
                        say(f"started: {job}")
                        running[job] = self._start(job)
                    if not running:
                        return
                time.sleep(0.5)
            say("time is up; the same command goes on from here")
        finally:
            for process in running.values():
                process.send_signal(signal.SIGINT)
            for process in running.values():
                process.wait()

    def _start(self, job: Job) -> subprocess.Popen[bytes]:
        command = self.command(job)
        with self._log(job).open("ab") as log:
            # In a session of its own: a Ctrl-C reaches it once, from here.
            return subprocess.Popen(
                command,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(filter(None, (str(TOP), os.environ.get("PYTHONPATH")))),
                    "COLUMNS": "160",
                },
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _log(self, job: Job) -> pathlib.Path:
        return self.folder / f"seed-{job.seed}" / f"{job.method.replace(':', '-').replace(' ', '-')}.log"


def main() -> None:
    """Runs the benchmark, or goes on with it, and reports what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", type=pathlib.Path, metavar="FILE", help="how long to train; characters-cpu.toml by default")
    parser.add_argument("--work", type=pathlib.Path, metavar="DIR", help=f"where systems are kept; below {WORK.name}/ by default")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="N", help="stop cleanly after so long")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs at once (2)")
    parser.add_argument("--report-only", action="store_true", help="run nothing, say what is there")
    add_arguments(parser)
    arguments = parser.parse_args()
    file = arguments.settings or SETTINGS / f"characters-{'smoke' if arguments.smoke else 'cpu'}.toml"
    benchmark = Benchmark(load_settings(file, BenchmarkSettings), arguments.work or WORK / file.stem)
    report = Report("characters", arguments)
    if not arguments.report_only:
        benchmark.execute(arguments.workers, arguments.minutes)
    is_whole = report_runs(benchmark, report)
    if is_whole and not arguments.report_only:
        # Needs the server too; everything before it runs without.
        from benchmarks.unchanged import report_changes

        report_changes(System.open(benchmark.system(Job(SEARCH, 0))), report)
    report.finish(f"bundled root characters; {file.name}")


def report_runs(benchmark: Benchmark, report: Report) -> bool:
    """Reports the table, a line for each run, a line for each method, and the figures; tells whether no run is missing."""
    runs = benchmark.runs()
    rows = rows_of(runs)
    missing = [
        f"{run.method}, seed {run.seed} ({len(run.outcomes)} of {run.num_tasks} tasks)" for run in runs if not run.is_complete
    ]
    say(table_of(rows))
    if missing:
        say(f"PARTIAL, missing: {'; '.join(missing)}")
    for run in runs:
        if run.outcomes:
            report.line(**run.to_json())
    for row in rows:
        report.line(**row.to_json())
    report.line(partial=bool(missing), missing=missing)
    for figure in figures_of(runs):
        report.figure(figure.name, figure.value, figure.target, figure.note + ("; partial" if missing else ""))
    return not missing


def say(text: str, stream: TextIO = sys.stderr) -> None:
    """Prints what is for people; standard output is for the figures alone."""
    print(text, file=stream, flush=True)


def to_toml(values: Mapping[str, Any]) -> str:
    """Returns settings of scalars, tables of scalars and lists of such tables as TOML."""
    plain = {name: value for name, value in values.items() if not isinstance(value, dict | list)}
    tables = [(f"[{name}]", value) for name, value in values.items() if isinstance(value, dict)]
    tables += [(f"[[{name}]]", value) for name, rows in values.items() if isinstance(rows, list) for value in rows]
    return _pairs(plain) + "".join(f"\n{title}\n{_pairs(table)}" for title, table in tables)


def _pairs(values: Mapping[str, Any]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items() if value is not None)


if __name__ == "__main__":
    main()
