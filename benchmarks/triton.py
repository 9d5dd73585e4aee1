"""Which engine when: the embedded one, the wheel's Triton with shared segments, coarse ones and one model per task, the front door on it.

    python -m benchmarks.triton [--only T4 T50 L4] [--smoke] [--results benchmarks/results]

T4   4 tasks on a root like the bundled one (ViT-Ti width, 3 blocks, 32 px), asked one task an image.
T50  50 such tasks.
L4   4 tasks on ViT-Ti/16 at 224 px, 12 blocks of which 10 are shared by all, asked all four an image.

Of the tasks of T4 and T50, every third has only a final norm and a head of its own, every third the second block too, every third the
last one: shared routes have four segments. Each system is published four times (`layout`): with shared segments; with the coarse segments
that the cost model of evolve.export.coarsening chooses for the embedded engine; with those that it chooses for Triton; and with
one model for each task. Layouts that come out alike are measured once.

Servers, all up at once, each asked in turns by the same asynchronous client in this process:

- `embedded`: `munet-server serve` in a process of its own, through its front door (Classify, ClassifyTasks), raw pixels;
- `triton`: the wheel's tritonserver with explicit loading, plain KServe v2 calls of the tasks' ensembles, and of the ensemble of all tasks
  with the outputs of those that are asked. `one model per task` is asked without ensembles, several tasks by as many calls at once;
- `front door on triton`: `munet-server serve --engine triton` in a process of its own on the Triton with coarse segments, which is also
  asked without it. Its memory is that of both, its load seconds are Triton's.

A line a server says requests per second, p50 and p99 at 1, 4 and 16 requests at a time for one task each (tasks in turn), the same for
several tasks an image at 1 and 4, seconds to load, and memory of all its processes: PSS, which counts what they share once, and RSS,
which counts it in each. Load seconds of the embedded engine are those of a fresh process that loads nothing else.
The hop lines are least squares over p50 at one request at a time by pieces a route, of one engine's layouts. The figure
of a system is the p50 of Triton's shared segments over that of its coarse ones, for the requests that the coarse ones were chosen for.

Weights are random: what is measured does not depend on them. `make triton` must have made Triton's environment. Prints JSON lines, the
last one sums up; without --smoke it takes about 14 minutes on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.published import CHARACTERS, SMOKE, TINY, Architecture, Own
from benchmarks.reporting import Report, Target, add_arguments, milliseconds, rounded
from benchmarks.serve.open_inference import pixels_request
from benchmarks.serve.processes import descendants, memory, server_process
from benchmarks.serve.sides import Pixels, check_equal
from benchmarks.serve.workbench import in_fresh_process
from server.client import AsyncClient
from server.config import EngineSettings
from server.embedded.engine import EmbeddedEngine
from server.engine import Question
from server.generation import Generation
from server.repository import Repository
from server.triton.environment import find_environment
from server.triton.process import TritonProcess

FRONT_DOOR = "front door on triton"
SHARED, EMBEDDED_COARSE, TRITON_COARSE, WHOLE = "shared", "coarse for embedded", "coarse for triton", "one model per task"


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        repetitions: of each load on each server, in turns.
        seconds: of one, for a small model.
        at_a_time: requests that a load of one task has open.
        several_at_a_time: the same of one of several tasks.
    """

    repetitions: int
    seconds: float
    at_a_time: tuple[int, ...] = (1, 4, 16)
    several_at_a_time: tuple[int, ...] = (1, 4)


FULL = Effort(repetitions=3, seconds=1.5)
QUICK = Effort(repetitions=1, seconds=0.2, at_a_time=(1, 2), several_at_a_time=(1,))


@dataclasses.dataclass(frozen=True)
class System:
    """What is measured.

    Attributes:
        architecture: of the root.
        tasks: how many.
        own_blocks: blocks of its own of the first, second, ... task, then from the start again.
        tasks_per_image: that coarse segments are chosen for.
        several: tasks of a request for several.
        slowness: how many times longer a load takes than of a small model.
    """

    architecture: Architecture
    tasks: int
    own_blocks: tuple[tuple[int, ...], ...]
    tasks_per_image: int
    several: int
    slowness: float = 1.0

    @property
    def own_by_task(self) -> dict[str, Own]:
        """What each task has of its own."""
        return {f"task-{number}": Own(self.own_blocks[number % len(self.own_blocks)]) for number in range(self.tasks)}


