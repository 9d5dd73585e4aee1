"""Whether publishing a task changes what other tasks answer: Q3, over a whole search.

    python -m benchmarks.unchanged --system DIR [--results DIR]

Publishes a searched system once more as it was after each closed search, in that order, to a repository that a real munet-server on
the CPU serves, and asks every older task through gRPC for the logits of its example images, before and after each publication.

Q3  the greatest difference of a logit of any task but the one just published. The lines also have how many publications changed the
    route of another task: there, layers that ran in one model run in two.

It reads the journals and takes a copy: the system is left alone. Layers that `munet-evolve gc` has removed cannot be published again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.reporting import TOP, Report, Target, add_arguments
from evolve.documents import TaskRecord
from evolve.export.publish import export_system
from evolve.journal import read_journal
from evolve.store import System
from server.client import Client

NUM_IMAGES = 4
"""Of each task."""

TIMEOUT_SECONDS = 60


def main() -> None:
    """Publishes a system step by step and reports whether logits changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", type=pathlib.Path, required=True, metavar="DIR", help="a system whose searches are closed")
    add_arguments(parser)
    arguments = parser.parse_args()
    report = Report("unchanged", arguments)
    report_changes(System.open(arguments.system), report)
    report.finish(f"system of {arguments.system.name}")


def report_changes(system: System, report: Report) -> None:
    """Reports Q3."""
    steps = list(publications(system))
    for step in steps:
        report.line(figure="Q3", **dataclasses.asdict(step))
    splits = sum(bool(step.routes_changed) for step in steps)
    note = f"greatest difference of {sum(step.logits for step in steps)} logits; {splits} of {len(steps)} publications changed a route"
    report.figure("Q3", max((step.difference for step in steps), default=float("nan")), Target("<=", 0.0), note)


@dataclasses.dataclass(frozen=True)
class Publication:
    """What one publication did to the tasks that were there before.

    Attributes:
        task: that was published.
        generation: that was published.
        tasks_before: other tasks that answered before.
        routes_changed: those of them whose route is another one now.
        logits: compared, of all of them.
        difference: the greatest of a logit; infinite if one is no number.
    """

    task: str
    generation: int
    tasks_before: int
    routes_changed: tuple[str, ...]
    logits: int
    difference: float


def publications(system: System) -> Iterator[Publication]:
    """Publishes a system again as it was after each closed search, and yields what each publication did."""
    with tempfile.TemporaryDirectory(prefix="munet-unchanged-") as name, contextlib.ExitStack() as stack:
        copy, repository = pathlib.Path(name) / "system", pathlib.Path(name) / "repository"
        shutil.copytree(system.folder, copy, ignore=shutil.ignore_patterns("tasks", "journal", "locks", "baselines"))
        (copy / "tasks").mkdir()
        replayed = System.open(copy)
        images: dict[str, list[bytes]] = {}
        client: Client | None = None
        for record in closed_searches(system):
            before = {} if client is None else answers(client, images)
            routes = {} if client is None else {task.name: task.route for task in client.list_tasks().tasks}
            replayed.put_task(record)
            images[record.name] = [encode(image) for image in system.examples(record)[:NUM_IMAGES]]
            published = export_system(replayed, repository).generation
            if client is None:
                client = stack.enter_context(serving(repository))
            wait_for(client, published)
            after = answers(client, {task: images[task] for task in before})
            others = [task for task in before if task != record.name]
            now = {task.name: task.route for task in client.list_tasks().tasks}
            yield Publication(
                task=record.name,
                generation=published,
                tasks_before=len(others),
                routes_changed=tuple(task for task in others if now[task] != routes[task]),
                logits=sum(before[task].size for task in others),
                difference=max((difference(before[task], after[task]) for task in others), default=0.0),
            )


def closed_searches(system: System) -> Iterator[TaskRecord]:
    """Yields what each closed search made of its task, in the order in which they were closed."""
    records = system.tasks()
    closed = []
    for place in system.journals():
        if place.is_closed:
            journal = read_journal(place.file)
            # Searches of one process follow each other: what one saw when it opened was closed before.
            closed.append((place.round, max((row["order"] for row in journal[0]["snapshot"]), default=0), journal))
    for number, (_, _, journal) in enumerate(sorted(closed, key=lambda item: item[:2])):
        opened, end = journal[0], journal[-1]
        yield dataclasses.replace(
            records[opened["task"]],
            path_id=end["path_id"],
            parent_id=system.root.id,
            order=number + 1,
            quality=end["quality"],
            test_accuracy=end["test_accuracy"],
            examples=end["examples"],
        )


def answers(client: Client, images: dict[str, list[bytes]]) -> dict[str, npt.NDArray[np.float32]]:
    """Returns each task's logits [images, classes] for its own images."""
    return {
        task: np.stack(
            [row.logits for row in client.classify(task, files, include_logits=True).classifications if row.logits is not None]
        )
        for task, files in images.items()
    }


def difference(before: npt.NDArray[np.float32], after: npt.NDArray[np.float32]) -> float:
    """Returns the greatest absolute difference; infinity for what is no number or of another shape."""
    if before.shape != after.shape or not (np.isfinite(before).all() and np.isfinite(after).all()):
        return float("inf")
    return float(np.abs(before - after).max())


def encode(image: npt.NDArray[np.uint8]) -> bytes:
    """Returns pixels [height, width, 3] as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@contextlib.contextmanager
def serving(repository: pathlib.Path) -> Iterator[Client]:
    """Gives a client of a munet-server in a process of its own."""
    command = [sys.executable, "-m", "server.cli", "serve", "--repository", str(repository), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(TOP), os.environ.get("PYTHONPATH"))))}
    with subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"],
        env=environment, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            found = re.search(r"at (\S+), admin", process.stdout.readline() if process.stdout is not None else "")
            if found is None:
                raise SystemExit("munet-server did not start")
            with Client(found[1]) as client:
                yield client
        finally:
            process.send_signal(signal.SIGTERM)


def wait_for(client: Client, generation: int) -> None:
    """Waits until the server answers from a published generation."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while client.list_tasks().generation < generation:
        if time.monotonic() > deadline:
            raise SystemExit(f"munet-server did not take up generation {generation}")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
