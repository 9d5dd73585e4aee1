"""A trainer that gives packs to workers on the nodes of a Ray cluster; docs/decisions/0016 says why it is made of actors.

Each worker is an actor that holds a trainer of its own: it opens the system where this process has it, gets the task's data once through
Ray's object store, and then one order at a time. Ray restarts and repeats nothing by itself. What is lost is decided here: an order whose
worker died, or turned out to be sick, is given to another one, and whichever answer to an order comes first is the only one.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from evolve.config import TrainingSettings
from evolve.data.task import TaskData
from evolve.errors import ClusterError, EvolveError, SettingsError, SystemFolderError, WorkersDiedError
from evolve.generation import GenerationPlan, Trainer
from evolve.layer import LayerSpec, Tensors
from evolve.objects import is_url
from evolve.observers import Tell
from evolve.store import System
from evolve.training import ray_gate
from evolve.training.device import resolve_device
from evolve.training.ray_cluster import connect
from evolve.training.spread import (
    MOST_DEATHS,
    START_SECONDS,
    UNKNOWN,
    Order,
    SpreadTrainer,
    make_trainer,
    size_of,
)
from munet.words import counted

QUIET_SECONDS = 30.0
"""So long a search waits for a first worker without a word."""

PATIENCE_SECONDS = 300.0
"""So long a search waits for a first worker while the cluster has no room for one."""

STRAGGLER_FACTOR = 3.0
"""An order is given to a second worker, if one is idle, once it took so many times the longest that any took before, ..."""

STRAGGLER_SECONDS = 60.0
"""... and at least so long. `spread.GIVE_UP_SECONDS` and its factor say when its worker is ended."""

TICK_SECONDS = 1.0
"""How often a search that waits for answers looks around."""

_FINAL = (SettingsError, ValueError)
"""Errors of a child or a plan: every worker would have them."""


@dataclasses.dataclass(eq=False)
class _Job:
    """An order, and how it goes; `layers` are those of a path that workers do not find where the system is."""

    order: Order
    layers: list[tuple[LayerSpec, Tensors]]
    failures: int = 0
    given_up: int = 0
    num_workers: int = 0
    is_overdue: bool = False
    is_told: bool = False
    done: bool = False


@dataclasses.dataclass(eq=False)
class _Worker:
    """An actor, and what it is at since when: it waits for a node, then prepares until it is ready, then has a job or none."""

    actor: Any
    future: concurrent.futures.Future[Any] | None
    node: str | None = None
    is_ready: bool = False
    process: int = 0
    host: str = ""
    processor: str = ""
    job: _Job | None = None
    since: float = 0.0


class RayTrainer(SpreadTrainer):
    """A Trainer (evolve.generation) whose packs are trained by workers on the nodes of a Ray cluster."""

    def __init__(self, system: System, data: TaskData, settings: TrainingSettings, tell: Tell = lambda _sentence: None) -> None:
        """Connects to the cluster and prepares to train; workers start with the first pack.

        Args:
            system: gives the layers; workers open it where it is, so every node must see it there.
            data: of the task; each worker gets them once. What is mapped from a cache must be seen by every node.
            settings: `workers` is how many there are: as many work as the cluster has room for, and more join while it grows, or stand in
                for one that seems to hang.
                `device = "auto"` is CUDA if a node of the cluster has a GPU.
            tell: told of workers that are lost, or that cannot work, and why.

        Raises:
            SettingsError: Ray is not installed, or the settings ask for a precision that the device does not have.
            ClusterError: the cluster cannot be reached, or has no room for the task's data.
        """
        super().__init__(system, data, settings, tell)
        self._system = system
        self._ray = connect(settings.address)
        device = _device(self._ray, settings)
        plain = settings.model_copy(update={"device": "cpu", "precision": "float32"})
        if device == "cpu":
            resolve_device(settings.model_copy(update={"device": device}))
        # What a trainer here would depend on, but on the device of the workers: here may be none.
        self._identity = {**make_trainer(system, data, plain).identity, "device": device}
        self._expected = ray_gate.installed()
        self._most_workers = settings.workers
        self._resources: dict[str, float] = {
            "num_cpus": settings.threads if settings.cpus_per_worker is None else settings.cpus_per_worker,
            "num_gpus": float(device == "cuda") if settings.gpus_per_worker is None else settings.gpus_per_worker,
        }
        self._ray.cloudpickle.register_pickle_by_value(ray_gate)
        # Ray sees to no restart and no second try: both are decided here.
        self._actors = self._ray.remote(max_restarts=0, max_task_retries=0, **self._resources)(ray_gate.Gate)
        given = settings.model_copy(update={"device": device})
        try:
            self._arguments = [self._ray.put((system.location, system.id, data, given, self._identity))]
        except self._ray.exceptions.RayError as error:
            raise ClusterError(
                f"could not put the data of task {data.name!r} into Ray's object store ({_short(error)})",
                "room for them in this node's memory, or on its disk",
                "start this node's Ray with a larger --object-store-memory, or make room where its session lies, /tmp/ray by default",
            ) from error
        self._workers: list[_Worker] = []
        self._refused: dict[str, EvolveError] = {}
        self._troubles: collections.Counter[str] = collections.Counter()
        self._avoiding: set[str] = set()
        self._failed_starts = 0
        self._told = ""
        self._waits = False
        weakref.finalize(self, _end, self._ray, self._workers)

    @property
    def identity(self) -> Mapping[str, str]:
        """See Trainer.identity: neither the cluster nor the number of workers is part of it."""
        return self._identity

    def _answers(self, orders: Sequence[Order]) -> Iterator[Any]:
        jobs = [_Job(order, [] if isinstance(order, GenerationPlan) else self._system.unshared_layers(order)) for order in orders]
        waiting = collections.deque(jobs)
        # What went wrong in an earlier generation may have passed.
        self._failed_starts = 0
        self._dismiss_lost()
        try:
            idle_since = time.monotonic()
            while not all(job.done for job in jobs):
                self._hire(min(self._most_workers, sum(not job.done for job in jobs)) + self._num_overdue())
                self._hand_out(waiting, jobs)
                if any(worker.node for worker in self._workers):
                    idle_since = time.monotonic()
                self._check_hope(time.monotonic() - idle_since)
                self._give_up(waiting)
                futures = [worker.future for worker in self._workers if worker.future is not None]
                concurrent.futures.wait(futures, TICK_SECONDS, concurrent.futures.FIRST_COMPLETED)
                for worker in [worker for worker in self._workers if worker.future is not None and worker.future.done()]:
                    job = worker.job
                    if job is None:
                        self._welcome(worker)
                    elif job.done:
                        self._let_go(worker)
                    else:
                        yield from self._take_answer(worker, job, waiting)
        finally:
            # Interrupted, an error of a pack, or a copy of an order that somebody else was quicker with: what still runs is of no use.
            for worker in [worker for worker in self._workers if worker.job is not None]:
                self._dismiss(worker)
            # Those that stood in for others.
            for worker in sorted(self._workers, key=lambda worker: not worker.is_ready)[self._most_workers :]:
                self._dismiss(worker)

    # Workers

    def _hire(self, wanted: int) -> None:
        """Asks Ray for the workers that are missing; those that it has no room for yet begin when it has."""
        avoided = self._avoided()
        if avoided - self._avoiding:
            # Those that wait for a node were asked for before it was known which to avoid.
            for worker in [one for one in self._workers if one.node is None or (one.node in avoided and one.job is None)]:
                self._dismiss(worker)
        self._avoiding = avoided
        if self._failed_starts >= MOST_DEATHS and any(worker.is_ready for worker in self._workers):
            return
        options = {"label_selector": {"ray.io/node-id": f"!in({','.join(sorted(avoided))})"}} if avoided else {}
        for _ in range(wanted - len(self._workers)):
            actor = self._actors.options(**options).remote()
            self._workers.append(_Worker(actor, actor.greet.remote().future()))

    def _avoided(self) -> set[str]:
        """Returns the nodes to hire nobody on: those that were refused, and those where workers failed in a row, if there are others."""
        sick = {node for node, number in self._troubles.items() if number > 1}
        return set(self._refused) | (sick if sick and self._usable_nodes() - sick else set())

    def _usable_nodes(self) -> set[str]:
        """Returns the nodes that are large enough for a worker and were not refused."""
        wanted = {"CPU": self._resources["num_cpus"], "GPU": self._resources["num_gpus"]}
        return {
            node["NodeID"]
            for node in self._ray.nodes()
            if node["Alive"]
            and node["NodeID"] not in self._refused
            and all(node["Resources"].get(name, 0) >= amount for name, amount in wanted.items())
        }

    def _welcome(self, worker: _Worker) -> None:
        """Looks at what a worker says that has its place, and has it prepare; or at what came of that."""
        try:
            said = self._result(worker)
        except Exception as error:
            # Its node may be lost, or Ray could not start it: nothing of ours has run.
            self._fail_to_start(worker, _short(error), error)
            return
        worker.future = None
        if worker.node is None:
            worker.node, worker.host, worker.process = said["node"], said["host"], said["process"]
            worker.since = time.monotonic()
            worker.future = worker.actor.begin.remote(self._expected, self._arguments).future()
            return
        refusal = self._refusal(worker, said)
        if refusal is None:
            worker.is_ready, worker.processor = True, said.get("processor", "")
            self._failed_starts = 0
            return
        self._dismiss(worker)
        if worker.node not in self._refused:
            self._refused[worker.node] = refusal
            self._tell(f"warning: no worker on {worker.host}: {refusal}")

    def _fail_to_start(self, worker: _Worker, reason: str, error: Exception | None = None) -> None:
        """Takes a worker away that will not work.

        Raises:
            WorkersDiedError: as many as may have failed, and none works.
        """
        self._failed_starts += 1
        self._dismiss(worker)
        self._tell(f"a worker could not start ({reason})")
        if self._failed_starts >= MOST_DEATHS and not any(other.is_ready for other in self._workers):
            raise WorkersDiedError(MOST_DEATHS, "as they started", reason) from error

    def _refusal(self, worker: _Worker, begun: Mapping[str, Any]) -> EvolveError | None:
        """Returns why a worker cannot work; None if it can."""
        where = f"on node {worker.host} ({(worker.node or '')[:8]})"
        installed = begun["installed"]
        if installed != self._expected:
            names = [name for name, version in self._expected.items() if installed.get(name) != version]
            found = ", ".join(f"{name} {installed.get(name)}" for name in names)
            expected = ", ".join(f"{name} {self._expected[name]}" for name in names)
            return ClusterError(
                f"found {found} {where}",
                f"{expected}, as where the search runs (of muNet's packages, a hash of the source)",
                "install the same on every node, such as one container image",
            )
        error = begun.get("error")
        if isinstance(error, EvolveError):
            return ClusterError(f"{error.found} {where}", error.expected, error.advice)
        if error is not None:
            return ClusterError(f"found {_short(error)} {where}", "a worker that starts")
        return None

    def _check_hope(self, idle_seconds: float) -> None:
        """Raises an error if no worker is left and none can come, or none came for a long time."""
        if any(worker.is_ready for worker in self._workers):
            self._waits = False
            return
        if self._refused and not self._usable_nodes():
            raise next(iter(self._refused.values()))
        if idle_seconds > QUIET_SECONDS and not self._waits:
            self._waits = True
            self._tell(f"waiting for a node with {self._needs} to spare; {self._described_cluster()}")
        if idle_seconds > PATIENCE_SECONDS:
            raise ClusterError(
                f"found no room for a worker in the cluster for {idle_seconds:.0f} s ({self._described_cluster()})",
                f"a node with {self._needs} to spare",
                "end what else uses it or add nodes, then run again, nothing that was finished is lost; "
                "or set cpus_per_worker or gpus_per_worker",
            )

    @property
    def _needs(self) -> str:
        return ", ".join(f"{name} = {amount:g}" for name, amount in self._resources.items())

    def _described_cluster(self) -> str:
        alive = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        parts = [f"CPU {of.get('CPU', 0):g}, GPU {of.get('GPU', 0):g}" for of in alive]
        counts = collections.Counter(parts)
        return f"nodes with {'; '.join(f'{part} ({count})' for part, count in counts.items())}; all of it may be taken"

    def _dismiss(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        _end(self._ray, [worker])

    def _dismiss_lost(self) -> None:
        """Takes workers away whose nodes were lost while they had nothing to do: no order is to be wasted on them."""
        alive = {node["NodeID"] for node in self._ray.nodes() if node["Alive"]} if self._workers else set()
        for worker in [worker for worker in self._workers if worker.node is not None and worker.node not in alive]:
            self._dismiss(worker)

    # Work

    def _hand_out(self, waiting: collections.deque[_Job], jobs: Sequence[_Job]) -> None:
        idle = [worker for worker in self._workers if worker.is_ready and worker.job is None]
        for worker in idle:
            job = waiting.popleft() if waiting else self._straggler(jobs)
            if job is None:
                return
            worker.job, worker.since = job, time.monotonic()
            job.num_workers += 1
            worker.future = worker.actor.carry_out.remote(job.order, job.layers).future()

    def _straggler(self, jobs: Sequence[_Job]) -> _Job | None:
        """Returns a job that takes so long that its worker may never end, and that nobody else is at."""
        for worker in self._overdue(self._straggler_seconds):
            if worker.job is not None and worker.job.num_workers == 1:
                self._tell(f"{self._described_overdue(worker)}; another one does the same")
                return worker.job
        return None

    def _overdue(self, bound: Callable[[_Job], float]) -> list[_Worker]:
        """Returns the workers that are at a job for longer than a bound for it, in seconds."""
        return [
            worker
            for worker in self._workers
            if worker.job is not None and not worker.job.done and time.monotonic() - worker.since > bound(worker.job)
        ]

    def _straggler_seconds(self, job: _Job) -> float:
        return max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * 2.0**job.given_up * self._longest * size_of(job.order))

    def _num_overdue(self) -> int:
        """Returns how many more workers are wanted: one for each that may never end, once there is something to tell that by."""
        found = self._overdue(self._straggler_seconds) if self._longest else []
        for worker in found:
            if worker.job is not None and not worker.job.is_overdue:
                worker.job.is_overdue = True
                if not any(other.is_ready and other.job is None for other in self._workers):
                    self._tell(f"{self._described_overdue(worker)}, far longer than any before; one more is asked for")
        return len(found)

    def _described_overdue(self, worker: _Worker) -> str:
        what = self._described([worker.job.order] if worker.job is not None else [])
        return f"the worker on {worker.host} has been at {what} for {time.monotonic() - worker.since:.0f} s"

    def _give_up(self, waiting: collections.deque[_Job]) -> None:
        """Ends workers that will hardly ever be done with what they are at; what they are at runs again."""
        now = time.monotonic()
        for worker in [one for one in self._workers if one.node and not one.is_ready and now - one.since > START_SECONDS]:
            self._fail_to_start(worker, f"on {worker.host}, not ready after {START_SECONDS:.0f} s")
        for worker in self._overdue(lambda job: self._most_seconds(size_of(job.order), job.given_up)):
            job = worker.job
            if job is not None and not self._longest:
                if not job.is_told:
                    job.is_told = True
                    self._tell(f"{self._described_overdue(worker)}; {UNKNOWN}")
            elif job is not None:
                self._tell(f"{self._described_overdue(worker)} and is ended; it runs again")
                job.given_up += 1
                self._put_back(worker, job, waiting)

    def _put_back(self, worker: _Worker, job: _Job, waiting: collections.deque[_Job]) -> None:
        """Takes a worker away; what it was at waits for another one, unless another one is at it."""
        self._dismiss(worker)
        job.is_overdue = job.is_told = False
        job.num_workers -= 1
        if job.num_workers == 0:
            waiting.appendleft(job)

    def _let_go(self, worker: _Worker) -> None:
        """Another worker was quicker: this one is free again, if it lives."""
        if worker.future is not None and worker.future.exception() is not None:
            self._dismiss(worker)
        worker.job = worker.future = None

    def _take_answer(self, worker: _Worker, job: _Job, waiting: collections.deque[_Job]) -> list[Any]:
        """Returns the one answer to a job; none if its worker failed: then the job is put back, and the worker away.

        Raises:
            WorkersDiedError: as many workers as may be died at it.
            Exception: an error of a child, or one that as many workers had.
        """
        try:
            answer = self._result(worker)
        except _FINAL:
            raise
        except Exception as error:
            died = isinstance(error, self._ray.exceptions.RayError)
            job.failures += 1
            self._troubles[worker.node or ""] += 1
            if died:
                # Whoever is idle beside it may be dead too: nobody would have noticed.
                for other in [one for one in self._workers if one.node == worker.node and one.is_ready and one.job is None]:
                    self._dismiss(other)
            self._put_back(worker, job, waiting)
            what = self._described([job.order])
            self._tell(f"a worker on {worker.host} {'died' if died else 'failed'} at {what} ({_short(error)}); it runs again")
            if job.failures < MOST_DEATHS:
                return []
            if died:
                raise WorkersDiedError(MOST_DEATHS, f"at {what}", _short(error)) from error
            raise
        self._note_duration(job.order, time.monotonic() - worker.since)
        # In a row: who can work again is not avoided.
        self._troubles.pop(worker.node or "", None)
        worker.job = worker.future = None
        job.done = True
        self._say_who_works()
        return [answer]

    def _result(self, worker: _Worker) -> Any:
        """Returns what a worker answered, or raises the very error that it met."""
        if worker.future is None:
            raise RuntimeError("a worker that was asked nothing")
        try:
            return worker.future.result()
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Exception):
                raise error.cause from None
            raise

    def _say_who_works(self) -> None:
        """Tells how many work, and where, when it has changed."""
        working = [worker for worker in self._workers if worker.is_ready]
        processors = sorted({worker.processor for worker in working})
        num_nodes = len({worker.node for worker in working})
        line = f"{counted(len(working), 'worker')} on {counted(num_nodes, 'node')}: {', '.join(processors)}"
        if working and line != self._told:
            self._told = line
            self._tell(line)
            if len(processors) > 1:
                self._tell("warning: unlike processors round differently: the search may end otherwise when it runs again")


def begin(where: str, system_id: str, data: TaskData, settings: TrainingSettings, expected: Mapping[str, str]) -> Any:
    """Makes a worker's trainer, in the worker.

    Args:
        where: the system is.
        system_id: its id.
        data: of the task.
        settings: of training, the device resolved.
        expected: identity of the trainer.

    Returns:
        The system, the trainer and what it computes on, in words; or the error that kept it from being made.
    """
    try:
        system = System.open(where)
        if system.id != system_id:
            raise SystemFolderError(
                f"found system {system.id} in {where}", f"system {system_id}", "mount the same folder on every node"
            )
        if is_url(where):
            # Of workers of this node that were killed as they fetched; in a shared folder it is for those who search.
            system.remove_unfinished()
        trainer: Trainer = make_trainer(system, data, settings)
        if dict(trainer.identity) != dict(expected):
            raise ClusterError(f"found a trainer {dict(trainer.identity)}", f"{dict(expected)}, as where the search runs")
    except (EvolveError, OSError, RuntimeError) as error:
        return error
    return system, trainer, _processor(settings)


def _processor(settings: TrainingSettings) -> str:
    import torch

    if settings.device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def _device(ray: Any, settings: TrainingSettings) -> str:
    if settings.device != "auto":
        return settings.device
    return "cuda" if any(node["Alive"] and node["Resources"].get("GPU", 0) > 0 for node in ray.nodes()) else "cpu"


def _end(ray: Any, workers: list[_Worker]) -> None:
    """Ends workers at once, also in the middle of a pack."""
    if ray.is_initialized():
        for worker in workers:
            ray.kill(worker.actor)
    workers.clear()


def _short(error: BaseException) -> str:
    """Returns the line of an error that says most; Ray's are long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("The actor died because", "The actor is dead because"))]
    text = telling[0].partition(" Some common causes")[0] if telling else (lines or [""])[0]
    name = "" if telling else f"{type(error).__name__}: "
    return f"{name}{text}"[:300]
