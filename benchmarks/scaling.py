"""What a search costs as tasks, children, layers and devices grow: measured where this machine can, simulated beyond. For docs/scaling.md.

    python -m benchmarks.scaling [--smoke] [--results benchmarks/results] [--figures docs/figures]

P1  A search with two worker processes: how far off the wall time is that benchmarks/simulation.py predicts from a run with one.
P2  How many tasks a system may have until what a journal says of all of them takes more, compressed, than is left of the 2 % of a
    checkpoint that Q6 allows a task beyond its own parameters. Measured: bytes of records, paths, examples and journals in systems of
    the bundled root's size, made by benchmarks/many_tasks.py. Beyond: arithmetic.
P3  Seconds that opening and closing a search take in a system of 10,000 tasks / seconds that 64 children of the demo take to train and
    validate (the committed results of benchmarks.search). Measured: real searches whose trainer answers at once, in systems of as many
    tasks as the lines say, each opened anew, with its files in the page cache; and what `gc` (dry), `verify`, `show`, a report and
    publishing one more task take.
P4  Simulated: device time that was of use / device time, for one search for each of 10,000 new tasks on 64 devices, one device a search.
    The lines before it have other numbers of tasks, devices, children, packs, models, and workers that are slow or die.

`kind` says of each line whether it is measured, arithmetic or simulated. Prints JSON lines, the last one sums up; without --smoke it
takes about 6 minutes on two cores.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import gzip
import json
import multiprocessing
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.many_tasks import NUM_CHILDREN, NUM_CLASSES, ManyTasks, unsynced
from benchmarks.planning import Costs, Parts, plan_campaigns, plan_searches, plan_store
from benchmarks.published import CHARACTERS, SMOKE, Architecture
from benchmarks.reporting import Report, Target, add_arguments, rounded, seconds_of
from benchmarks.simulation import Search, Workers, simulate
from evolve.closing import ActiveTask
from evolve.collecting import collect
from evolve.config import DefaultSettings, DigitsTask, RootSettings, SearchSettings, TrainingSettings
from evolve.data.load import load_task
from evolve.data.task import TaskData
from evolve.export import publish
from evolve.export.onnx import export_segment
from evolve.export.segments import Segment
from evolve.export.settings import ExportSettings
from evolve.journal import read_journal
from evolve.layer import LayerKind, LayerSpec, Tensors
from evolve.report.content import read_content
from evolve.root import LoadedRoot, load_root
from evolve.search import SearchPlan, SilentObserver, evolve_task
from evolve.snapshot import Snapshot
from evolve.store import System
from evolve.summary import summarise
from evolve.training.workers import WorkersTrainer, make_trainer
from evolve.verification import verify

BLOCK_WIDTH = 768
"""Of the layer with which reading and writing are measured, a block of ViT-B."""


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of it is run.

    Attributes:
        architecture: of the systems that are made.
        with_journals: numbers of tasks, ascending, at which every task has a journal.
        without: larger numbers of tasks, at which those that come have none: they would take tens of gigabytes.
        published: numbers of tasks to which one more is published.
        repetitions: of searches.
        children: of the search that is run with one worker and with two.
        batches: of each interval of it.
        campaign: tasks of a campaign, at most.
        apart: whether what starts workers is in a process of its own: they start quicker where others have been before.
    """

    architecture: Architecture
    with_journals: tuple[int, ...]
    without: tuple[int, ...]
    published: tuple[int, ...]
    repetitions: int
    children: int
    batches: int
    campaign: int
    apart: bool


FULL = Size(CHARACTERS, (10, 100, 1000), (10_000,), (10, 100, 1000), 3, 16, 20, 10_000, True)
TRIAL = Size(SMOKE, (4, 8), (12,), (2,), 1, 4, 1, 100, False)


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    report = Report("scaling", arguments)
    size = TRIAL if arguments.smoke else FULL
    with tempfile.TemporaryDirectory(prefix="munet-scaling-") as name:
        folder = pathlib.Path(name)
        workers = compare_workers(folder, size, report)
        systems = measure_systems(folder / "systems", size, report)
        measure_publishing(folder, size, report)
    costs = Costs(workers.relative, workers.start, *systems.lines(), systems.read_rate, systems.write_rate)
    plan_store(systems.parts, report)
    plan_searches(costs, report)
    plan_campaigns(costs, size.campaign, report)
    report.finish(f"{size.architecture.name}; {size.with_journals[-1]:,} tasks with journals, {size.without[-1]:,} in all")


# P1


@dataclasses.dataclass(frozen=True)
class MeasuredWorkers:
    """What one search with workers showed.

    Attributes:
        relative: seconds of each child by their mean.
        start: seconds until a worker takes a pack.
    """

    relative: tuple[float, ...]
    start: float


