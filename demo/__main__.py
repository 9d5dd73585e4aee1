"""Evolves three tasks, publishes and serves them, adds a fourth while requests run, and checks every claim it makes.

Usage: python -m demo. Everything is written to .demo/, which each run starts anew. Exit status 0 only if every check held.
"""

from __future__ import annotations

import argparse
import io
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import rich.console
from PIL import Image

from evolve.config import Experiment, load_settings
from evolve.data.load import load_task
from evolve.data.task import TaskData
from evolve.store import System
from evolve.summary import SystemSummary, summarise
from server.client import AdminClient, Client
from server.errors import CallError
from server.results import Classification

FOLDER = pathlib.Path(".demo")
SYSTEM = FOLDER / "system"
REPOSITORY = FOLDER / "model_repository"
EXPERIMENT = pathlib.Path(__file__).parent / "experiment.toml"
FIRST_TASKS = ("digits", "greek", "armenian")
LAST_TASK = "hebrew"
CHUNK = 16
"""Images a request."""

console = rich.console.Console(highlight=False, soft_wrap=True)
failures: list[str] = []


def section(title: str) -> None:
    """Prints a heading."""
    console.print(f"\n[bold]{title}[/bold]")


def check(claim: str, held: bool) -> None:
    """Prints a claim and whether it held."""
    console.print(f"  {'[green]holds[/green]' if held else '[red]FAILS[/red]'}  {claim}")
    if not held:
        failures.append(claim)


class Server:
    """munet-server in a process of its own."""

    def __init__(self) -> None:
        """Starts it and waits until it answers."""
        command = [
            *(sys.executable, "-m", "server.cli", "serve", "--repository", str(REPOSITORY)),
            *("--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"),
        ]
        self._log = (FOLDER / "server.log").open("w")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True)
        line = self.process.stdout.readline() if self.process.stdout is not None else ""
        console.print(f"  {line.strip()}")
        found = re.search(r"at (\S+), admin (\S+)", line)
        if found is None:
            raise SystemExit(f"the server did not start; see {FOLDER / 'server.log'}")
        self.address, self.admin_address = found[1], found[2]

    def stop(self) -> int:
        """Asks it to stop and returns its exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(timeout=60)
        self._log.close()
        return status


class Requests:
    """A steady stream of requests, each for all tasks in turn, and what came of them."""

    def __init__(self, address: str, images: dict[str, list[bytes]]) -> None:
        """Starts sending."""
        self.answered = 0
        self.generations: list[int] = []
        self.errors: list[str] = []
        self._address = address
        self._images = images
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        with Client(self._address) as client:
            number = 0
            while not self._stop.wait(0.05):
                task = FIRST_TASKS[number % len(FIRST_TASKS)]
                image = self._images[task][number % len(self._images[task])]
                number += 1
                try:
                    self.generations.append(client.classify(task, image).generation)
                    self.answered += 1
                except CallError as error:
                    self.errors.append(str(error))

    def stop(self) -> None:
        """Ends the stream."""
        self._stop.set()
        self._thread.join()


def evolve(tasks: Sequence[str]) -> subprocess.Popen[bytes]:
    """Starts munet-evolve in a process of its own; it publishes after each closed task."""
    named = [argument for task in tasks for argument in ("--task", task)]
    command = [sys.executable, "-m", "evolve.cli", "run", str(EXPERIMENT), "--system", str(SYSTEM), *named]
    return subprocess.Popen([*command, "--repository", str(REPOSITORY)])


def encode(image: np.ndarray) -> bytes:
    """Returns pixels [height, width, 3] uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def served_accuracy(client: Client, data: TaskData, encoded: list[bytes]) -> float:
    """Returns the share of test images that the server classifies rightly."""
    if data.test is None:
        raise ValueError(f"task {data.name} has no test split")
    answers: list[Classification] = []
    for start in range(0, len(encoded), CHUNK):
        answers += client.classify(data.name, encoded[start : start + CHUNK]).classifications
    return float(np.mean([answer.top.index == label for answer, label in zip(answers, data.test.labels, strict=True)]))


def compare_accuracy(client: Client, data: TaskData, encoded: list[bytes], measured: float | None) -> None:
    """Prints the accuracy through the server beside the one the search measured, and checks that they agree."""
    served = served_accuracy(client, data, encoded)
    claim = f"{data.name}: {served:.4f} of {len(encoded)} test images right through the server, {measured:.4f} in the search"
    # One image whose two best classes tie within rounding may fall either way.
    check(claim, measured is not None and abs(served - measured) <= 1.5 / len(encoded))


def logits_of(client: Client, images: dict[str, list[bytes]], tasks: Sequence[str]) -> dict[str, bytes]:
    """Returns the bits of each task's logits for its first images."""
    answers = {}
    for task in tasks:
        result = client.classify(task, images[task][:CHUNK], include_logits=True)
        answers[task] = b"".join(row.logits.tobytes() for row in result.classifications if row.logits is not None)
    return answers