SYSTEMS = {
    "T4": System(CHARACTERS, 4, ((), (1,), (2,)), tasks_per_image=1, several=4),
    "T50": System(CHARACTERS, 50, ((), (1,), (2,)), tasks_per_image=1, several=4),
    "L4": System(TINY, 4, ((10, 11),), tasks_per_image=4, several=4, slowness=2.0),
}
SMOKE_SYSTEMS = {"T4": System(SMOKE, 2, ((), (2,)), tasks_per_image=1, several=2)}


def main() -> None:
    """Measures what is asked for and prints it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS), help="systems; all by default")
    add_arguments(parser)
    arguments = parser.parse_args()
    find_environment()
    report = Report("triton", arguments)
    systems, effort = (SMOKE_SYSTEMS, QUICK) if arguments.smoke else (SYSTEMS, FULL)
    for name in [name for name in arguments.only if name in systems]:
        with tempfile.TemporaryDirectory(prefix="munet-triton-") as folder:
            measure(name, systems[name], effort, pathlib.Path(folder), report)
    model = "tiny random weights" if arguments.smoke else "ViT-Ti/16, 3 blocks at 32 px (T4, T50), 12 at 224 px (L4), float32"
    report.finish(model)


# Layouts


@dataclasses.dataclass(frozen=True)
class Layout:
    """A system published in one way.

    Attributes:
        name: of the way.
        repository: the model repository.
        choice: what the cost model says of it; None where it did not choose.
    """

    name: str
    repository: pathlib.Path
    choice: dict[str, Any] | None


def publish(folder: pathlib.Path, system: System) -> list[Layout]:
    """Publishes a system in every way. To be run in a process of its own: it alone needs torch."""
    from benchmarks import random_models
    from evolve.export.coarsening import ENGINE_COSTS, Coarseness
    from evolve.export.publish import export_system

    built = random_models.build(folder, system.architecture, system.own_by_task)
    costs = ENGINE_COSTS["triton"]
    coarsenesses = {
        SHARED: None,
        EMBEDDED_COARSE: Coarseness(ENGINE_COSTS["embedded"], system.tasks_per_image),
        TRITON_COARSE: Coarseness(costs, system.tasks_per_image),
        # As if hops took forever and memory were free.
        WHOLE: Coarseness(dataclasses.replace(costs, hop_seconds=1e6), memory_factor=1e6),
    }
    layouts = []
    for number, (name, coarseness) in enumerate(coarsenesses.items()):
        repository = folder / f"repository-{number}"
        choice = export_system(built, repository, coarseness=coarseness).choice
        said = (
            None
            if choice is None or name == WHOLE
            else {"says": str(choice), "ms_an_answer": rounded(1e3 * choice.chosen.seconds)}
        )
        layouts.append(Layout(name, repository, said))
    return layouts


def load_embedded(repository: pathlib.Path) -> float:
    """Returns the seconds in which an embedded engine loads a repository. To be run in a process of its own."""
    generation = Repository(repository).read()
    engine = EmbeddedEngine(EngineSettings())
    started = time.perf_counter()
    engine.load(generation)
    seconds = time.perf_counter() - started
    engine.close()
    return seconds


def time_embedded(repositories: Sequence[pathlib.Path], seconds: float) -> list[float]:
    """Returns p50 seconds of one task, tasks in turn, within the engine's own process, layouts in turn for so many seconds each."""
    generations = [Repository(repository).read() for repository in repositories]
    size = next(iter(generations[0].tasks.values())).image_size
    image = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    engine = EmbeddedEngine(EngineSettings())
    for generation in generations:
        engine.load(generation)
    taken: list[list[float]] = [[] for _ in generations]
    end = time.perf_counter() + seconds * len(generations)
    for number, task in enumerate(itertools.cycle(generations[0].tasks)):
        for generation, each in zip(generations, taken, strict=True):
            started = time.perf_counter()
            engine.answer(Question(generation, image, (task,))).result()
            # Each task's first time warms it up.
            if number >= len(generation.tasks):
                each.append(time.perf_counter() - started)
        if time.perf_counter() > end and taken[-1]:
            break
    engine.close()
    return [statistics.median(each) for each in taken]