def compare_workers(folder: pathlib.Path, size: Size, report: Report) -> MeasuredWorkers:
    """Runs a search with one worker, predicts it with two, and runs it with two."""
    data, root = load_task(DigitsTask(name="digits", source="digits")), load_root(RootSettings(source="bundled"))
    plan = SearchPlan(
        defaults=DefaultSettings(image_size=32, learning_rate=0.05, crop_area_min=0.5, flip=False),
        search=SearchSettings(
            rounds=1, children_per_task=size.children, generation_size=max(2, size.children // 2), auto_tune=True
        ),
        training=TrainingSettings(batch_size=64, intervals=4, batches_per_interval=size.batches, device="cpu", threads=1),
    )
    one = Ran.of(folder / "workers-1", data, root, plan, 1)
    run = apart if size.apart else here
    start = run(start_of_workers, folder / "workers-1", data, plan.training)
    two = run(Ran.of, folder / "workers-2", data, root, plan, 2)
    handle = (one.wall - sum(map(sum, one.generations)) - one.examine) / size.children
    predicted = {
        "from one worker's children": one.predict(start, handle, 2),
        "from two workers' children": dataclasses.replace(two, examine=one.examine).predict(start, handle, 2),
    }
    children = [seconds for generation in one.generations for seconds in generation]
    slower = sum(map(sum, two.generations)) / sum(children)
    report.line(
        figure="P1",
        kind="measured",
        children=size.children,
        one_worker_seconds=rounded(one.wall),
        two_workers_seconds=rounded(two.wall),
        start_of_workers_seconds=rounded(start),
        other_seconds_per_child=rounded(handle),
        child_seconds={"mean": rounded(statistics.mean(children)), "each": [rounded(seconds) for seconds in children]},
        child_seconds_beside_another=rounded(slower),
        same_lineage=one.paths == two.paths,
    )
    for basis, seconds in predicted.items():
        report.line(figure="P1", kind="simulated", basis=basis, seconds=rounded(seconds), of_measured=rounded(seconds / two.wall))
    off = abs(predicted["from one worker's children"] / two.wall - 1)
    report.figure("P1", off, Target("<=", 0.15), "how far the prediction is off")
    mean = statistics.mean(children)
    return MeasuredWorkers(tuple(seconds / mean for seconds in children), start)


@dataclasses.dataclass(frozen=True)
class Ran:
    """A search that was run.

    Attributes:
        wall: seconds.
        generations: of each generation the seconds of its children, in training and validation.
        examine: seconds of the look at the test split.
        paths: what the children became, in order.
    """

    wall: float
    generations: tuple[tuple[float, ...], ...]
    examine: float
    paths: tuple[str, ...]

    @staticmethod
    def of(folder: pathlib.Path, data: TaskData, root: LoadedRoot, plan: SearchPlan, workers: int) -> Ran:
        """Runs a search with so many workers."""
        system = System.create(folder, root.layers, root.image_size)
        settings = plan.training.model_copy(update={"workers": workers})
        task = ActiveTask(data.name, data.labels, len(data.train), data.fingerprint)
        started = time.perf_counter()
        trainer = (make_trainer if workers == 1 else WorkersTrainer)(system, data, settings)
        evolve_task(system, task, trainer, plan, SilentObserver())
        wall = time.perf_counter() - started
        records = read_journal(system.journal_file(data.name, 0))
        rows = sorted(((generation, child["index"]), child) for generation, child in numbered(records))
        count = 1 + max(generation for (generation, _), _ in rows)
        seconds = [tuple(sum(row["seconds"].values()) for (at, _), row in rows if at == number) for number in range(count)]
        paths = tuple(row["path_id"] for _, row in rows)
        return Ran(wall, tuple(seconds), records[-1]["seconds"]["examine"], paths)

    def predict(self, start: float, handle: float, workers: int) -> float:
        """Returns what the simulation says of so many workers."""
        search = Search(self.generations, start=start, handle=handle, examine=self.examine)
        return simulate([search], [Workers.alike(workers)]).wall


def here(call: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a call gives."""
    return call(*arguments)


def apart(call: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what a call gives in a new process."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def numbered(records: list[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the finished children of a journal, each with the number of its generation."""
    for record in records:
        for child in record["children"] if record["type"] == "pack" else ():
            yield record["generation"], child


def start_of_workers(folder: pathlib.Path, data: TaskData, settings: TrainingSettings) -> float:
    """Returns the seconds from asking for a worker until it works."""
    system = System.open(folder)
    records = system.tasks()
    path = system.path(records[data.name].path_id)
    trainer = WorkersTrainer(system, data, settings.model_copy(update={"workers": 2}))
    first, second = (seconds_of(lambda: trainer.examine(path)) for _ in range(2))
    return max(0.0, first - second)


# P2, P3


@dataclasses.dataclass
class MeasuredSystems:
    """What systems of many tasks showed.

    Attributes:
        parts: bytes of a task.
        read_rate: bytes a second in which layers are read and hashed, from the page cache.
        write_rate: bytes a second in which layers are hashed and written durably.
        seconds: by number of tasks, medians of opening a search, reading the records, and closing.
    """

    parts: Parts
    read_rate: float
    write_rate: float
    seconds: dict[int, tuple[float, float, float]]

    def lines(self) -> tuple[tuple[float, float], ...]:
        """Returns of opening, reading the records, and closing how many seconds they take without tasks, and for each task."""
        numbers = list(self.seconds)
        fits = (np.polyfit(numbers, [self.seconds[number][which] for number in numbers], 1) for which in range(3))
        return tuple((max(0.0, float(fixed)), float(each)) for each, fixed in fits)


def measure_systems(folder: pathlib.Path, size: Size, report: Report) -> MeasuredSystems:
    """Runs searches in systems of more and more tasks, and whatever else reads all of them."""
    grown = ManyTasks(folder, size.architecture)
    seconds: dict[int, tuple[float, float, float]] = {}
    parts = Parts()
    for number in (*size.with_journals, *size.without):
        with_journals = number in size.with_journals
        grown.grow(number, with_journals=with_journals)
        seconds[number] = measure_searches(grown, number, size.repetitions, report)
        parts = measure_bytes(grown, number, with_journals, report)
        if with_journals:
            measure_upkeep(folder, number, report)
    read_rate, write_rate = measure_rates(grown)
    report.line(
        figure="P3",
        kind="measured",
        layers_read_megabytes_per_second=rounded(read_rate / 1e6),
        layers_written_megabytes_per_second=rounded(write_rate / 1e6),
    )
    measured = MeasuredSystems(parts, read_rate, write_rate, seconds)
    most = max(seconds)
    child = Costs.committed_child_seconds()
    share = (seconds[most][0] + seconds[most][2]) / (64 * child)
    report.figure("P3", share, Target("<=", 0.02), f"of 64 children of {child:.3g} s; {most:,} tasks")
    return measured


def measure_searches(grown: ManyTasks, number: int, repetitions: int, report: Report) -> tuple[float, float, float]:
    """Returns the seconds of opening a search, of reading the records, and of closing, each a median."""
    opening, children, closing, records, snapshot = [], [], [], [], []
    for repetition in range(repetitions):
        marks, started = grown.search(f"new-{number}-{repetition}")
        opening.append(marks.opened - started)
        children.append((marks.last_child - marks.opened) / NUM_CHILDREN)
        closing.append(marks.closed - marks.last_child)
        system = System.open(grown.folder)
        records.append(seconds_of(system.tasks))
        found = system.tasks()
        snapshot.append(seconds_of(lambda: Snapshot.of(system, found)))  # noqa: B023  # called at once
    values = [statistics.median(each) for each in (opening, records, closing)]
    report.line(
        figure="P3",
        kind="measured",
        tasks=number,
        opening_seconds=rounded(values[0]),
        reading_records_seconds=rounded(values[1]),
        reading_paths_and_layers_seconds=rounded(statistics.median(snapshot)),
        other_seconds_per_child=rounded(statistics.median(children)),
        closing_seconds=rounded(values[2]),
        repetitions=repetitions,
    )
    return values[0], values[1], values[2]


def measure_bytes(grown: ManyTasks, number: int, with_journals: bool, report: Report) -> Parts:
    """Reports what a system takes on disk, and of what a task's bytes consist."""
    folder = grown.folder
    (journal,) = folder.glob(f"journal/new-{number}-0-0001.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    without = b"".join(
        (json.dumps(json.loads(lines[0]) | {"snapshot": []}) + "\n").encode() if at == 0 else line
        for at, line in enumerate(lines)
    )
    rows = len(json.loads(lines[0])["snapshot"])
    plain, packed = journal.stat().st_size, len(gzip.compress(journal.read_bytes(), 9, mtime=0))
    bare = len(gzip.compress(without, 9, mtime=0))
    record = next((folder / "tasks").glob("task-*.json"))
    path = folder / "paths" / f"{json.loads(record.read_bytes())['path_id']}.json"
    examples = folder / "examples" / json.loads(record.read_bytes())["examples"]
    parts = Parts(
        record=record.stat().st_size,
        path=path.stat().st_size,
        examples=examples.stat().st_size,
        journal_child=len(without) / NUM_CHILDREN,
        journal_child_packed=bare / NUM_CHILDREN,
        row=(plain - len(without)) / rows,
        row_packed=(packed - bare) / rows,
        own=4 * (2 * grown.width + (grown.width + 1) * NUM_CLASSES),
    )
    report.line(
        figure="P2",
        kind="measured",
        tasks=number,
        journals_of="all tasks" if with_journals else "few tasks",
        bytes=dict(sorted(folder_bytes(folder).items())),
        files=sum(len(names) for _, _, names in os.walk(folder)),
        last_journal={
            "plain": plain,
            "compressed": packed,
            "snapshot_rows": rows,
            "snapshot_share": rounded(1 - len(without) / plain),
            "bytes_per_row": rounded(parts.row),
            "compressed_bytes_per_row": rounded(parts.row_packed),
        },
        bytes_of_a_task={name: round(value) for name, value in dataclasses.asdict(parts).items()},
    )
    return parts


def folder_bytes(folder: pathlib.Path) -> dict[str, int]:
    """Returns the bytes in each folder of a system."""
    found: dict[str, int] = {}
    for file in folder.rglob("*"):
        if file.is_file():
            part = file.relative_to(folder).parts[0]
            found[part] = found.get(part, 0) + file.stat().st_size
    return found


def measure_upkeep(folder: pathlib.Path, number: int, report: Report) -> None:
    """Reports how long it takes to look after a system, each in one opened anew."""
    found: dict[str, float] = {}

    def timed(name: str, call: Callable[[System], Any]) -> Any:
        system = System.open(folder)
        started = time.perf_counter()
        result = call(system)
        found[name] = rounded(time.perf_counter() - started)
        return result

    collection = timed("gc, dry", lambda system: collect(system, delete=False))
    timed("verify", verify)
    timed("show", summarise)
    timed("report, before drawing", read_content)
    report.line(
        figure="P3",
        kind="measured",
        tasks=number,
        upkeep_seconds=found,
        journal_megabytes=rounded(sum(journal.before for journal in collection.journals) / 1e6),
        compressed_megabytes=rounded(sum(journal.after for journal in collection.journals) / 1e6),
    )


def measure_rates(grown: ManyTasks) -> tuple[float, float]:
    """Returns in how many bytes a second layers are read and hashed, and hashed and written durably."""
    system = System.open(grown.folder)
    random = np.random.default_rng(1)
    reading, writing = [], []
    for _ in range(5):
        tensors = {"weight": random.standard_normal((12 * BLOCK_WIDTH, BLOCK_WIDTH), np.float32)}
        spec = LayerSpec.of(LayerKind.BLOCK, width=BLOCK_WIDTH)
        started = time.perf_counter()
        layer = system.put_layer(spec, tensors)
        writing.append(tensors["weight"].nbytes / (time.perf_counter() - started))
        reading.append(tensors["weight"].nbytes / seconds_of(lambda: system.check_layer(layer.id)))  # noqa: B023  # called at once
    return statistics.median(reading), statistics.median(writing)


def measure_publishing(folder: pathlib.Path, size: Size, report: Report) -> None:
    """Reports what publishing one more task takes in repositories of more and more of them."""
    grown = ManyTasks(folder / "published", size.architecture)
    for number in size.published:
        grown.grow(number, with_journals=False)
        repository = folder / f"repository-{number}"
        with unsynced(), unexported():
            publish.export_system(System.open(grown.folder), repository)
        grown.grow(number + 1, with_journals=False)
        one_more, nothing = (
            seconds_of(lambda: publish.export_system(System.open(grown.folder), repository))  # noqa: B023  # called at once
            for _ in range(2)
        )
        generation = max(repository.glob("generation-*.json"), key=lambda file: file.stat().st_mtime_ns)
        report.line(
            figure="P3",
            kind="measured",
            tasks=number,
            publishing_one_more_seconds=rounded(one_more),
            publishing_nothing_new_seconds=rounded(nothing),
            generation_bytes=generation.stat().st_size,
            files=sum(len(names) for _, _, names in os.walk(repository)),
        )


@contextlib.contextmanager
def unexported() -> Iterator[None]:
    """Exports one head and takes as many random bytes for all others, unexamined: nobody reads them but for their hash."""
    num_bytes: list[int] = []

    def export(segment: Segment, tensors: Callable[[str], Tensors], settings: ExportSettings) -> bytes:
        if segment.layers[0].kind is not LayerKind.NORM:
            return export_segment(segment, tensors, settings)
        if not num_bytes:
            num_bytes.append(len(export_segment(segment, tensors, settings)))
        return os.urandom(num_bytes[0])

    def check_routes(*_: object) -> None:
        """Says nothing of bytes that are no model."""

    with (
        mock.patch.object(publish, "export_segment", export),
        mock.patch.object(publish._Publisher, "_check_routes", check_routes),
    ):
        yield


if __name__ == "__main__":
    main()
