"""What a search costs beside training and validating: in time and in bytes.

    python -m benchmarks.search [--smoke] [--experiment FILE] [--results benchmarks/results]

Runs `munet-evolve run` on an experiment in a process of its own and a temporary folder, and reads the rest from the journals, the files and
the clock. The experiment is the demo's by default: four tasks (real handwritten digits, three rendered scripts), 16 children each, the
bundled root.

Q7  (wall - train - evaluate) / wall, summed over all searches. Wall is from the opening of a search to its last record, as its journal
    says; train and evaluate are what the children's records say, and evaluate holds the one look at the test split when a search closes.
    The lines also have the same for the whole command, which starts Python and torch, reads data and renders characters before any search.
Q6  Bytes that a task adds to the system's folder / bytes of a full checkpoint, the mean over the tasks; it may be the share of parameters
    of its own plus 2 %. Counted are the files that the task's current path needs and nobody else: its layers that neither the root nor
    another task uses, the path, the task's record, its example images and all its journals. The checkpoint is one safetensors file of a
    root of all its blocks with the task's head. The share is the parameters in the layers counted over those of the checkpoint. It is
    taken after `munet-evolve gc --delete`, which removes the layers of paths that were dropped and compresses the journals; what that
    freed is reported beside it.

Prints JSON lines, the last one sums up; without --smoke it takes about 5 minutes on two cores.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import safetensors.numpy

from benchmarks.reporting import TOP, Report, Target, add_arguments, rounded
from evolve.collecting import collect
from evolve.journal import child_records, read_journal
from evolve.layer import HEAD, POS_EMBED
from evolve.path import Path
from evolve.store import System

ALLOWANCE = 0.02
"""What a task may cost beyond its own parameters, as a share of a full checkpoint."""

SMOKE_EXPERIMENT = """
[search]
rounds = 1
children_per_task = 4
generation_size = 2
auto_tune = true

[training]
batch_size = 16
intervals = 2
batches_per_interval = 2
device = "cpu"

[[tasks]]
name = "digits"
source = "digits"
limit_per_class = 4

[[tasks]]
name = "hebrew"
source = "characters"
script = "HEBREW"
train_per_class = 2
validation_per_class = 2
test_per_class = 2
max_classes = 3
"""


def main() -> None:
    """Runs a search and prints what it cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", type=pathlib.Path, metavar="FILE", help="what to run; the demo's by default")
    parser.add_argument(
        "--profile", type=pathlib.Path, metavar="FILE", help="run it under cProfile; figures of time mean nothing then"
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    report = Report("search", arguments)
    with tempfile.TemporaryDirectory(prefix="munet-search-") as name:
        folder = pathlib.Path(name)
        experiment = arguments.experiment or TOP / "demo" / "experiment.toml"
        if arguments.smoke:
            experiment = folder / "smoke.toml"
            experiment.write_text(SMOKE_EXPERIMENT)
        seconds = run(experiment, folder / "system", arguments.profile)
        system = System.open(folder / "system")
        report_time(system, seconds, report)
        report_bytes(system, report)
        report.finish(f"root of {system.root.num_blocks} blocks, {system.root.num_parameters:,} parameters; {experiment.name}")


def run(experiment: pathlib.Path, folder: pathlib.Path, profile: pathlib.Path | None) -> float:
    """Runs munet-evolve and returns the seconds it took."""
    profiler = ["-m", "cProfile", "-o", str(profile)] if profile else []
    command = [sys.executable, *profiler, "-m", "evolve.cli", "run", str(experiment), "--system", str(folder)]
    started = time.perf_counter()
    # Standard output is for the figures alone.
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(TOP)}, stdout=sys.stderr, check=True)
    return time.perf_counter() - started


# Q7


@dataclasses.dataclass(frozen=True)
class Spent:
    """Seconds of one search or several.

    Attributes:
        wall: from opening to closing.
        train: of all children.
        evaluate: of all children's validation.
        examine: test accuracy and example images of the winner.
        children: how many.
    """

    wall: float = 0.0
    train: float = 0.0
    evaluate: float = 0.0
    examine: float = 0.0
    children: int = 0

    def __add__(self, other: Spent) -> Spent:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Spent(*(one + another for one, another in pairs))

    @property
    def other(self) -> float:
        """What is neither training nor evaluation."""
        return self.wall - self.train - self.evaluate - self.examine

    def to_json(self) -> dict[str, Any]:
        """Returns what a line says of it."""
        per_child = {
            "train": self.train / self.children,
            "evaluate": (self.evaluate + self.examine) / self.children,
            "other": self.other / self.children,
        }
        return {
            "children": self.children,
            "wall_seconds": rounded(self.wall),
            "seconds_per_child": {name: rounded(value) for name, value in per_child.items()},
            "examine_seconds": rounded(self.examine),
            "other_share": rounded(self.other / self.wall),
        }