# Servers


Ask = Callable[[Pixels, Sequence[str]], Awaitable[Mapping[str, Any]]]
"""Asks some tasks about one image, [1, size, size, 3]; gives logits by task, [1, classes] float32."""


@dataclasses.dataclass(frozen=True)
class Serving:
    """A server that is up.

    Attributes:
        engine: embedded, triton or the front door on triton.
        layout: what it serves.
        address: where.
        generation: what it serves, read.
        processes: its process ids.
        load_seconds: of all segments.
        client: gives the function that asks it, for as long as an event loop runs.
    """

    engine: str
    layout: Layout
    address: str
    generation: Generation
    processes: Callable[[], list[int]]
    load_seconds: float
    client: Callable[[], contextlib.AbstractAsyncContextManager[Ask]]

    @property
    def pieces_per_route(self) -> float:
        """How many segments a task's route has, on average."""
        return statistics.mean(len(task.route) for task in self.generation.tasks.values())


@contextlib.contextmanager
def embedded(layout: Layout) -> Iterator[Serving]:
    """Serves a repository with the embedded engine."""
    load_seconds = in_fresh_process(load_embedded, layout.repository)
    with server_process(layout.repository) as server:
        generation = Repository(layout.repository).read()
        client = functools.partial(front_door_client, server.address)
        yield Serving("embedded", layout, server.address, generation, lambda: [server.process_id], load_seconds, client)


@contextlib.asynccontextmanager
async def front_door_client(address: str) -> Any:
    """Gives the function that asks a front door."""
    async with AsyncClient(address) as connected:

        async def ask(image: Pixels, tasks: Sequence[str]) -> dict[str, Any]:
            if len(tasks) == 1:
                answer = await connected.classify(tasks[0], image[0], include_logits=True)
                return {tasks[0]: np.array([answer.classifications[0].logits], np.float32)}
            found = (await connected.classify_tasks(image[0], tasks, include_logits=True)).tasks
            return {each.task: np.array([each.classification.logits], np.float32) for each in found}

        yield ask


@contextlib.contextmanager
def triton(layout: Layout) -> Iterator[Serving]:
    """Serves a repository with the wheel's Triton."""
    generation = Repository(layout.repository).read()
    with TritonProcess(find_environment(), layout.repository) as process:
        started = time.perf_counter()
        with grpc.insecure_channel(process.addresses.grpc) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            for name in generation.segments:
                stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name=name))
            load_seconds = time.perf_counter() - started
            for name in (*(task.ensemble for task in generation.tasks.values()), *generation.ensembles.values()):
                stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(model_name=name))

        address = process.addresses.grpc
        client = functools.partial(triton_client, address, generation, ask_ensembles)
        yield Serving(
            "triton", layout, address, generation, lambda: [process.pid, *descendants(process.pid)], load_seconds, client
        )


@contextlib.contextmanager
def behind_front_door(serving: Serving) -> Iterator[Serving]:
    """Has a front door compute with a Triton that is up."""
    with server_process(serving.layout.repository, "--engine", "triton", "--triton", serving.address) as server:
        yield dataclasses.replace(
            serving,
            engine=FRONT_DOOR,
            address=server.address,
            processes=lambda: [server.process_id, *serving.processes()],
            client=functools.partial(front_door_client, server.address),
        )


def without_ensembles(serving: Serving, layout: Layout) -> Serving:
    """Returns the same Triton with one model for each task as somebody without ensembles would ask it."""
    client = functools.partial(triton_client, serving.address, serving.generation, ask_models)
    return dataclasses.replace(serving, layout=layout, client=client)


@contextlib.asynccontextmanager
async def triton_client(address: str, generation: Generation, asker: Any) -> Any:
    """Gives the function that asks a Triton."""
    async with grpc.aio.insecure_channel(address) as channel:
        calls = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        yield lambda image, tasks: asker(calls, generation, image, tasks)


