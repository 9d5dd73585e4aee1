"""S6: what a limit of memory costs, where there are more tasks than it has room for.

ViT-Ti/16 at 224 px, 1,024 tasks with a final norm and a head of their own each, all blocks shared. The embedded engine with 16 questions
open at a time, one image and one task each: requests per second with tasks drawn at random, against one task asked all the time, in one
process, in turns. The figure is that of a quarter of the memory that all segments take. The lines also have it without a limit and with
less, down to room for one route, and on a model that computes a hundredth as long, where a load weighs most.

Beside it: what loading a head costs, and what a session takes of memory (RSS) beside what the engine counts for it.

Weights are random; heads are made of one that was exported, with other weights. Each measurement runs in a fresh process without torch.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import gc
import hashlib
import pathlib
import queue
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks import published
from benchmarks.published import Own, System
from benchmarks.reporting import Ratio, Target, milliseconds, rounded, seconds_of
from benchmarks.serve.workbench import Workbench
from server.config import EngineSettings
from server.embedded.engine import EmbeddedEngine
from server.embedded.memory import resident_bytes
from server.embedded.sessions import SegmentSession, prepare_process
from server.engine import Question
from server.generation import Generation, Segment, Task
from server.repository import Repository


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        architectures: of `benchmarks.published`, by name; the first gives the figure.
        tasks: how many.
        repetitions: of each measurement.
        seconds: of each side in one repetition.
        shares: of what all segments take, the limits beside none and the least that goes.
    """

    architectures: tuple[str, ...]
    tasks: int
    repetitions: int
    seconds: float
    shares: tuple[float, ...]


FULL = Effort(("TINY", "CHARACTERS"), tasks=1024, repetitions=5, seconds=3.0, shares=(0.25, 0.1))
SMOKE = Effort(("SMOKE",), tasks=16, repetitions=2, seconds=0.2, shares=(0.25,))

FIGURE_SHARE = 0.25
REQUESTS = 16
"""Questions open at a time."""


def measure(bench: Workbench) -> None:
    """Measures S6."""
    effort = SMOKE if bench.effort.smoke else FULL
    with tempfile.TemporaryDirectory(prefix="munet-serve-memory-") as folder:
        for place, name in enumerate(effort.architectures):
            root = pathlib.Path(folder) / name
            bench.apart(_publish, root, name, effort.tasks)
            _measure_model(bench, effort, root, name, gives_figure=place == 0)


def _measure_model(bench: Workbench, effort: Effort, root: pathlib.Path, model: str, *, gives_figure: bool) -> None:
    sizes = bench.apart(_session_sizes, root)
    bench.report.line(figure="S6", model=model, tasks=effort.tasks, **sizes)
    whole, least = sizes["all_counted_bytes"], sizes["largest_route_counted_bytes"]
    limits = {"none": None} | {f"{share:.0%}": max(least, round(share * whole)) for share in effort.shares} | {"one route": least}
    for limit, limit_bytes in limits.items():
        ratio, found = bench.apart(_random_beside_hot, root, limit_bytes, effort)
        if gives_figure and limit == f"{FIGURE_SHARE:.0%}":
            bench.report.figure("S6", ratio.median, Target(">=", 0.8))
        bench.report.line(
            figure="S6",
            model=model,
            limit=limit,
            limit_bytes=limit_bytes,
            random_per_second=rounded(float(np.median(ratio.above))),
            hot_per_second=rounded(float(np.median(ratio.below))),
            ratio=ratio.spread(),
            **found,
        )


# What is measured on


def _publish(root: pathlib.Path, architecture: str, num_tasks: int) -> None:
    """Exports a system of two tasks, and makes more heads of the first's. To be run in a process of its own: it alone needs torch."""
    from benchmarks import random_models

    random_models.publish(root, System(architecture, getattr(published, architecture), ({"task-0": Own(), "task-1": Own()},)))
    generation = Repository(root / "repository").read()
    head = onnx.load(generation.segments[generation.tasks["task-0"].route[-1]].model)
    (root / "heads").mkdir()
    for number in range(num_tasks):
        rng = np.random.default_rng(number)
        for tensor in head.graph.initializer:
            values = numpy_helper.to_array(tensor)
            if values.dtype == np.float32:
                noisy = (values + 0.01 * rng.standard_normal(values.shape)).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(noisy, tensor.name))
        (root / "heads" / f"{number}.onnx").write_bytes(head.SerializeToString())


