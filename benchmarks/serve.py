"""How fast routes in pieces answer, beside whole ONNX models of the same weights on the same cores in the same minutes.

    python -m benchmarks.serve [--only S1 S4 S5] [--smoke] [--results benchmarks/results]

S1  ViT-S/16 at 224 px, 8 tasks that share 10 of 12 blocks. One image and all tasks in one call of the embedded engine, against one call
    to each task's whole model, in one process with the same ONNX Runtime threads. The figure is the ratio of the times as a share of its
    bound T / (f + T(1-f)), where f is the shared part of a forward pass by floating point operations (evolve.flops).
    Measured three times: both sides on one thread (the figure); both on all CPUs, with one ONNX Runtime pool of so many threads; both on
    all CPUs, with one thread for a batch and as many batches at once as CPUs, which is how the engine is set by default.
S4  ViT-Ti/16 at 224 px, a route in three pieces (cut after block 6 and before the final norm) through the embedded engine, against the
    same route as one ONNX file in a session of its own: median seconds of one image, calls taken in turns. Beside it, what else could
    make them differ: the pieces run by hand, and the one file run by a thread that waits for it, as the engine's do; then all of it
    with the process held on one core, where no other core's caches are in play.
S5  ViT-Ti/16 at 224 px, that same route served by `munet-server serve` in a process of its own with default settings: images per second
    that 16 requests at a time of one JPEG each get through gRPC, against raw batches through ONNX Runtime by as many threads as the
    server has workers, of the size that takes the least CPU time. The load's own CPU time counts against the server: it has the same
    CPUs. The second line is the same with raw pixels instead of JPEG files.

Weights are random: what is measured does not depend on them. Both sides are warmed up, then measured in turns, several times; figures are
medians of the ratio within each repetition, lines hold their spread. Each measurement runs in a fresh process without torch. Prints JSON
lines, the last one sums up; without --smoke it takes about 8 minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import io
import itertools
import multiprocessing
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image

from benchmarks.published import Published
from benchmarks.reporting import TOP, Ratio, Report, Target, add_arguments, milliseconds, rounded, seconds_of
from server.client import AsyncClient
from server.config import EngineSettings, num_usable_cpus
from server.embedded.engine import EmbeddedEngine
from server.engine import Question
from server.repository import Repository

Pixels = npt.NDArray[np.uint8]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        smoke: tiny models.
        tasks: of S1.
        repetitions: of each measurement.
        calls: of each side in one repetition of S4.
        seconds: of each side in one repetition of S5.
        requests: that S5's load has open at a time.
    """

    smoke: bool
    tasks: int
    repetitions: int
    calls: int
    seconds: float
    requests: int


BATCH_SIZES = (1, 2, 4, 8)
"""That raw ONNX Runtime is tried with."""

FULL = Effort(smoke=False, tasks=8, repetitions=7, calls=25, seconds=4.0, requests=16)
SMOKE = Effort(smoke=True, tasks=2, repetitions=2, calls=3, seconds=0.2, requests=4)


def main() -> None:
    """Measures what is asked for and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=list(MEASUREMENTS), default=list(MEASUREMENTS), help="figures; all by default"
    )
    add_arguments(parser)
    arguments = parser.parse_args()
    effort = SMOKE if arguments.smoke else FULL
    model = "tiny random weights" if effort.smoke else "ViT-S/16 (S1), ViT-Ti/16 (S4, S5) at 224 px, random weights, float32"
    report = Report("serve", arguments)
    with tempfile.TemporaryDirectory(prefix="munet-serve-") as folder:
        published = in_fresh_process(publish, pathlib.Path(folder), effort, arguments.only)
        for name in arguments.only:
            MEASUREMENTS[name].measure(published[name], effort, report)
    report.finish(model)


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """Returns what a function of this module returns in a process of its own: a process has one ONNX Runtime pool for life."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def publish(folder: pathlib.Path, effort: Effort, names: Sequence[str]) -> dict[str, Published]:
    """Publishes what some figures are measured on, by figure. To be run in a process of its own: it alone needs torch."""
    from benchmarks import random_models

    published: dict[System, Published] = {}
    for system in {MEASUREMENTS[name].system: None for name in names}:
        architecture = random_models.SMOKE if effort.smoke else getattr(random_models, system.architecture)
        first_own = 2 if effort.smoke else system.first_own_block
        own = tuple(range(first_own, architecture.blocks))
        tasks = {f"task-{number}": own for number in range(effort.tasks)} if system.all_alike else {"route": (), "other": own}
        published[system] = random_models.publish(folder / system.name, architecture, tasks)
    return {name: published[MEASUREMENTS[name].system] for name in names}


# Both sides