async def ask_ensembles(calls: Any, generation: Generation, image: Pixels, tasks: Sequence[str]) -> dict[str, Any]:
    """Asks for one task by its ensemble, for several by that of all tasks with the outputs of these."""
    if len(tasks) == 1:
        return {tasks[0]: await infer(calls, generation.tasks[tasks[0]].ensemble, image)}
    request = pixels_request(generation.ensembles[image.shape[1]], image)
    for task in tasks:
        request.outputs.add(name=f"logits_{task}")
    response = await calls.ModelInfer(request)
    names = [output.name.removeprefix("logits_") for output in response.outputs]
    return {name: to_logits(content) for name, content in zip(names, response.raw_output_contents, strict=True)}


async def ask_models(calls: Any, generation: Generation, image: Pixels, tasks: Sequence[str]) -> dict[str, Any]:
    """Asks each task's one model, all at once."""
    answers = await asyncio.gather(*(infer(calls, generation.tasks[task].route[0], image) for task in tasks))
    return dict(zip(tasks, answers, strict=True))


async def infer(calls: Any, model: str, image: Pixels) -> Any:
    """Returns the logits of a model of one output, [1, classes]."""
    return to_logits((await calls.ModelInfer(pixels_request(model, image))).raw_output_contents[0])


def to_logits(content: bytes) -> Any:
    """Returns what an output of one row holds."""
    return np.frombuffer(content, np.float32)[np.newaxis]


# Loads


@dataclasses.dataclass
class Load:
    """What a load met, all repetitions together.

    Attributes:
        latencies: seconds of each request.
        rates: requests per second of each repetition.
    """

    latencies: list[float] = dataclasses.field(default_factory=list)
    rates: list[float] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, float]:
        """Returns what a line says of it."""
        return {
            "per_second": rounded(statistics.median(self.rates)),
            "p50_ms": milliseconds(self.latencies),
            "p99_ms": rounded(1e3 * float(np.percentile(self.latencies, 99))),
        }


async def put_load(
    ask: Ask, image: Pixels, requests: Iterator[Sequence[str]], at_a_time: int, seconds: float, load: Load
) -> None:
    """Keeps so many requests open for some seconds; each is begun as another ends."""
    begun = time.perf_counter()
    latencies: list[float] = []

    async def keep_asking() -> None:
        while (started := time.perf_counter()) < begun + seconds:
            await ask(image, next(requests))
            latencies.append(time.perf_counter() - started)

    await asyncio.gather(*(keep_asking() for _ in range(at_a_time)))
    load.latencies += latencies
    load.rates.append(len(latencies) / (time.perf_counter() - begun))


def requests_of(tasks: Sequence[str], several: int) -> Iterator[Sequence[str]]:
    """Gives requests forever, tasks in turn."""
    endless = itertools.cycle(tasks)
    while True:
        yield [next(endless) for _ in range(several)]


Loads = dict[tuple[int, int], Load]
"""By tasks of a request and requests at a time."""


async def put_loads(servings: Sequence[Serving], system: System, effort: Effort) -> list[Loads]:
    """Puts every load on every server, in turns; all answers are compared first, which also warms up."""
    size = next(iter(servings[0].generation.tasks.values())).image_size
    image = np.random.default_rng(0).integers(0, 256, (1, size, size, 3), dtype=np.uint8)
    tasks = list(system.own_by_task)
    kinds = [(1, count) for count in effort.at_a_time] + [(system.several, count) for count in effort.several_at_a_time]
    loads: list[Loads] = [{kind: Load() for kind in kinds} for _ in servings]
    async with contextlib.AsyncExitStack() as stack:
        asks = [await stack.enter_async_context(serving.client()) for serving in servings]
        expected = {task: (await asks[0](image, [task]))[task] for task in tasks}
        for ask in asks:
            for request in [[task] for task in tasks] + [tasks[: system.several]]:
                for task, logits in (await ask(image, request)).items():
                    check_equal(logits, expected[task])
        for repetition in range(effort.repetitions):
            order = list(zip(asks, loads, strict=True))
            for kind in kinds:
                for ask, each in order[::-1] if repetition % 2 else order:
                    await put_load(ask, image, requests_of(tasks, kind[0]), kind[1], effort.seconds * system.slowness, each[kind])
    return loads


# A system


