"""What `munet-evolve` does, as calls for scripts and notebooks. Builds and wires, for the command line too; docs/python.md shows how.

Importing it is quick: torch loads when a root, a trainer or an export is first needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from evolve.baseline import BaselineObserver, BaselinePlan, Method, SilentBaselineObserver
from evolve.baseline import run_baselines as run_active_baselines
from evolve.closing import ActiveTask
from evolve.config import Experiment, RootSettings, TrainingSettings, load_settings
from evolve.data.task import TaskData
from evolve.errors import DataError, SettingsError, SystemFolderError
from evolve.export.coarsening import Coarseness
from evolve.export.settings import Precision, Target
from evolve.generation import Trainer
from evolve.layer import PATCH_EMBED, LayerKind
from evolve.observers import Tell
from evolve.opening import check_unfinished, recover_search, restart_search
from evolve.search import Observer, SearchPlan, SilentObserver, check_image_size, run_rounds
from evolve.store import Location, System
from munet.names import check_task_name, similar_names

if TYPE_CHECKING:
    from evolve.export.publish import PublishResult
    from evolve.root import LoadedRoot
    from munet.signatures import PrivateKey

AnyPath = str | os.PathLike[str]
"""A file or folder."""

MakeTrainer = Callable[[System, TaskData], Trainer]
"""Makes the trainer of a task when its turn comes."""


class LoadingObserver(Protocol):
    """Told how the loading of data goes."""

    def loading(self, task: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """Gives, for the time in which a task's data are loaded, what is told how many steps are done, and of how many."""
        ...

    def loaded(self, data: TaskData, seconds: float) -> None:
        """A task's data are there; `data.warnings` says what is odd about them."""
        ...


