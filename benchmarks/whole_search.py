"""What training a generation together, and side by side, saves of a whole search's time: W1, W2 and W3.

    python -m benchmarks.whole_search [--smoke] [--repetitions N] [--results benchmarks/results]

Runs `munet-evolve run` on two tasks of the characters benchmark with its settings for two CPU cores, 20 children each, in turns with
the ways that a generation can be trained. Wall time is of the searches, from their opening to their last record, as their journals say:
training, validation and all that lies between. Start-up, the same for all, is not in it.

    before        children one by one in one process: all there was at first
    together      `pack_size` = the generation: what children share is computed once
    side by side  `workers` = the CPUs: packs of one child, each in a process of its own
    two threads   children one by one, two threads for each: what the second core gives without several processes

W1  before / together.
W2  before / side by side.
W3  whether `side by side` came to the lineage hash of `before`, 1 or 0: workers are no part of a result. Packs and threads are: sums are
    taken in another order, which moves a weight's last bits. Their qualities are in the lines.

No target was set beforehand: the bounds say what would be worth having. Prints JSON lines, the last one sums up; without --smoke it takes
about 6 minutes on two cores. --smoke leaves out `together` and `two threads`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import tempfile
from collections.abc import Mapping
from typing import Any

from benchmarks.characters import SETTINGS, BenchmarkSettings, experiment_of, to_toml
from benchmarks.reporting import Ratio, Report, Target, add_arguments, rounded
from benchmarks.search import Spent, run, spent_of
from evolve.config import load_settings
from evolve.lineage import lineage_hash
from evolve.store import System

TASKS = ("digits", "greek")
CHILDREN = 20


@dataclasses.dataclass(frozen=True)
class Searched:
    """What one way of training took and gave.

    Attributes:
        spent: seconds of all its searches.
        qualities: of the paths they closed with, by task, 0 to 1.
        lineage: its hash.
    """

    spent: Spent
    qualities: Mapping[str, float]
    lineage: str

    def to_json(self) -> dict[str, Any]:
        """Returns what a line says of it."""
        qualities = {name: rounded(quality) for name, quality in self.qualities.items()}
        return {**self.spent.to_json(), "qualities": qualities, "lineage": self.lineage}


def main() -> None:
    """Runs the searches and prints what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2, metavar="N", help="searches of each way")
    add_arguments(parser)
    arguments = parser.parse_args()
    report = Report("whole_search", arguments)
    size = "smoke" if arguments.smoke else "cpu"
    experiment = experiment_of(load_settings(SETTINGS / f"characters-{size}.toml", BenchmarkSettings))
    names, children = (TASKS[:1], 4) if arguments.smoke else (TASKS, CHILDREN)
    experiment["tasks"] = [task for task in experiment["tasks"] if task["name"] in names]
    experiment["search"] = {**experiment["search"], "rounds": 1, "children_per_task": children}
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ways: dict[str, dict[str, Any]] = {
        "before": {},
        "together": {"pack_size": experiment["search"]["generation_size"]},
        "side by side": {"workers": cpus},
        "two threads": {"threads": 2},
    }
    if arguments.smoke:
        del ways["together"], ways["two threads"]
    found: dict[str, list[Searched]] = {way: [] for way in ways}
    for repetition in range(1 if arguments.smoke else arguments.repetitions):
        for way, changes in ways.items():
            searched = search({**experiment, "training": {**experiment["training"], **changes}})
            report.line(way=way, repetition=repetition, settings=changes, **searched.to_json())
            found[way].append(searched)
    walls = {way: [searched.spent.wall for searched in each] for way, each in found.items()}
    for way in [*ways][1:]:
        ratio = Ratio(walls["before"], walls[way])
        gained = [after - before for before, after in zip(*(qualities_of(found[one]) for one in ("before", way)), strict=True)]
        report.line(way=way, before_over_it=ratio.spread(), mean_quality_gained=rounded(statistics.mean(gained)))
    if "together" in walls:
        report.figure("W1", Ratio(walls["before"], walls["together"]).median, Target(">=", 1.0))
    report.figure(
        "W2", Ratio(walls["before"], walls["side by side"]).median, Target(">=", 0.75 * cpus), "three quarters of the CPUs"
    )
    hashes = {searched.lineage for way in ("before", "side by side") for searched in found[way]}
    report.figure("W3", float(len(hashes) == 1), Target(">=", 1.0))
    tasks = ", ".join(task["name"] for task in experiment["tasks"])
    report.finish(f"characters-{size}.toml: {tasks}; {json.dumps(experiment['search'])}")


def search(experiment: Mapping[str, Any]) -> Searched:
    """Runs an experiment on a new system, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="munet-whole-search-") as name:
        file, folder = pathlib.Path(name) / "experiment.toml", pathlib.Path(name) / "system"
        file.write_text(to_toml(experiment))
        run(file, folder, None)
        system = System.open(folder)
        spent = sum((spent_of(journal.file) for journal in system.journals()), Spent())
        return Searched(spent, {task: record.quality for task, record in system.tasks().items()}, lineage_hash(system))


def qualities_of(searched: list[Searched]) -> list[float]:
    """Returns the qualities of all tasks of some searches, in order."""
    return [quality for one in searched for _, quality in sorted(one.qualities.items())]


if __name__ == "__main__":
    main()