def report_time(system: System, command_seconds: float, report: Report) -> None:
    """Reports Q7."""
    total = Spent()
    for journal in system.journals():
        spent = spent_of(journal.file)
        report.line(figure="Q7", journal=f"{journal.task}-{journal.round + 1:04d}", **spent.to_json())
        total += spent
    report.line(figure="Q7", journal="all", **total.to_json())
    command = dataclasses.replace(total, wall=command_seconds)
    report.line(figure="Q7", journal="the whole command", **command.to_json())
    report.figure("Q7", total.other / total.wall, Target("<=", 0.02))


def spent_of(journal: pathlib.Path) -> Spent:
    """Returns what a search took, as its journal says."""
    records = read_journal(journal)
    (closed,) = [record["seconds"] for record in records if record["type"] == "close"]
    children = [result["seconds"] for _, result in child_records(records)]
    return Spent(
        wall=closed["wall"],
        train=sum(child["train"] for child in children),
        evaluate=sum(child["evaluate"] for child in children),
        examine=closed["examine"],
        children=len(children),
    )


# Q6


def report_bytes(system: System, report: Report) -> None:
    """Collects garbage and reports Q6."""
    collection = collect(system, delete=True)
    freed = sum(journal.before - journal.after for journal in collection.journals)
    report.line(figure="Q6", freed_bytes={"garbage": collection.num_bytes - freed, "journals": freed})
    records = system.tasks()
    paths = {name: system.path(record.path_id) for name, record in records.items()}
    users = collections.Counter(layer_id for path in paths.values() for layer_id in path.layer_ids)
    # A position embedding of another size is the root's too, whichever task came to need it first.
    roots = system.root.layer_ids | {path.layer(POS_EMBED).id for path in paths.values()}
    ratios, shares = [], []
    for name, path in paths.items():
        own = {layer for _, layer in path.layers if users[layer.id] == 1 and layer.id not in roots}
        files = {
            "layers": [layer_file(system, layer.id) for layer in own],
            "journals": [journal.file for journal in system.journals(name)],
            "records": [
                system.folder / "tasks" / f"{name}.json",
                system.folder / "paths" / f"{path.id}.json",
                system.folder / "examples" / records[name].examples,
            ],
        }
        sizes = {what: sum(file.stat().st_size for file in some) for what, some in files.items()}
        checkpoint_bytes, checkpoint_parameters = full_checkpoint(system, path)
        ratios.append(sum(sizes.values()) / checkpoint_bytes)
        shares.append(sum(layer.num_parameters for layer in own) / checkpoint_parameters)
        report.line(
            figure="Q6",
            task=name,
            bytes=sizes,
            journal_bytes_per_child=round(sizes["journals"] / sum(spent_of(file).children for file in files["journals"])),
            checkpoint_bytes=checkpoint_bytes,
            ratio=rounded(ratios[-1]),
            own_parameters_share=rounded(shares[-1]),
            beyond=rounded(ratios[-1] - shares[-1]),
        )
    ratio, share = statistics.mean(ratios), statistics.mean(shares)
    report.figure("Q6", ratio, Target("<=", share + ALLOWANCE), f"own parameters' share {share:.4f} + {ALLOWANCE}")


def layer_file(system: System, layer_id: str) -> pathlib.Path:
    """Returns where a layer is stored."""
    return system.folder / "layers" / layer_id[:2] / f"{layer_id}.safetensors"


def full_checkpoint(system: System, path: Path) -> tuple[int, int]:
    """Returns bytes and parameters of a root of all its blocks with a path's position embedding and head, as one safetensors file."""
    layers = [*((position, layer) for position, layer in system.root.layers if position != POS_EMBED)]
    layers += [(position, path.layer(position)) for position in (POS_EMBED, HEAD)]
    tensors = {f"{position}.{name}": values for position, layer in layers for name, values in system.tensors(layer.id).items()}
    return len(safetensors.numpy.save(tensors)), sum(values.size for values in tensors.values())


if __name__ == "__main__":
    main()