class _SilentLoading:
    """Tells nobody."""

    def loading(self, task: str) -> AbstractContextManager[Callable[[int, int], None]]:
        return contextlib.nullcontext(lambda _done, _total: None)

    def loaded(self, data: TaskData, seconds: float) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run works on.

    Attributes:
        system: opened, or made.
        data: of the tasks that have rounds to do, in the order of the experiment.
        private: names of those tasks that are private.
    """

    system: System
    data: tuple[TaskData, ...]
    private: frozenset[str]


Unfinished = Literal["continue", "restart", "recover"]
"""What becomes of the rounds of tasks that an earlier run left unfinished. `continue`: they go on after the last finished children.
`restart`: they start over, their journals are kept in journal/removed. `recover`: they go on from what is whole of a journal that was
altered; a copy of it is kept."""


def load_experiment(file: AnyPath) -> Experiment:
    """Reads an experiment from a TOML file; relative paths in it are taken from the file's folder.

    Raises:
        SettingsError: the file is missing, no TOML, or a setting is unknown or impossible.
    """
    return load_settings(pathlib.Path(file), Experiment)


def open_or_create(location: Location, root: RootSettings | None = None) -> System:
    """Opens a system, or starts one.

    Args:
        location: its folder, or the URL of a store.
        root: the pretrained path that it starts from, or must have started from; by default the bundled one.

    Raises:
        SettingsError: the system there has another root.
        CheckpointError: the root cannot be loaded.
        SystemFolderError: the folder cannot be read or written, or holds a system of a newer format.
        DamagedError: the system's own root cannot be read.
    """
    settings = root or RootSettings()
    return _open(settings, location) or _create(settings, _load_root(settings), location)


def prepare(
    experiment: Experiment,
    location: Location,
    *,
    tasks: Collection[str] | None = None,
    loading: LoadingObserver | None = None,
    is_pending: Callable[[System, str], bool],
    check_root: Callable[[int], None] = lambda _num_blocks: None,
) -> Prepared:
    """Loads root and data, then opens or makes the system: what is wrong shows before anything is written.

    Args:
        experiment: what to run.
        location: of the system, a folder or the URL of a store.
        tasks: names of the experiment's tasks to run; all by default.
        loading: told how it goes.
        is_pending: tells, before any data are loaded, whether a task of a system that is there has something to do.
        check_root: raises SettingsError if a root of so many blocks will not do.

    Raises:
        EvolveError: of a kind that says what cannot be used: settings, root, data or folder.
    """
    from evolve.data.load import load_task

    told = loading or _SilentLoading()
    chosen = _choose(experiment, tasks)
    _check_executor(experiment.training)
    system = _open(experiment.root, location)
    if system is not None:
        _check_images(system, experiment.defaults.image_size)
        check_root(system.root.num_blocks)
        root = None
    else:
        # First, as it is quick and data may take hours.
        root = _load_root(experiment.root)
        check_image_size(root.layers[PATCH_EMBED][0].integer("patch_size"), experiment.defaults.image_size)
        check_root(sum(position.kind is LayerKind.BLOCK for position in root.layers))
    # All of them first, for the same reason.
    pending = [task for task in chosen if system is None or is_pending(system, task.name)]
    loaded = []
    for task in pending:
        started = time.monotonic()
        with told.loading(task.name) as progress:
            loaded.append(load_task(task, progress))
        told.loaded(loaded[-1], time.monotonic() - started)
    if system is None and root is not None:
        system = _create(experiment.root, root, location)
    if system is None:
        raise RuntimeError("neither a system nor a root")
    return Prepared(system, tuple(loaded), frozenset(task.name for task in chosen if task.private))


def prepare_search(
    experiment: Experiment,
    location: Location,
    *,
    tasks: Collection[str] | None = None,
    unfinished: Unfinished = "continue",
    loading: LoadingObserver | None = None,
    set_aside: Callable[[str, pathlib.Path], None] = lambda _task, _file: None,
) -> Prepared:
    """Prepares what `run_tasks` needs. Settings that an unfinished round was not begun with show before any data are loaded.

    Args:
        experiment: what to run.
        location: of the system, a folder or the URL of a store.
        tasks: names of the experiment's tasks to run; all by default.
        unfinished: what becomes of rounds that an earlier run left unfinished.
        loading: told how it goes.
        set_aside: told the task and where its journal, or a copy of it, is now, for each that starts over or was mended.

    Raises:
        EvolveError: see `prepare`, `run_tasks` and evolve.opening.
    """
    settings = SearchPlan.of(experiment).to_dict()

    def act(system: System, task: str, how: Callable[[System, str], pathlib.Path | None]) -> None:
        with system.evolving(task):
            aside = how(system, task)
        if aside is not None:
            set_aside(task, aside)

    def is_pending(system: System, task: str) -> bool:
        record = system.task(task)
        if record is not None and record.rounds >= experiment.search.rounds:
            return False
        if unfinished == "recover":
            act(system, task, recover_search)
        if unfinished != "restart":
            check_unfinished(system, task, settings)
        return True

    prepared = prepare(experiment, location, tasks=tasks, loading=loading, is_pending=is_pending)
    # Not before the data are there: until then nothing is given up.
    for data in prepared.data if unfinished == "restart" else ():
        act(prepared.system, data.name, restart_search)
    return prepared


def run(
    experiment: Experiment,
    location: Location,
    *,
    tasks: Collection[str] | None = None,
    unfinished: Unfinished = "continue",
    make_trainer: MakeTrainer | None = None,
    observer: Observer | None = None,
) -> System:
    """Brings the tasks of an experiment to its number of rounds, as `munet-evolve run` does, and goes on where an earlier run stopped.

    Args:
        experiment: what to run.
        location: of the system, a folder or the URL of a store; made if missing.
        tasks: names of the experiment's tasks to evolve; all by default.
        unfinished: what becomes of rounds that an earlier run left unfinished.
        make_trainer: see `run_tasks`.
        observer: told what happens.

    Raises:
        EvolveError: see `prepare_search` and `run_tasks`.
    """
    prepared = prepare_search(experiment, location, tasks=tasks, unfinished=unfinished)
    plan = SearchPlan.of(experiment)
    run_tasks(prepared.system, prepared.data, plan, private=prepared.private, make_trainer=make_trainer, observer=observer)
    return prepared.system


def run_tasks(
    system: System,
    data: Iterable[TaskData],
    plan: SearchPlan,
    *,
    private: Collection[str] = (),
    make_trainer: MakeTrainer | None = None,
    observer: Observer | None = None,
    on_closed: Callable[[str], None] = lambda _task: None,
) -> list[str]:
    """Brings tasks of any origin to the plan's number of rounds.

    A search that was stopped goes on with the same data, plan and trainer.

    Args:
        system: the system; tasks in it that are not listed serve as seeds only.
        data: of each task, in the order in which they are evolved in each round. Quality is measured on the first validation
            images, as many as the plan says: shuffle them once and for all.
        plan: how to search.
        private: names of tasks whose layers are to serve no other task.
        make_trainer: makes the trainer of a task when its turn comes; see `default_trainer`.
        observer: told what happens.
        on_closed: called with a task's name after each of its rounds.

    Returns:
        Names of the tasks of which a round was closed, once for each round.

    Raises:
        DataError: data that cannot be used, or are not those that a task was evolved on before.
        SettingsError: two tasks have one name, a search was begun with other settings, or settings cannot be used.
        BusyError: another process is evolving one of the tasks.
        TrainerError: a trainer of somebody's own does not keep its promises.
        MemoryShortageError: a child does not fit into memory.
        SystemFolderError: the system is damaged or cannot be written.
    """
    listed = list(data)
    _check_own_data(listed)
    make = make_trainer or default_trainer(plan.training)
    closed = []

    def finish(name: str) -> None:
        closed.append(name)
        on_closed(name)

    run_rounds(system, _active(system, listed, make, private), plan, observer or SilentObserver(), finish)
    return closed


def run_baselines(
    system: System,
    data: Iterable[TaskData],
    method: Method,
    plan: BaselinePlan,
    *,
    make_trainer: MakeTrainer | None = None,
    observer: BaselineObserver | None = None,
) -> None:
    """Trains the root on tasks of any origin without a search, as `munet-evolve baseline` does; see evolve.baseline.

    Args:
        system: gives the root; its tasks are neither used nor changed.
        data: of each task.
        method: what is trained, such as `Method.parse("finetune")`.
        plan: how long; it must be the search's that is compared with.
        make_trainer: see `run_tasks`.
        observer: told what happens.

    Raises:
        EvolveError: see `run_tasks`.
    """
    listed = list(data)
    _check_own_data(listed)
    make = make_trainer or default_trainer(plan.search.training)
    run_active_baselines(system, _active(system, listed, make, ()), method, plan, observer or SilentBaselineObserver())


def default_trainer(training: TrainingSettings, tell: Tell = lambda _sentence: None) -> MakeTrainer:
    """Returns what makes the trainer that runs use by default, with torch: children one after another, in packs, by worker processes.

    Args:
        training: device, precision, threads, pack size, number of workers and where they run matter.
        tell: told of workers: who works on a Ray cluster, who was lost, seems to hang or cannot work, and why.

    Raises:
        SettingsError: the settings ask for a device that is not there, for a precision that it does not have, or for a Ray that is not
            installed.
        ClusterError: there is no such Ray cluster.
    """
    _check_executor(training)
    if training.executor == "ray":
        from evolve.training.ray_trainer import RayTrainer

        return lambda system, data: RayTrainer(system, data, training, tell)
    from evolve.training.spread import make_trainer
    from evolve.training.workers import WorkersTrainer

    if training.workers == 1:
        return lambda system, data: make_trainer(system, data, training)
    return lambda system, data: WorkersTrainer(system, data, training, tell)


def publish(
    system: System,
    repository: AnyPath,
    *,
    target: Target = "cpu",
    precision: Precision = "float32",
    coarseness: Coarseness | None = None,
    response_cache: bool = False,
    signing_key: PrivateKey | None = None,
    canary_percent: float | None = None,
    progress: Callable[[str], None] | None = None,
) -> PublishResult:
    """Publishes every task's current path to a model repository, as `munet-evolve export` does.

    Args:
        system: what to publish.
        repository: its folder, made if missing.
        target: where Triton is to run it.
        precision: of the weights and hidden states that are published.
        coarseness: what coarse segments are chosen by, such as `Coarseness(ENGINE_COSTS["triton"])` of evolve.export.coarsening; without
            it, segments are as long as sharing allows.
        response_cache: whether a Triton that has a cache may keep what the segments answer that take the image.
        signing_key: signs the generation, see `evolve.signing.read_signing_key`; without it, there is no signature.
        canary_percent: publishes a canary beside the current generation, which gets so many of a hundred requests; see
            evolve.export.releases for what may become of it.
        progress: takes a sentence about each step.

    Raises:
        ExportError: see evolve.export.publish.export_system.
        DamagedError: something of the system cannot be read.
    """
    from evolve.export.publish import export_system

    return export_system(
        system,
        pathlib.Path(repository),
        target=target,
        precision=precision,
        coarseness=coarseness,
        response_cache=response_cache,
        signing_key=signing_key,
        canary_percent=canary_percent,
        progress=progress,
    )


def remove_task(system: System, task: str) -> None:
    """Removes a task. Layers that others use stay; publishing takes it out of the model repository.

    Raises:
        SystemFolderError: there is no such task, or the folder cannot be written.
        BusyError: another process is evolving it.
    """
    system.check_known(task)
    with system.evolving(task), system.locks.publishing():
        system.remove_task(task)


def _check_executor(training: TrainingSettings) -> None:
    """Looks whether there is what is to train: a device of this machine, or a cluster, whose devices are its own matter."""
    if training.executor == "ray":
        from evolve.training.ray_cluster import connect

        connect(training.address)
    else:
        from evolve.training.device import resolve_device

        resolve_device(training)


def _choose(experiment: Experiment, names: Collection[str] | None) -> list[Any]:
    known = [task.name for task in experiment.tasks]
    if names is None:
        return list(experiment.tasks)
    for name in names:
        if name not in known:
            similar = similar_names(name, known)
            raise SettingsError(
                f"found no task {name!r} in the experiment",
                f"one of {known}",
                f"did you mean {' or '.join(map(repr, similar))}?" if similar else "",
            )
    return [task for task in experiment.tasks if task.name in names]


def _open(root: RootSettings, location: Location) -> System | None:
    """Opens the system if there is one, and checks that it has the root that is asked for."""
    if not System.exists(location):
        return None
    system = System.open(location)
    source = _describe_root(root)
    if system.root_source and dict(system.root_source) != source:
        raise SettingsError(
            f"found a system in {location} with root {dict(system.root_source)}",
            f"the experiment's root {source}",
            "use the same root, or another folder: a system keeps its root for life",
        )
    return system


def _load_root(settings: RootSettings) -> LoadedRoot:
    from evolve.root import load_root

    return load_root(settings)


def _create(settings: RootSettings, root: LoadedRoot, location: Location) -> System:
    try:
        return System.create(location, root.layers, root.image_size, _describe_root(settings))
    except SystemFolderError:
        # Another process may have made one while this one loaded its data.
        made = _open(settings, location)
        if made is None:
            raise
        return made


def _describe_root(root: RootSettings) -> dict[str, Any]:
    description = root.model_dump(mode="json", exclude={"file"})
    if root.file is not None:
        try:
            description["sha256"] = hashlib.sha256(root.file.read_bytes()).hexdigest()
        except OSError as error:
            raise SettingsError(f"could not read root.file {root.file} ({error.strerror})", "a checkpoint") from error
    return description


def _check_images(system: System, image_size: int) -> None:
    check_image_size(system.root.layer(PATCH_EMBED).spec.integer("patch_size"), image_size)


def _check_own_data(listed: Sequence[TaskData]) -> None:
    from evolve.data.load import check

    names = [one.name for one in listed]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SettingsError(f"found tasks {twice} more than once", "one of each name")
    for one in listed:
        try:
            check_task_name(one.name)
        except ValueError as error:
            raise DataError(str(error), "another name") from error
        check(one, f"the data of {one.name}")


def _active(
    system: System, data: Sequence[TaskData], make: MakeTrainer, private: Collection[str]
) -> list[tuple[ActiveTask, Callable[[], Trainer]]]:
    return [
        (ActiveTask(one.name, one.labels, len(one.train), one.fingerprint, one.name in private), _deferred(make, system, one))
        for one in data
    ]


def _deferred(make: MakeTrainer, system: System, data: TaskData) -> Callable[[], Trainer]:
    return lambda: make(system, data)
