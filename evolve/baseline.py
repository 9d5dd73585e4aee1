"""Baselines: what the same root reaches on the same task, in the same number of training steps, without a search.

    finetune      every layer is trained
    freeze:K      patch embedding, class token, position embedding and the first K blocks are frozen; freeze:0 is not finetune
    adapters:D    adapters of width D before every block, the final norm and the head are trained, the rest is frozen

As many replicas as a generation of the search has children start from the root with the default hyperparameters, each with seeds of its
own, and train under one schedule over `intervals x rounds x generations` intervals: as many steps in all as the whole search of the
task. They are validated after each interval; the best interval of the best replica is tested, once.

A *tuned* baseline is the honest rival of a search that tunes: each of its replicas draws learning rate, warm-up and augmentation at random
from the steps that the search may take. It may have another number of replicas, which share the same steps: more draws, each trained
for less.

Parameters are accounted as if each task of the experiment were published this way: frozen layers are the root's and divided by the
number of tasks, what was trained counts in full.

Source: muNet (arXiv 2205.10937), section on the experiments.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from evolve.closing import ActiveTask
from evolve.config import NO_PART_OF_THE_RESULT, with_defaults
from evolve.errors import SettingsError, TrainerError
from evolve.generation import ChildPlan, ChildResult, GenerationPlan, Trainer, TrainingLength, plan_root_child
from evolve.hyperparameters import Group, Hyperparameters, tunables
from evolve.journal import FORMAT, Journal, Record, compressed_file, read_journal
from evolve.layer import HEAD, NORM, PATCH_EMBED, POS_EMBED, Layer, LayerKind, Position
from evolve.opening import describe, differences
from evolve.outcomes import remarks_on
from evolve.path import Path, PlacedLayer
from evolve.sampling import derive_generator, derive_seed
from evolve.search import SearchPlan
from evolve.store import System
from munet.names import similar_names

MAX_ADAPTER_WIDTH = 4096
"""As of the setting `defaults.adapter_width`."""

_FORMS = "finetune, freeze:K or adapters:D"


@dataclasses.dataclass(frozen=True)
class Method:
    """What a baseline trains.

    Attributes:
        kind: `finetune`, `freeze` or `adapters`.
        number: of frozen blocks, or the width of the adapters; None for `finetune`.
        tuned: whether replicas draw hyperparameters at random.
    """

    kind: str
    number: int | None = None
    tuned: bool = False

    @staticmethod
    def parse(text: str, *, tuned: bool = False) -> Method:
        """Returns the method that `name` writes this way.

        Raises:
            SettingsError: there is none of that name.
        """
        kind, colon, number = text.partition(":")
        if kind not in ("finetune", "freeze", "adapters"):
            similar = similar_names(kind, ("finetune", "freeze:K", "adapters:D"))
            raise SettingsError(
                f"found method {text!r}", _FORMS, f"did you mean {' or '.join(map(repr, similar))}?" if similar else ""
            )
        if kind == "finetune":
            if colon:
                raise SettingsError(f"found method {text!r}", "finetune without a number: it trains every layer")
            return Method(kind, None, tuned)
        if not re.fullmatch("[0-9]{1,6}", number):
            what = "the number of blocks to freeze" if kind == "freeze" else "the width of the adapters"
            raise SettingsError(f"found method {text!r}", f"{kind}: followed by {what}, such as {kind}:8")
        method = Method(kind, int(number), tuned)
        if kind == "adapters" and not 1 <= int(number) <= MAX_ADAPTER_WIDTH:
            raise SettingsError(f"found method {text!r}", f"adapters of a width from 1 to {MAX_ADAPTER_WIDTH}")
        return method

    @property
    def name(self) -> str:
        """As the command line has it, such as `freeze:2`."""
        return self.kind if self.number is None else f"{self.kind}:{self.number}"

    @property
    def folder(self) -> str:
        """Name of its folder in a system, such as `freeze-2` or `finetune-tuned`."""
        return self.name.replace(":", "-") + ("-tuned" if self.tuned else "")

    def __str__(self) -> str:
        return self.name + (" (tuned)" if self.tuned else "")

    def check(self, num_blocks: int) -> None:
        """Checks that a root of so many blocks can be trained this way.

        Raises:
            SettingsError: more blocks are to be frozen than there are.
        """
        if self.kind == "freeze" and (self.number or 0) > num_blocks:
            raise SettingsError(f"found method {self.name!r}", f"at most freeze:{num_blocks}, the blocks of the root")

    def trains(self, position: Position) -> bool:
        """Tells whether it trains the layer at a position."""
        if self.kind == "finetune" or position in (NORM, HEAD):
            return True
        if self.kind == "adapters":
            return position.kind is LayerKind.ADAPTER
        return position.block is not None and position.block >= (self.number or 0)


@dataclasses.dataclass(frozen=True)
class BaselinePlan:
    """What a baseline takes from the search that it is compared with.

    Attributes:
        search: the settings of that search.
        num_tasks: tasks of the whole experiment: so many share the frozen layers.
        replicas: how many share the steps of the search; by default as many as a generation has children.
    """

    search: SearchPlan
    num_tasks: int
    replicas: int | None = None

    def __post_init__(self) -> None:
        """Raises SettingsError if there are more replicas than intervals to share."""
        if self.num_replicas > self._all_intervals:
            raise SettingsError(
                f"found {self.num_replicas} replicas", f"at most {self._all_intervals}, one for each interval of the whole search"
            )

    @property
    def num_replicas(self) -> int:
        """How many share the steps."""
        return self.replicas or self.search.search.generation_size

    @property
    def intervals(self) -> int:
        """Of each replica; a remainder of the steps is left out."""
        return self._all_intervals // self.num_replicas

    @property
    def _all_intervals(self) -> int:
        settings = self.search.search
        return self.search.training.intervals * settings.rounds * settings.num_generations * settings.generation_size

    def to_dict(self) -> dict[str, Any]:
        """Returns what shapes a baseline: searches may differ in all else and be compared with the same one."""
        settings = self.search.to_dict()
        return _deciding(
            {
                "seed": self.search.seed,
                "defaults": settings["defaults"],
                "num_tasks": self.num_tasks,
                "replicas": self.num_replicas,
                "intervals": self.intervals,
                "training": settings["training"],
            }
        )


class BaselineObserver(Protocol):
    """Told what happens, for progress a person can follow. Methods return at once and never raise."""

    def baseline_opened(self, task: str, method: Method, num_replicas: int, reused: int) -> None:
        """A baseline of `num_replicas` replicas opened; the results of `reused` of them are in the journal already."""

    def replica_finished(self, task: str, method: Method, record: Record) -> None:
        """A replica was trained; `record` is what the journal says of it."""

    def baseline_closed(self, task: str, method: Method, record: Record) -> None:
        """A baseline was tested; `record` is what the journal says of it."""


class SilentBaselineObserver:
    """Tells nobody."""

    def baseline_opened(self, task: str, method: Method, num_replicas: int, reused: int) -> None:
        """Nothing."""

    def replica_finished(self, task: str, method: Method, record: Record) -> None:
        """Nothing."""

    def baseline_closed(self, task: str, method: Method, record: Record) -> None:
        """Nothing."""


def baseline_file(system: System, method: Method, task: str) -> pathlib.Path:
    """Returns where the journal of a task's baseline is.

    Its records are those of evolve.journal: `open` (settings, data, trainer), one `pack` for each finished replica, and `close` with
    method, quality, test accuracy, accounted parameters and cost.
    """
    return system.folder / "baselines" / method.folder / f"{task}.jsonl"


def is_finished(system: System, method: Method, task: str, plan: BaselinePlan) -> bool:
    """Tells whether there is nothing to do, before any data are loaded.

    Raises:
        SettingsError: it was begun, or finished, with other settings.
        DamagedError: its journal is altered.
    """
    system.pull_journal(baseline_file(system, method, task))
    records = read_journal(baseline_file(system, method, task))
    if records:
        _check_identity(baseline_file(system, method, task), records[0], {"settings": plan.to_dict()})
    return any(record["type"] == "close" for record in records)


def run_baselines(
    system: System,
    tasks: Sequence[tuple[ActiveTask, Callable[[], Trainer]]],
    method: Method,
    plan: BaselinePlan,
    observer: BaselineObserver,
) -> None:
    """Runs a baseline of every task, or goes on with it; one that is finished is not done again.

    Args:
        system: gives the root; its tasks are neither used nor changed.
        tasks: each with a function that makes its trainer when its turn comes.
        method: what is trained.
        plan: of the search that is compared with.
        observer: told what happens.

    Raises:
        BusyError: another process is at work on the same baseline.
        SettingsError: a baseline was begun with other settings, data or versions, or the root has too few blocks.
        SystemFolderError: the system is damaged or cannot be written.
    """
    method.check(system.root.num_blocks)
    for task, make_trainer in tasks:
        with system.comparing(method.folder, task.name):
            _Baseline(system, task, make_trainer(), method, plan, observer).run()


class _Baseline:
    """One baseline of one task."""

    def __init__(
        self,
        system: System,
        task: ActiveTask,
        trainer: Trainer,
        method: Method,
        plan: BaselinePlan,
        observer: BaselineObserver,
    ) -> None:
        self.system = system
        self.task = task
        self.trainer = trainer
        self.method = method
        self.plan = plan
        self.observer = observer
        self.length = TrainingLength.of(plan.search.training, task.num_train_images, plan.intervals)
        # Weights of the best replica that this process trained; those of earlier processes are trained again if they are needed.
        self.kept: ChildResult | None = None
        # A compressed one is unpacked, which a collection that compresses it must not come across.
        with system.locks.storing():
            self.journal = Journal(baseline_file(system, method, task.name))

    def run(self) -> Record:
        try:
            self._open()
            closed = next(iter(self.journal.of_type("close")), None)
            if closed is not None:
                return closed
            done = self.journal.of_type("pack")
            num_replicas = self.plan.num_replicas
            self.observer.baseline_opened(self.task.name, self.method, num_replicas, len(done))
            for replica in range(len(done), num_replicas):
                self._train_and_write(replica)
            closed = self._close()
            self.system.share(self.journal)
            self.observer.baseline_closed(self.task.name, self.method, closed)
            return closed
        finally:
            self.journal.close()

    def _open(self) -> None:
        identity = {
            "format": FORMAT,
            "system": self.system.id,
            "root": self.system.root.id,
            "task": self.task.name,
            "method": self.method.name,
            "tuned": self.method.tuned,
            "data_fingerprint": self.task.data_fingerprint,
            "labels": list(self.task.labels),
            "trainer": dict(self.trainer.identity),
            "settings": self.plan.to_dict(),
        }
        if self.journal.records:
            _check_identity(self.journal.file, self.journal.records[0], identity)
        else:
            self.journal.append("open", {**identity, "resolved_settings": self.plan.search.to_dict()})
        self.system.share(self.journal)

    def _train_and_write(self, replica: int) -> None:
        started = time.monotonic()
        generation, result = self._train(replica)
        (child,) = generation.children
        record = self.journal.append(
            "pack",
            {
                "replica": replica,
                "data_seed": generation.data_seed,
                "seed": child.seed,
                "hyperparameters": child.hyperparameters.to_dict(),
                "num_steps": self.length.num_steps,
                "quality": result.quality,
                "interval_qualities": list(result.interval_qualities),
                "best_interval": result.best_interval,
                "num_trained_images": result.num_trained_images,
                "flops": result.flops,
                "seconds": {
                    "train": result.train_seconds,
                    "evaluate": result.evaluate_seconds,
                    "wall": time.monotonic() - started,
                },
                **remarks_on(result),
            },
        )
        self.system.share(self.journal)
        if replica == self._best()["replica"]:
            self.kept = dataclasses.replace(result, index=replica)
        self.observer.replica_finished(self.task.name, self.method, record)

    def _best(self) -> Record:
        """Returns the record of the best replica, the earliest on ties."""
        return max(self.journal.of_type("pack"), key=lambda record: record["quality"])

    def _train(self, replica: int) -> tuple[GenerationPlan, ChildResult]:
        """Trains a replica, to the same bits however often."""
        names = (self.plan.search.seed, self.task.name, "baseline", replica)
        child = self._plan_child(self._hyperparameters(names), derive_seed(*names))
        # Methods are compared on the same batches.
        generation = GenerationPlan(self.task.name, 0, replica, derive_seed(*names, "data"), self.length, (child,))
        results = [result for pack in self.trainer.train(generation) for result in pack.children]
        if len(results) != 1:
            raise TrainerError(f"{len(results)} results", "one, for the one child of the plan")
        return generation, results[0]

    def _hyperparameters(self, names: tuple[object, ...]) -> Hyperparameters:
        root = self.system.root
        hyperparameters = self.plan.search.defaults.hyperparameters(root.num_blocks)
        if self.method.kind == "adapters":
            hyperparameters = hyperparameters.replace(adapter_width=self.method.number)
        if not self.method.tuned:
            return hyperparameters
        generator = derive_generator(*names, "tune")
        every = tunables(max_blocks=root.num_blocks, patch_size=root.layer(PATCH_EMBED).spec.integer("patch_size"))
        drawn = [
            tunable
            for tunable in every
            if tunable.name in ("learning_rate", "warmup_ratio") or (tunable.group is Group.DATA and tunable.name != "image_size")
        ]
        return hyperparameters.replace(**{tunable.name: generator.choice(tunable.options) for tunable in drawn})

    def _plan_child(self, hyperparameters: Hyperparameters, seed: int) -> ChildPlan:
        root = self.system.root

        def layer_at(position: Position) -> Layer:
            if position == POS_EMBED:
                return self.system.position_embedding(
                    hyperparameters.image_size // root.layer(PATCH_EMBED).spec.integer("patch_size")
                )
            return root.layer(position)

        return plan_root_child(
            layer_at,
            hyperparameters,
            num_classes=len(self.task.labels),
            trains=self.method.trains,
            adapters=range(root.num_blocks) if self.method.kind == "adapters" else (),
            parent_id=root.id,
            seed=seed,
        )

    def _close(self) -> Record:
        """Tests the best interval of the best replica, the one look at the test split, and writes the last record."""
        started = time.monotonic()
        best = self._best()
        if self.kept is None or self.kept.index != best["replica"]:
            self.kept = self._train(best["replica"])[1]
        # No record refers to these weights: once they are tested, they may be taken for garbage.
        with self.system.locks.storing():
            path = self._store(self.kept, Hyperparameters.from_dict(best["hyperparameters"]), best["seed"])
            test_accuracy = self.trainer.examine(path).test_accuracy
        replicas = self.journal.of_type("pack")
        seconds = {name: sum(replica["seconds"][name] for replica in replicas) for name in ("train", "evaluate", "wall")}
        return self.journal.append(
            "close",
            {
                "method": self.method.name,
                "tuned": self.method.tuned,
                "task": self.task.name,
                "replica": best["replica"],
                "path_id": path.id,
                "quality": best["quality"],
                "test_accuracy": test_accuracy,
                "parameters": path.num_parameters,
                "accounted_parameters": self._accounted(path),
                "num_trained_images": sum(replica["num_trained_images"] for replica in replicas),
                "flops": sum(replica["flops"] for replica in replicas),
                "seconds": {**seconds, "wall": seconds["wall"] + time.monotonic() - started},
            },
        )

    def _store(self, result: ChildResult, hyperparameters: Hyperparameters, seed: int) -> Path:
        """Writes the layers of a trained replica, which nothing refers to once it is tested, and returns its path."""
        placed = []
        for plan in self._plan_child(hyperparameters, seed).layers:
            if plan.source is not None and not plan.trainable:
                layer = plan.source
            elif plan.position in result.trained:
                layer = self.system.put_layer(plan.spec, result.trained[plan.position])
            else:
                raise TrainerError(f"no weights of {plan.position}", "those of every trainable layer")
            placed.append(PlacedLayer(plan.position, layer))
        return Path.of(
            task=self.task.name,
            layers=placed,
            hyperparameters=hyperparameters,
            parent_id=self.system.root.id,
            quality=result.quality,
        )

    def _accounted(self, path: Path) -> float:
        return sum(
            layer.num_parameters if self.method.trains(position) else layer.num_parameters / self.plan.num_tasks
            for position, layer in path.layers
        )


def _deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a baseline without those of training that are no part of its result, or go by another name."""
    complete = with_defaults(settings)
    left_out = ("intervals", *NO_PART_OF_THE_RESULT)
    return {**complete, "training": {name: value for name, value in complete["training"].items() if name not in left_out}}


def _check_identity(file: pathlib.Path, begun: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    then = {name: _deciding(begun[name]) if name == "settings" else begun.get(name) for name in identity}
    found = list(differences(then, identity))
    if found:
        written = file if file.exists() else compressed_file(file)
        raise SettingsError(
            f"found a baseline in {written} begun otherwise: {describe(found)}",
            "what it began with",
            "go back to that, or remove the file to start this baseline over",
        )