def measure(name: str, system: System, effort: Effort, folder: pathlib.Path, report: Report) -> None:
    """Measures one system on all servers."""
    layouts = {layout.name: layout for layout in in_fresh_process(publish, folder, system)}
    with contextlib.ExitStack() as stack:
        servings = [stack.enter_context(embedded(layouts[SHARED])), stack.enter_context(triton(layouts[SHARED]))]
        if routes_of(layouts[EMBEDDED_COARSE]) != routes_of(layouts[SHARED]):
            servings.append(stack.enter_context(embedded(layouts[EMBEDDED_COARSE])))
        if routes_of(layouts[TRITON_COARSE]) != routes_of(layouts[SHARED]):
            servings.append(stack.enter_context(triton(layouts[TRITON_COARSE])))
        recommended = [serving for serving in servings if serving.engine == "triton"][-1]
        alike = routes_of(layouts[TRITON_COARSE]) == routes_of(layouts[WHOLE])
        whole = recommended if alike else stack.enter_context(triton(layouts[WHOLE]))
        servings.append(without_ensembles(whole, layouts[WHOLE]))
        servings.append(stack.enter_context(behind_front_door(recommended)))
        loads = asyncio.run(put_loads(servings, system, effort))
        memories = [memory(serving.processes()) for serving in servings]
    p50: dict[tuple[str, str], dict[tuple[int, int], float]] = {}
    for serving, each, taken in zip(servings, loads, memories, strict=True):
        report.line(figure=name, **describe(serving), **taken, loads=[describe_load(*item) for item in each.items()])
        p50[serving.engine, serving.layout.name] = {kind: statistics.median(load.latencies) for kind, load in each.items()}
    asked_by_ensemble = [serving for serving in servings if serving.engine == "triton" and serving.layout.name != WHOLE]
    hops = {"triton": [(serving.pieces_per_route, p50["triton", serving.layout.name][1, 1]) for serving in asked_by_ensemble]}
    hops["embedded"] = time_pieces(
        [layouts[SHARED], layouts[EMBEDDED_COARSE], layouts[WHOLE]], effort.repetitions * effort.seconds * system.slowness
    )
    for engine, points in hops.items():
        report.line(figure=name, engine=engine, **describe_hops(points))
    kind = (min(system.tasks_per_image, system.tasks), 1)
    shared = p50["triton", SHARED]
    gain = shared[kind] / p50.get(("triton", TRITON_COARSE), shared)[kind]
    report.figure(name, gain, Target(">=", 1.0), f"coarse segments for {kind[0]} tasks an image")


def routes_of(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Returns the routes of a layout by task."""
    return {name: task.route for name, task in Repository(layout.repository).read().tasks.items()}


def time_pieces(layouts: Sequence[Layout], seconds: float) -> list[tuple[float, float]]:
    """Returns pieces a route and p50 seconds within the embedded engine's process, one image and task at a time; see `time_embedded`."""
    lengths = [statistics.mean(map(len, routes_of(layout).values())) for layout in layouts]
    repositories = [layout.repository for layout in layouts]
    return list(zip(lengths, in_fresh_process(time_embedded, repositories, seconds), strict=True))


def describe(serving: Serving) -> dict[str, Any]:
    """Returns what a line says of a server beside its loads and its memory."""
    num_segments = len(serving.generation.segments)
    said = {
        "engine": serving.engine,
        "layout": serving.layout.name,
        "segments": num_segments,
        "pieces_per_route": rounded(serving.pieces_per_route),
        "load_seconds": rounded(serving.load_seconds),
        "load_ms_per_segment": rounded(1e3 * serving.load_seconds / num_segments),
    }
    return said if serving.layout.choice is None else {**said, "cost_model": serving.layout.choice}


def describe_load(kind: tuple[int, int], load: Load) -> dict[str, float]:
    """Returns what a line says of a load."""
    return {"tasks_per_request": kind[0], "at_a_time": kind[1], **load.to_dict()}


def describe_hops(points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Returns the least squares line through seconds by pieces."""
    pieces, seconds = np.array(sorted(set(points))).T
    said: dict[str, Any] = {"pieces": [rounded(each) for each in pieces], "p50_ms": [rounded(1e3 * each) for each in seconds]}
    if len(set(pieces)) > 1:
        said["hop_ms"] = rounded(1e3 * float(np.polyfit(pieces, seconds, 1)[0]))
    return said


if __name__ == "__main__":
    main()