@contextlib.contextmanager
def engine_of(models: Published, threads: int, workers: int) -> Iterator[Callable[[Pixels, tuple[str, ...]], Any]]:
    """Gives the embedded engine as a function of images and tasks."""
    engine = EmbeddedEngine(EngineSettings(threads=threads, workers=workers))
    generation = Repository(models.repository).read()
    engine.load(generation)
    try:
        yield lambda images, tasks: engine.answer(Question(generation, images, tasks)).result()
    finally:
        engine.close()


def whole_model(file: pathlib.Path, threads: int) -> Callable[[Pixels], Any]:
    """Returns a whole model as a function of images, with ONNX Runtime's own settings but for the threads."""
    options = onnxruntime.SessionOptions()
    if threads == 1:
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
    else:
        # The pool that the engine has set up for this process.
        options.use_per_session_threads = False
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {session.get_inputs()[0].name: images})[0]


def random_images(models: Published, count: int = 1) -> Pixels:
    """Returns images, [count, size, size, 3]."""
    size = models.image_size
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def check_equal(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
    """Checks, before anything is timed, that both sides compute the same.

    Raises:
        RuntimeError: they do not.
    """
    difference = float(np.abs(found - expected).max())
    if not difference <= 1e-4:
        raise RuntimeError(f"found answers that differ by {difference:g}, expected the same within 1e-4 from both sides")


def in_turns(first: Callable[[], float], second: Callable[[], float], repetitions: int) -> Ratio:
    """Measures both as often, each first as often as the other."""
    above, below = [], []
    for repetition in range(repetitions):
        if repetition % 2:
            below.append(second())
            above.append(first())
        else:
            above.append(first())
            below.append(second())
    return Ratio(above, below)


# S1


def measure_s1(models: Published, effort: Effort, report: Report) -> None:
    """One image, all tasks, in one call, against one call a task."""
    cpus = num_usable_cpus()
    shared, count = models.shared, effort.tasks
    bound = count / (shared + count * (1 - shared))
    for threads, workers in dict.fromkeys([(1, 1), (cpus, 1), (1, cpus)]):
        ratio = in_fresh_process(time_tasks, models, threads, workers, effort.repetitions)
        if (threads, workers) == (1, 1):
            report.figure("S1", ratio.median / bound, Target(">=", 0.85))
        report.line(
            figure="S1",
            threads=threads,
            workers=workers,
            tasks=count,
            shared=rounded(shared),
            bound=rounded(bound),
            one_call_ms=milliseconds(ratio.below),
            one_call_a_task_ms=milliseconds(ratio.above),
            ratio=ratio.spread(),
            of_bound=ratio.spread(1 / bound),
        )


def time_tasks(models: Published, threads: int, workers: int, repetitions: int) -> Ratio:
    """Returns seconds of one call a task over seconds of one call for all tasks, so many batches at once on both sides."""
    image = random_images(models)
    tasks = tuple(models.whole)
    with engine_of(models, threads, workers) as ask, concurrent.futures.ThreadPoolExecutor(workers) as callers:
        sessions = [whole_model(file, threads) for file in models.whole.values()]

        def one_call() -> Any:
            return ask(image, tasks)

        def one_call_a_task() -> list[Any]:
            if workers == 1:
                return [session(image) for session in sessions]
            return list(callers.map(lambda session: session(image), sessions))

        for _ in range(2):
            for found, expected in zip(one_call().values(), one_call_a_task(), strict=True):
                check_equal(found, expected)
        return in_turns(lambda: seconds_of(one_call_a_task), lambda: seconds_of(one_call), repetitions)


# S4


def measure_s4(models: Published, effort: Effort, report: Report) -> None:
    """A route in three pieces against the same in one, and what else could make them differ: the cuts, the thread, its core."""
    cpus = num_usable_cpus()
    for threads, workers, one_core in dict.fromkeys([(1, cpus, False), (cpus, 1, False), (1, 1, True)]):
        ratios = in_fresh_process(time_pieces, models, threads, workers, one_core, effort)
        if threads == 1 and not one_core:
            report.figure("S4", ratios["pieces, engine"].median, Target("<=", 1.05))
        for what, measured in ratios.items():
            report.line(
                figure="S4",
                threads=threads,
                workers=workers,
                one_core=one_core,
                what=what,
                what_ms=milliseconds(measured.above),
                whole_ms=milliseconds(measured.below),
                ratio=measured.spread(),
            )


def time_pieces(models: Published, threads: int, workers: int, one_core: bool, effort: Effort) -> dict[str, Ratio]:
    """Returns the median seconds of each way to compute the route over those of the whole model.

    The ways: the pieces through the engine; the pieces by hand; the whole model in a thread that waits for it, as the engine's do.
    """
    if one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    image = random_images(models)
    task = "route"
    with engine_of(models, threads, workers) as ask, concurrent.futures.ThreadPoolExecutor(1) as other_thread:
        whole = whole_model(models.whole[task], threads)
        generation = Repository(models.repository).read()
        route = [generation.segments[name] for name in generation.tasks[task].route]
        if len(route) != 3:
            raise RuntimeError(f"found a route of {len(route)} pieces, expected 3")
        pieces = [whole_model(segment.model, threads) for segment in route]

        def by_hand() -> Any:
            values: Any = image
            for piece in pieces:
                values = piece(values)
            return values

        sides: dict[str, Callable[[], Any]] = {
            "pieces, engine": lambda: ask(image, (task,))[task],
            "pieces, by hand": by_hand,
            "whole, another thread": lambda: other_thread.submit(whole, image).result(),
            "whole": lambda: whole(image),
        }
        for _ in range(3):
            for side in sides.values():
                check_equal(side(), whole(image))
        medians = medians_in_turns(sides, effort)
    return {name: Ratio(values, medians["whole"]) for name, values in medians.items() if name != "whole"}


def medians_in_turns(sides: Mapping[str, Callable[[], Any]], effort: Effort) -> dict[str, list[float]]:
    """Returns the median seconds of each side in each repetition; within one, sides take turns in every order."""
    medians: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(effort.repetitions):
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for order in itertools.islice(itertools.cycle(itertools.permutations(sides)), effort.calls):
            for name in order:
                taken[name].append(seconds_of(sides[name]))
        for name, values in taken.items():
            medians[name].append(statistics.median(values))
    return medians


# S5


def measure_s5(models: Published, effort: Effort, report: Report) -> None:
    """A server's images per second against ONNX Runtime's."""
    by_size, sides = in_fresh_process(time_server, models, effort)
    for traffic, (served, raw) in sides.items():
        ratio = Ratio([side.per_second for side in served], [side.per_second for side in raw])
        if traffic == "jpeg":
            report.figure("S5", ratio.median, Target(">=", 0.9))
        report.line(
            figure="S5",
            traffic=traffic,
            requests_at_a_time=effort.requests,
            served_per_second=rounded(statistics.median(ratio.above)),
            raw_per_second=rounded(statistics.median(ratio.below)),
            raw_batch_size=min(by_size, key=lambda size: by_size[size]),
            raw_cpu_ms_by_batch_size={str(size): milliseconds([seconds]) for size, seconds in by_size.items()},
            cpu_ms_per_image={
                "server": milliseconds([side.server_cpu for side in served]),
                "load": milliseconds([side.own_cpu for side in served]),
                "raw": milliseconds([side.own_cpu for side in raw]),
            },
            ratio=ratio.spread(),
        )


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast one side was.

    Attributes:
        per_second: images.
        own_cpu: seconds of CPU time of this process for each image.
        server_cpu: the same of the server's process.
    """

    per_second: float
    own_cpu: float
    server_cpu: float


Sides = tuple[list[Rate], list[Rate]]
"""The server and ONNX Runtime, repetition by repetition."""


def time_server(models: Published, effort: Effort) -> tuple[dict[int, float], dict[str, Sides]]:
    """Returns raw seconds of CPU time an image by batch size, and both sides for each traffic."""
    task = "route"
    whole = whole_model(models.whole[task], 1)
    # By CPU time, which other work on the machine moves least: the fastest batches are what the server has to stand beside.
    by_size = {size: min(raw_rate(whole, random_images(models, size), effort).own_cpu for _ in range(2)) for size in BATCH_SIZES}
    batch = random_images(models, min(by_size, key=lambda size: by_size[size]))
    pixels = smooth_image(models.image_size)
    images: dict[str, Pixels | bytes] = {"jpeg": to_jpeg(pixels), "pixels": pixels}
    sides: dict[str, Sides] = {traffic: ([], []) for traffic in images}
    with server_process(models.repository) as server:
        for repetition in range(-1, effort.repetitions):
            for traffic, image in images.items():
                served = asyncio.run(served_rate(server, task, image, effort))
                raw = raw_rate(whole, batch, effort)
                # The first one warms up.
                if repetition >= 0:
                    sides[traffic][0].append(served)
                    sides[traffic][1].append(raw)
    return by_size, sides


def raw_rate(whole: Callable[[Pixels], Any], batch: Pixels, effort: Effort) -> Rate:
    """Returns how fast batches go through a session, by one thread a CPU."""
    counter = Counter(effort.seconds)

    def work() -> None:
        while not counter.is_over:
            whole(batch)
            counter.count(len(batch))

    threads = [threading.Thread(target=work) for _ in range(num_usable_cpus())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counter.rate


async def served_rate(server: Server, task: str, image: Pixels | bytes, effort: Effort) -> Rate:
    """Returns how fast a server answers so many requests at a time."""
    counter = Counter(effort.seconds, server)
    async with AsyncClient(server.address) as client:

        async def ask() -> None:
            while not counter.is_over:
                await client.classify(task, image)
                counter.count(1)

        await asyncio.gather(*(ask() for _ in range(effort.requests)))
    return counter.rate


class Counter:
    """Counts what is done in some seconds, once everything is under way.

    From one completion to the first that is so many seconds later: a batch that is half done at either end spoils nothing, and a machine
    that stands still for a while makes the time longer instead of the count meaningless.

    Args:
        seconds: how long it counts, at least; half of that goes before.
        server: whose CPU time counts too.
    """

    def __init__(self, seconds: float, server: Server | None = None) -> None:
        self._seconds = seconds
        self._server = server
        self._begin = time.perf_counter() + seconds / 2
        self._num = 0
        self._first: tuple[float, float, float] | None = None
        self._last: tuple[float, float, float] | None = None
        self._lock = threading.Lock()

    @property
    def is_over(self) -> bool:
        """Whether nothing counts any more."""
        return self._last is not None

    def count(self, num: int) -> None:
        """Counts what was done just now."""
        with self._lock:
            now = time.perf_counter()
            if now < self._begin or self._last is not None:
                return
            if self._first is None:
                self._first = self._moment(now)
                return
            self._num += num
            if now >= self._first[0] + self._seconds:
                self._last = self._moment(now)

    @property
    def rate(self) -> Rate:
        """How fast that was, once it is over.

        Raises:
            RuntimeError: it is not over.
        """
        if self._first is None or self._last is None:
            raise RuntimeError("found a measurement under way, expected one that is over")
        wall, own, server = (last - first for last, first in zip(self._last, self._first, strict=True))
        return Rate(self._num / wall, own / self._num, server / self._num)

    def _moment(self, now: float) -> tuple[float, float, float]:
        """Returns the time and the CPU time of this process and the server's."""
        return now, time.process_time(), self._server.cpu_seconds() if self._server is not None else 0.0


@dataclasses.dataclass(frozen=True)
class Server:
    """A server in a process of its own.

    Attributes:
        address: of the front door.
        process_id: its.
    """

    address: str
    process_id: int

    def cpu_seconds(self) -> float:
        """Returns the CPU time it has taken so far; 0 where the system does not tell."""
        file = pathlib.Path(f"/proc/{self.process_id}/stat")
        if not file.exists():
            return 0.0
        # Behind the command's name, which may hold blanks: the 12th and 13th field are user and system time.
        fields = file.read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def server_process(repository: pathlib.Path, *arguments: str) -> Iterator[Server]:
    """Serves a repository in a process of its own, with default settings but for these arguments."""
    command = [
        *(sys.executable, "-m", "server.cli", "serve", "--repository", str(repository)),
        *("--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--drain", "0", *arguments),
    ]
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    with process:
        found = re.search(r"at (\S+), admin", process.stdout.readline() if process.stdout is not None else "")
        if found is None:
            raise RuntimeError("the server did not start; it says why above")
        try:
            yield Server(found[1], process.pid)
        finally:
            process.send_signal(signal.SIGTERM)


def smooth_image(size: int) -> Pixels:
    """Returns an image with about as much detail as a photograph, [size, size, 3]."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    noise = random.normal(0, 4, (size, size, 3))
    return np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)


def to_jpeg(pixels: Pixels) -> bytes:
    """Returns an image as a JPEG file of the usual quality."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class System:
    """What is published for a figure.

    Attributes:
        name: of its folder.
        architecture: its name in benchmarks.random_models.
        first_own_block: all below are shared.
        all_alike: whether every task has the blocks from there on of its own; otherwise `route` has none and `other` all of them.
    """

    name: str
    architecture: str
    first_own_block: int
    all_alike: bool


@dataclasses.dataclass(frozen=True)
class Measurement:
    """How a figure is measured.

    Attributes:
        measure: does it.
        system: what on.
    """

    measure: Callable[[Published, Effort, Report], None]
    system: System


_MANY_TASKS = System("many-tasks", "SMALL", 10, all_alike=True)
_THREE_PIECES = System("three-pieces", "TINY", 6, all_alike=False)

MEASUREMENTS = {
    "S1": Measurement(measure_s1, _MANY_TASKS),
    "S4": Measurement(measure_s4, _THREE_PIECES),
    "S5": Measurement(measure_s5, _THREE_PIECES),
}

if __name__ == "__main__":
    main()