def wait_for(condition: Callable[[], bool], timeout_seconds: float) -> bool:
    """Waits until a condition holds; tells whether it did in time."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def show_sharing(server: Server, image: bytes, num_tasks: int) -> None:
    """Asks for all tasks on one image and shows by the engine's row counters what was computed once."""
    with AdminClient(server.admin_address) as admin, Client(server.address) as client:
        before = {row.name: row for row in admin.status().segments}
        client.classify_tasks(image)
        after = admin.status().segments
        routes = [task.route for task in client.list_tasks().tasks]
    prefixes = {route[: length + 1] for route in routes for length in range(len(route))}
    requested = computed = 0
    for row in after:
        asked = row.rows_requested - before[row.name].rows_requested
        ran = row.rows_computed - before[row.name].rows_computed
        requested, computed = requested + asked, computed + ran
        if asked > 1:
            console.print(f"  {row.name} ({row.num_parameters:,} parameters): {asked} tasks asked for it, rows run: {ran}")
    shared = [row for row in after if len(row.tasks) > 1]
    check(f"one image, {num_tasks} tasks: {computed} segment rows ran instead of {requested}", computed < requested)
    check("each ran once for each different input, however many tasks asked", computed == len(prefixes))
    console.print(f"  {len(shared)} of {len(after)} segments are shared by several tasks")


def show_weights(summary: SystemSummary) -> None:
    """Prints what is shared and what separate models would weigh."""
    for task in summary.tasks:
        console.print(f"  {task.name} ({task.path_id[:8]}): {task.make_up(summary.root_blocks)}")
    together, apart = summary.num_parameters, summary.separate_parameters
    console.print(f"  {summary.num_layers} distinct layers with {together:,} parameters ({together * 4e-6:.1f} MB)")
    console.print(
        f"  {len(summary.tasks)} separate models: {apart:,} ({apart * 4e-6:.1f} MB), {apart / together:.2f} times as much"
    )
    check("the system is smaller than its tasks' models apart", together < apart)


def run() -> None:
    """Goes the whole way."""
    settings = {task.name: task for task in load_settings(EXPERIMENT, Experiment).tasks}

    section("1. Evolve three tasks from one pretrained root, publish each")
    if evolve(FIRST_TASKS).wait() != 0:
        raise SystemExit("munet-evolve failed, see above")
    system = System.open(SYSTEM)

    data = {name: load_task(task) for name, task in settings.items()}
    images = {name: [encode(image) for image in task.test.images] for name, task in data.items() if task.test is not None}

    section("2. Serve them, and classify real test images by task name")
    server = Server()
    try:
        with Client(server.address) as client:
            for name in FIRST_TASKS:
                compare_accuracy(client, data[name], images[name], system.tasks()[name].test_accuracy)
            before = logits_of(client, images, FIRST_TASKS)
            grow(server, client, images)

            section("4. Nothing that was there has changed")
            after = logits_of(client, images, FIRST_TASKS)
            for name in FIRST_TASKS:
                check(
                    f"{name}: logits of {CHUNK} images are the same bits as before {LAST_TASK} joined",
                    before[name] == after[name],
                )
            compare_accuracy(client, data[LAST_TASK], images[LAST_TASK], system.tasks()[LAST_TASK].test_accuracy)

        section("5. Computed once, stored once")
        show_sharing(server, images["digits"][0], len(settings))
        show_weights(summarise(system))
    finally:
        status = server.stop()
    check("the server stopped cleanly on SIGTERM", status == 0)


def grow(server: Server, client: Client, images: dict[str, list[bytes]]) -> None:
    """Evolves and publishes the last task in a second process while requests run."""
    section(f"3. Evolve {LAST_TASK} in a second process while requests run; the server takes it up by itself")
    old = client.list_tasks().generation
    requests = Requests(server.address, images)
    try:
        evolved = evolve([LAST_TASK]).wait() == 0
        taken_up = wait_for(lambda: client.list_tasks().generation > old, timeout_seconds=30)
        time.sleep(1)
    finally:
        requests.stop()
    check(f"{LAST_TASK} was evolved and published", evolved)
    check(f"the running server went from generation {old} to {client.list_tasks().generation}", taken_up)
    check(f"{requests.answered} requests were answered meanwhile, {len(requests.errors)} failed", not requests.errors)
    check("answers of both generations came, never an older after a newer", in_order(requests.generations))
    names = [task.name for task in client.list_tasks().tasks]
    answer = client.classify(LAST_TASK, images[LAST_TASK][0]).classifications[0].top if LAST_TASK in names else None
    check(f"the new task answers: {answer.label if answer else 'nothing'}", answer is not None)


def in_order(generations: Sequence[int]) -> bool:
    """Tells whether there are at least two generations, each answer's no older than the one before."""
    return len(set(generations)) > 1 and list(generations) == sorted(generations)


def main() -> None:
    """Runs the demo and says whether everything held."""
    argparse.ArgumentParser(prog="python -m demo", description=__doc__).parse_args()
    started = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    run()
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    console.print(f"\n{minutes} min {seconds} s; system and repository are in {FOLDER}/")
    if failures:
        console.print(f"[red]{len(failures)} claims failed[/red]")
        raise SystemExit(1)
    console.print("[green]every claim held[/green]")


if __name__ == "__main__":
    main()