def _read(root: pathlib.Path) -> Generation:
    """Returns the published generation with a task for each head."""
    whole = Repository(root / "repository").read()
    first = whole.tasks["task-0"]
    segments: dict[str, Segment] = {name: whole.segments[name] for name in first.route[:-1]}
    tasks: dict[str, Task] = {}
    for file in sorted((root / "heads").iterdir(), key=lambda file: int(file.stem)):
        name = f"seg-{int(file.stem):012x}"
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        segments[name] = dataclasses.replace(whole.segments[first.route[-1]], name=name, model=file, sha256=digest)
        task = f"task-{file.stem}"
        tasks[task] = dataclasses.replace(first, name=task, route=(*first.route[:-1], name))
    return dataclasses.replace(whole, segments=segments, tasks=tasks)


# Measurements, each in a process of its own


def _session_sizes(root: pathlib.Path) -> dict[str, Any]:
    """Opens all sessions, one after the other: what they take, and how long that takes."""
    prepare_process(1)
    generation = _read(root)
    heads = [generation.segments[task.route[-1]] for task in generation.tasks.values()]
    others = [segment for name, segment in generation.segments.items() if segment not in heads]
    kept = [SegmentSession(segment) for segment in (*others, heads[0])]
    before = _rss_bytes()
    first = []
    for head in heads[1:]:
        started = time.perf_counter()
        kept.append(SegmentSession(head))
        first.append(time.perf_counter() - started)
    taken = (_rss_bytes() - before) / len(first)
    again = [seconds_of(functools.partial(SegmentSession, head, is_inspected=True)) for head in heads[1:]]
    return {
        "head_file_bytes": heads[0].model.stat().st_size,
        "head_rss_bytes": round(taken),
        "head_counted_bytes": resident_bytes(heads[0]),
        "shared_counted_bytes": sum(map(resident_bytes, others)),
        "largest_route_counted_bytes": sum(map(resident_bytes, (*others, heads[0]))),
        "all_counted_bytes": sum(map(resident_bytes, (*others, *heads))),
        "first_load_ms": milliseconds(first),
        "load_again_ms": milliseconds(again),
    }


def _random_beside_hot(root: pathlib.Path, limit_bytes: int | None, effort: Effort) -> tuple[Ratio, dict[str, Any]]:
    """Returns requests per second of tasks at random over those of one task, and what was seen of memory."""
    generation = _read(root)
    engine = EmbeddedEngine(EngineSettings(memory_limit_bytes=limit_bytes))
    engine.load(generation)
    loaded = _rss_bytes()
    names = list(generation.tasks)
    choice = random.Random(0)
    totals: collections.Counter[str] = collections.Counter()

    def draw() -> str:
        totals["requests"] += 1
        return choice.choice(names)

    def at_random() -> float:
        before = engine.memory().num_loads
        rate = _rate(engine, generation, iter(draw, None), effort.seconds)
        totals["loads"] += engine.memory().num_loads - before
        return rate

    def hot() -> float:
        name = choice.choice(names)
        return _rate(engine, generation, iter(lambda: name, None), effort.seconds)

    _rate(engine, generation, iter(lambda: choice.choice(names), None), effort.seconds / 2)
    above, below = [], []
    for repetition in range(effort.repetitions):
        for side, rates in ((at_random, above), (hot, below))[:: 1 if repetition % 2 else -1]:
            rates.append(side())
    memory = engine.memory()
    found = {
        "resident": memory.num_resident,
        "resident_counted_bytes": memory.resident_bytes,
        "loads_per_request": rounded(totals["loads"] / max(1, totals["requests"])),
        "rss_after_load_bytes": loaded,
        "rss_bytes": _rss_bytes(),
    }
    engine.close()
    return Ratio(above, below), found


def _rate(engine: EmbeddedEngine, generation: Generation, tasks: Iterator[str], seconds: float) -> float:
    """Keeps questions open, one image and the next task each, and returns how many are answered a second."""
    size = next(iter(generation.tasks.values())).image_size
    image = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    answered: queue.SimpleQueue[concurrent.futures.Future[Any]] = queue.SimpleQueue()

    def ask() -> None:
        engine.answer(Question(generation, image, (next(tasks),))).add_done_callback(answered.put)

    for _ in range(REQUESTS):
        ask()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        answered.get().result()
        count += 1
        ask()
    took = time.perf_counter() - started
    for _ in range(REQUESTS):
        answered.get().result()
    return count / took


def _rss_bytes() -> int:
    gc.collect()
    fields: Sequence[str] = pathlib.Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096
