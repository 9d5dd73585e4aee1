"""The search: one round of one task, generation by generation, and the rounds over all tasks.

Source: muNet (arXiv 2205.10937), the search method. Where munet differs on purpose, docs/decisions/0003 says so.

Everything that is decided follows from the journal's first record (settings, data, the snapshot of the system taken when the search
opened) and from the results of training. So a search that was killed is simply run again: decisions repeat themselves, results that
the journal has are not trained again.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from evolve.closing import ActiveTask, publish_task
from evolve.config import DefaultSettings, Experiment, SearchSettings, TrainingSettings
from evolve.documents import TaskRecord
from evolve.errors import DamagedError, SettingsError, TrainerError
from evolve.generation import ChildPlan, ChildResult, GenerationPlan, LayerPlan, Trainer, TrainingLength
from evolve.hyperparameters import DATA_NAMES, Group, Hyperparameters, tunables
from evolve.journal import Record
from evolve.judgement import largest_gains, quality_to_beat
from evolve.layer import PATCH_EMBED, Layer
from evolve.mutation import select_tunables, step_hyperparameters
from evolve.opening import open_search
from evolve.outcomes import remarks_on
from evolve.path import Path, PlacedLayer
from evolve.population import Member, Population
from evolve.sampling import Surroundings, derive_generator, derive_seed, sample_child
from evolve.scoring import accounted_parameters, reference_parameters, score, sharing_counts
from evolve.selection import choose_parent
from evolve.specs import new_parameters
from evolve.store import System


@dataclasses.dataclass(frozen=True)
class SearchPlan:
    """How to search: the parts of an experiment that shape every decision.

    Attributes:
        seed: of the whole search.
        defaults: hyperparameters that children of the root start from.
        search: see evolve.config.
        training: see evolve.config.
    """

    seed: int = 0
    defaults: DefaultSettings = dataclasses.field(default_factory=DefaultSettings)
    search: SearchSettings = dataclasses.field(default_factory=SearchSettings)
    training: TrainingSettings = dataclasses.field(default_factory=TrainingSettings)

    @staticmethod
    def of(experiment: Experiment) -> SearchPlan:
        """Returns the plan of an experiment."""
        return SearchPlan(experiment.seed, experiment.defaults, experiment.search, experiment.training)

    def to_dict(self) -> dict[str, Any]:
        """Returns all settings as JSON values."""
        return {
            "seed": self.seed,
            "defaults": self.defaults.model_dump(mode="json"),
            "search": self.search.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json"),
        }


class Observer(Protocol):
    """Told what happens, for progress a person can follow. Methods return at once and never raise."""

    def search_opened(self, task: str, round_number: int, seeds: Sequence[Path], num_children: int, reused: int) -> None:
        """A search of `num_children` children opened; the results of `reused` of them are in the journal already and are told first."""

    def generation_planned(self, plan: GenerationPlan) -> None:
        """Children were sampled and go to the trainer."""

    def child_finished(self, plan: ChildPlan, record: Record) -> None:
        """A child was trained; `record` is what the journal says of it."""

    def search_closed(self, task: str, path: Path, record: TaskRecord) -> None:
        """A path became current."""


class SilentObserver:
    """Tells nobody; derive from it to hear only of some of what happens."""

    def search_opened(self, task: str, round_number: int, seeds: Sequence[Path], num_children: int, reused: int) -> None:
        """Nothing."""

    def generation_planned(self, plan: GenerationPlan) -> None:
        """Nothing."""

    def child_finished(self, plan: ChildPlan, record: Record) -> None:
        """Nothing."""

    def search_closed(self, task: str, path: Path, record: TaskRecord) -> None:
        """Nothing."""


def run_rounds(
    system: System,
    tasks: Sequence[tuple[ActiveTask, Callable[[], Trainer]]],
    plan: SearchPlan,
    observer: Observer,
    on_closed: Callable[[str], None] = lambda _task: None,
) -> None:
    """Brings every task to the plan's number of rounds, in their order within each round.

    Args:
        system: the system; tasks in it that are not listed serve as seeds only.
        tasks: each with a function that makes its trainer when its turn comes.
        plan: how to search.
        observer: told what happens.
        on_closed: called with a task's name after each of its rounds.

    Raises:
        BusyError: another process is evolving one of the tasks, or another machine has gone on with the same round of one.
        DataError: a task's data are not those that it was evolved on before.
        SettingsError: the root's patches do not divide the image size.
        SystemFolderError: the system is damaged or cannot be written.
    """
    check_image_size(system.root.layer(PATCH_EMBED).spec.integer("patch_size"), plan.defaults.image_size)
    for round_number in range(plan.search.rounds):
        for task, make_trainer in tasks:
            with system.evolving(task.name):
                record = system.task(task.name)
                if record is not None and record.rounds > round_number:
                    continue
                evolve_task(system, task, make_trainer(), plan, observer)
            on_closed(task.name)


def evolve_task(system: System, task: ActiveTask, trainer: Trainer, plan: SearchPlan, observer: Observer) -> TaskRecord:
    """Runs one round of one task; the caller holds the task's lock. Goes on where a killed one stopped.

    Returns:
        The task's new record.

    Raises:
        DataError: the task's data are not those that it was evolved on before.
        SettingsError: a journal of an unfinished search has other settings.
        SystemFolderError: the system is damaged or cannot be written.
    """
    return _Search(system, task, trainer, plan, observer).run()


class _Search:
    """One round of one task."""

    def __init__(self, system: System, task: ActiveTask, trainer: Trainer, plan: SearchPlan, observer: Observer) -> None:
        self.system = system
        self.task = task
        self.trainer = trainer
        self.plan = plan
        self.observer = observer
        self.started = time.monotonic()
        self.reused_seconds = 0.0
        opened = open_search(system, task, plan.to_dict(), trainer.identity)
        self.round, self.snapshot, self.journal = opened.round, opened.snapshot, opened.journal
        self.seeds = self.snapshot.seeds(task.name, plan.search.seed_limit)
        others = self.snapshot.others(task.name)
        self.sharing = sharing_counts(others)
        self.defaults = plan.defaults.hyperparameters(system.root.num_blocks)
        self.paths: dict[str, Path] = {path.id: path for path in (*others, system.root)}
        self.parents: dict[str, str] = self.snapshot.parents()
        self.population = Population()
        patch_size = system.root.layer(PATCH_EMBED).spec.integer("patch_size")
        self.reference = reference_parameters(system.root, system.position_embedding(self.defaults.image_size // patch_size))
        every = tunables(max_blocks=system.root.num_blocks, patch_size=patch_size)
        settings = plan.search
        choose = functools.partial(
            select_tunables, every, auto_tune=settings.auto_tune, mutate_blocks=settings.mutate_blocks, fixed=settings.fixed
        )
        self.data_tunables = choose([Group.DATA])
        self.surroundings = Surroundings(
            task=task.name,
            num_classes=len(task.labels),
            root=system.root,
            frozen=frozenset(self.sharing) | system.root.layer_ids,
            position_embedding=system.position_embedding,
            tunables=choose([Group.STRUCTURE, Group.OPTIMISER]),
            mutation_rate=plan.search.mutation_rate,
        )
        self.length = TrainingLength.of(plan.training, task.num_train_images)

    def run(self) -> TaskRecord:
        try:
            self._open_population()
            search = self.plan.search
            reused = sum(len(pack["children"]) for pack in self.journal.of_type("pack"))
            num_children = search.num_generations * search.generation_size
            self.observer.search_opened(self.task.name, self.round, self.seeds, num_children, reused)
            used_seeds = 0
            for index in range(search.num_generations):
                generation, used_seeds = self._plan_generation(index, used_seeds)
                self._journal_generation(generation)
                self.observer.generation_planned(generation)
                self._train(generation)
            return self._close()
        finally:
            self.journal.close()

    # Opening

    def _open_population(self) -> None:
        record = self.snapshot.records.get(self.task.name)
        if record is not None:
            path = self.snapshot.current[self.task.name]
            self.paths[path.id] = path
            self.population.add(path, self._score(path), record.num_children)

    # Sampling

    def _plan_generation(self, index: int, used_seeds: int) -> tuple[GenerationPlan, int]:
        names = (self.plan.seed, self.task.name, self.round, index)
        data = self._data_hyperparameters(names, self.seeds[used_seeds] if used_seeds < len(self.seeds) else None)
        children = []
        for child in range(self.plan.search.generation_size):
            generator = derive_generator(*names, child)
            mutated = used_seeds == len(self.seeds)
            if mutated:
                parent = choose_parent(self.seeds, self.population, generator)
            else:
                parent = self.seeds[used_seeds]
                used_seeds += 1
            if parent.id in self.population:
                self.population[parent.id].num_children += 1
            sampled = sample_child(
                child, self._lineage(parent), self._inherited(parent), data, self.surroundings, generator, mutated=mutated
            )
            children.append(dataclasses.replace(sampled, quality_to_beat=self._quality_to_beat(sampled)))
        data_seed = derive_seed(*names, "data")
        gains = self._gains(index)
        return GenerationPlan(self.task.name, self.round, index, data_seed, self.length, tuple(children), gains), used_seeds

    def _quality_to_beat(self, child: ChildPlan) -> float | None:
        """Returns what a child must exceed to survive; None if it survives anyway or nothing is judged early."""
        if not self.plan.search.early_stop or child.parent_id not in self.population:
            return None
        shared = {plan.source.id: plan.source for plan in child.layers if plan.source is not None and not plan.trainable}
        accounted = sum(layer.num_parameters / (1 + self.sharing.get(layer.id, 0)) for layer in shared.values())
        for plan in child.layers:
            if plan.trainable:
                accounted += new_parameters(plan.spec) if plan.source is None else plan.source.num_parameters
        factor = score(1.0, accounted, self.reference, self.plan.search.scale_factor)
        return quality_to_beat(self.population[child.parent_id].score, factor)

    def _gains(self, index: int) -> tuple[float, ...]:
        """Returns what the children of generations before this one gained after each interval, those left out that fell short."""
        if not self.plan.search.early_stop:
            return ()
        packs = [record for record in self.journal.of_type("pack") if record["generation"] < index]
        finished = [row for pack in packs for row in pack["children"] if not (row.get("diverged") or "stopped_after" in row)]
        return largest_gains(row["interval_qualities"] for row in finished)

    def _data_hyperparameters(self, names: tuple[object, ...], seed: Path | None) -> Hyperparameters:
        """Returns hyperparameters whose data group holds for a generation, whose first child is one of `seed` or of no seed any more.

        Those of the best path so far, mutated once no seed is left. Where seeds still come, `inherit_data` gives a task without a path of
        its own those of the seed; a task without any path has the defaults.
        """
        search = self.plan.search
        best = self.population.best()
        if seed is not None and search.inherit_data and self.task.name not in self.snapshot.records:
            data = self._inherited(seed)
        elif best is not None:
            data = best.path.hyperparameters
        else:
            data = self.defaults
        data = self.defaults.replace(**{name: getattr(data, name) for name in DATA_NAMES})
        if seed is not None:
            return data
        rate = search.mutation_rate if search.data_mutation_rate is None else search.data_mutation_rate
        generator = derive_generator(*names, "data hyperparameters")
        return step_hyperparameters(data, self.data_tunables, rate, generator).hyperparameters

    def _inherited(self, parent: Path) -> Hyperparameters:
        """Returns what children of a path start from."""
        return self.defaults if parent.id == self.system.root.id else parent.hyperparameters

    def _lineage(self, path: Path) -> list[Path]:
        """Returns the path, then its ancestors from near to far, the root last."""
        lineage = [path]
        while lineage[-1].id != self.system.root.id:
            parent_id = self.parents[lineage[-1].id]
            if parent_id not in self.paths:
                raise DamagedError(
                    f"found path {parent_id} as the parent of {lineage[-1].id}, but current for no task",
                    "a current path or the root",
                    "`munet-evolve verify` says what is wrong",
                )
            lineage.append(self.paths[parent_id])
        # A task may have become private after others descended from it: from then on its layers are its own.
        return [ancestor for ancestor in lineage if ancestor is path or not self._is_closed_to_us(ancestor)]

    def _is_closed_to_us(self, path: Path) -> bool:
        return path.task not in (None, self.task.name) and self.snapshot.records[path.task].private

    # Training

    def _train(self, generation: GenerationPlan) -> None:
        """Trains the children whose results the journal does not have, then lets the survivors join in the order of their index."""
        known = {
            child["index"]: child
            for pack in self.journal.of_type("pack")
            if pack["generation"] == generation.index
            for child in pack["children"]
        }
        missing = tuple(child for child in generation.children if child.index not in known)
        for index, row in known.items():
            self.reused_seconds += sum(row["seconds"].values())
            self.observer.child_finished(generation.children[index], row)
        if missing:
            for pack in self.trainer.train(dataclasses.replace(generation, children=missing)):
                # Until the journal names the survivors' layers, nobody may take them for garbage.
                with self.system.locks.storing():
                    rows = [self._judge(generation, generation.children[result.index], result) for result in pack.children]
                    record = self.journal.append("pack", {"generation": generation.index, "children": rows})
                self.system.share(self.journal)
                for row in record["children"]:
                    known[row["index"]] = row
                    self.observer.child_finished(generation.children[row["index"]], row)
        if len(known) != len(generation.children):
            raise TrainerError(f"{len(known)} results", f"{len(generation.children)}, one for each child of the generation")
        for child in generation.children:
            row = known[child.index]
            if row["survived"]:
                path = self.system.path(row["path_id"])
                self.paths[path.id] = path
                self.parents.setdefault(path.id, child.parent_id)
                self.population.add(path, row["score"])

    def _judge(self, generation: GenerationPlan, child: ChildPlan, result: ChildResult) -> dict[str, Any]:
        """Scores a trained child, stores it if it survives, and returns what the journal says of it."""
        _check_qualities(result)
        stopped_after = None if result.diverged else generation.stops_after(child, result.interval_qualities)
        result = _cut_off(result, stopped_after)
        placed = [PlacedLayer(plan.position, _layer_of(plan, result)) for plan in child.layers]
        path = Path.of(
            task=self.task.name,
            layers=placed,
            hyperparameters=child.hyperparameters,
            parent_id=child.parent_id,
            quality=result.quality,
        )
        path_score = self._score(path)
        parent_score = self.population[child.parent_id].score if child.parent_id in self.population else None
        survived = parent_score is None or (stopped_after is None and path_score > parent_score)
        reason = None
        if parent_score is not None and not survived:
            reason = _reason(child, result, stopped_after, f"score {path_score:.6g} is not above its parent's {parent_score:.6g}")
        if survived:
            for plan in child.layers:
                if plan.trainable:
                    self.system.put_layer(plan.spec, result.trained[plan.position])
            self.system.put_path(path)
        return {
            "index": child.index,
            "path_id": path.id,
            "parent_id": child.parent_id,
            "quality": result.quality,
            "interval_qualities": list(result.interval_qualities),
            "best_interval": result.best_interval,
            "score": path_score,
            "parent_score": parent_score,
            "survived": survived,
            "reason": reason,
            "accounted_parameters": accounted_parameters(path, self.sharing),
            "layers": [[str(position), layer.id] for position, layer in path.layers],
            "num_trained_images": result.num_trained_images,
            "flops": result.flops,
            "seconds": {"train": result.train_seconds, "evaluate": result.evaluate_seconds},
            **remarks_on(result, stopped_after),
        }

    def _score(self, path: Path) -> float:
        accounted = accounted_parameters(path, self.sharing)
        return score(path.quality or 0.0, accounted, self.reference, self.plan.search.scale_factor)

    def _journal_generation(self, generation: GenerationPlan) -> None:
        """Writes what was planned, or checks that it is what the journal has."""
        fields = {
            "index": generation.index,
            "data": {name: getattr(generation.children[0].hyperparameters, name) for name in DATA_NAMES},
            "data_seed": generation.data_seed,
            "num_steps": generation.length.num_steps,
            "children": [
                {
                    "index": child.index,
                    "parent_id": child.parent_id,
                    "mutations": list(child.mutations),
                    "hyperparameters": child.hyperparameters.to_dict(),
                    "origins": [[str(plan.position), plan.origin.value] for plan in child.layers],
                    "seed": child.seed,
                    **({"quality_to_beat": child.quality_to_beat} if self.plan.search.early_stop else {}),
                }
                for child in generation.children
            ],
        }
        written = self.journal.of_type("generation")
        if generation.index >= len(written):
            self.journal.append("generation", fields)
        elif not _agrees(written[generation.index], fields):
            raise DamagedError(
                f"found generation {generation.index} in {self.journal.file} planned otherwise than now",
                "the same plan from the same settings",
                "finish the search with the version of munet that began it, or add --restart to start its round over",
            )

    # Closing

    def _close(self) -> TaskRecord:
        best = self.population.best()
        if best is None:
            raise RuntimeError("a search without a survivor: the first child of a seed always survives")
        closed = next(iter(self.journal.of_type("close")), None) or self._journal_close(best)
        self.system.share(self.journal)
        record = publish_task(
            self.system,
            self.task,
            path=best.path,
            ancestors=self._lineage(best.path)[1:],
            closed=closed,
            rounds=self.round + 1,
            settings=self.plan.to_dict(),
        )
        self.observer.search_closed(self.task.name, best.path, record)
        return record

    def _journal_close(self, best: Member) -> Record:
        """Examines the winner, the one look at the test split, and writes the last record."""
        started = time.monotonic()
        examples = self.trainer.examine(best.path)
        with self.system.locks.storing():
            return self.journal.append(
                "close",
                {
                    "path_id": best.path.id,
                    "quality": best.path.quality,
                    "score": best.score,
                    "num_children": best.num_children,
                    "test_accuracy": examples.test_accuracy,
                    "examples": self.system.put_examples(examples.images),
                    "seconds": {
                        "examine": time.monotonic() - started,
                        "wall": time.monotonic() - self.started,
                        "reused": self.reused_seconds,
                    },
                },
            )


def check_image_size(patch_size: int, image_size: int) -> None:
    """Checks that the root's patches divide the images of an experiment.

    Raises:
        SettingsError: they do not.
    """
    if image_size % patch_size:
        raise SettingsError(
            f"found defaults.image_size = {image_size}",
            f"a multiple of the root's patch size {patch_size}",
            f"try {max(1, round(image_size / patch_size)) * patch_size}",
        )


def _agrees(written: Any, planned: Any) -> bool:
    """Whether a journal says what is planned now; an earlier version may have said less."""
    if isinstance(written, Mapping) and isinstance(planned, Mapping):
        return all(_agrees(written[name], value) for name, value in planned.items() if name in written)
    if isinstance(written, list) and isinstance(planned, list):
        return len(written) == len(planned) and all(map(_agrees, written, planned))
    return bool(written == planned)


def _check_qualities(result: ChildResult) -> None:
    """Raises TrainerError unless all qualities are from 0 to 1."""
    if not all(0 <= quality <= 1 for quality in result.interval_qualities):
        raise TrainerError(f"qualities {list(result.interval_qualities)} of child {result.index}", "numbers from 0 to 1")


def _cut_off(result: ChildResult, stopped_after: int | None) -> ChildResult:
    """Returns what a child that was to stop had shown by then: a trainer that went on all the same changes no decision."""
    if stopped_after is None:
        return result
    qualities = result.interval_qualities[:stopped_after]
    return dataclasses.replace(result, interval_qualities=qualities, best_interval=qualities.index(max(qualities)))


def _reason(child: ChildPlan, result: ChildResult, stopped_after: int | None, scores: str) -> str:
    """Returns in words why a child did not survive; `scores` says so of one that was trained to its end."""
    if result.diverged:
        return "diverged: a loss or weight was not finite"
    if stopped_after is not None:
        return f"stopped after interval {stopped_after}: could no longer exceed quality {child.quality_to_beat:.6g}"
    return scores


def _layer_of(plan: LayerPlan, result: ChildResult) -> Layer:
    """Returns a layer of a trained child."""
    if not plan.trainable and plan.source is not None:
        return plan.source
    if plan.position not in result.trained:
        raise TrainerError(f"no weights of {plan.position} of child {result.index}", "those of every trainable layer")
    return Layer.of(plan.spec, result.trained[plan.position])
