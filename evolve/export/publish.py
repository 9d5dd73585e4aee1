"""Publishes a system's current paths as one generation of a model repository.

Order is what makes it safe: files named by content first, then the generation that names them, then CURRENT, then the aliases. A publisher
killed anywhere leaves a whole generation, the old or the new one, and the next one tidies up after it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import pathlib
import time
from collections.abc import Iterable, Mapping

import numpy as np

from evolve.documents import TaskRecord
from evolve.errors import ExportError
from evolve.export.coarsening import Choice, Coarseness, coarsen
from evolve.export.magnitudes import MOST_IN_FLOAT16, greatest_magnitude
from evolve.export.onnx import export_segment
from evolve.export.parity import NUM_TOP1_IMAGES, Routes, varied
from evolve.export.releases import check_percent
from evolve.export.repository import FORMAT, MODEL_FILE, Repository, open_for_publishing
from evolve.export.segments import Segmentation, find_segments, published_cuts
from evolve.export.settings import ExportSettings, Precision, Target, exporter_version
from evolve.export.tensors import segment_to_proto
from evolve.export.triton import (
    CONFIG_FILE,
    Ensemble,
    RoutedTask,
    multi_task_ensemble,
    segment_config,
    task_ensemble,
)
from evolve.layer import HEAD
from evolve.observers import Tell
from evolve.path import Path
from evolve.scoring import accounted_parameters, others_of, sharing_counts
from evolve.store import System
from evolve.vit import reference_logits
from munet import preprocessing
from munet.parity import tolerance_of
from munet.preprocessing import Pixels
from munet.signatures import PrivateKey
from munet.v1 import generation_pb2

NUM_GOLDEN_IMAGES = 4
"""So many images of each size stand in the repository with the logits that every task must answer to them."""


@dataclasses.dataclass(frozen=True)
class PublishResult:
    """What publishing did.

    Attributes:
        generation: number of the generation that is current now, or the canary.
        new_segments: names of the segments that were exported.
        reused_segments: names of those that were there already.
        seconds: wall time.
        changed: whether there is a new generation; without any difference to the current one there is none.
        choice: which cuts were left out and what for; none if nobody asked for coarse segments.
    """

    generation: int
    new_segments: tuple[str, ...]
    reused_segments: tuple[str, ...]
    seconds: float
    changed: bool
    choice: Choice | None = None


@dataclasses.dataclass(frozen=True)
class _Current:
    """A task with its current path and example images, uint8 [images, size, size, 3]."""

    record: TaskRecord
    path: Path
    images: Pixels

    @property
    def image_size(self) -> int:
        return self.path.hyperparameters.image_size


def export_system(
    system: System,
    repository: pathlib.Path,
    *,
    target: Target = "cpu",
    precision: Precision = "float32",
    coarseness: Coarseness | None = None,
    response_cache: bool = False,
    num_top1_images: int = NUM_TOP1_IMAGES,
    signing_key: PrivateKey | None = None,
    canary_percent: float | None = None,
    progress: Tell | None = None,
) -> PublishResult:
    """Publishes all current paths of a system.

    Segments that are there already stay untouched. Every route that is new or contains a new segment is compared with torch on the
    task's example images, at batches of 1, 2 and the most; in float16 also on varied copies of them. A publication has one precision; a
    repository may hold generations of both. While another process publishes to the repository, this one waits; it publishes what the
    system holds afterwards.

    Args:
        system: what to publish.
        repository: the model repository; made if missing.
        target: where Triton is to run it.
        precision: of weights and hidden states.
        coarseness: what coarse segments are chosen by; without it, segments are as long as sharing allows.
        response_cache: whether a Triton that has a cache may keep what the segments answer that take the image.
        num_top1_images: images on which the best classes of a new float16 route are compared with torch's.
        signing_key: signs the generation. Of what is there already, only what the same key signed is used again; all else is exported and
            compared anew.
        canary_percent: publishes a canary instead, which servers try beside the current generation: so many of a hundred requests about
            tasks that it answers otherwise go to it. The current generation stays.
        progress: takes a sentence about each step.

    Raises:
        ExportError: the percentage is none; there is no generation yet that a canary could stand beside; the system has no task, a route
            differs from torch, a segment is too large, or the repository is of a newer format, of another system, damaged or cannot be
            written. The current generation is as it was.
        DamagedError: a path, layer or example image of the system cannot be read.
    """
    tell = progress or (lambda _: None)
    if canary_percent is not None:
        check_percent(canary_percent)
    settings = ExportSettings(target=target, precision=precision, response_cache=response_cache)
    started = time.monotonic()
    try:
        # What the records name stays until it is published, whoever collects garbage meanwhile.
        with system.locks.reading(), open_for_publishing(repository, system.id, tell, signing_key) as opened:
            try:
                publisher = _Publisher(system, opened, settings, coarseness, num_top1_images, tell, canary_percent)
                result = publisher.publish()
            finally:
                # What a failure left behind goes at once; what was published before stays.
                opened.collect()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ExportError(
            f"could not publish to {repository} ({reason})", "a writable folder with free space", "what was published stays"
        ) from error
    return dataclasses.replace(result, seconds=time.monotonic() - started)


class _Publisher:
    """One publication, from the system's records to CURRENT."""

    def __init__(
        self,
        system: System,
        repository: Repository,
        settings: ExportSettings,
        coarseness: Coarseness | None,
        num_top1_images: int,
        tell: Tell,
        canary_percent: float | None,
    ) -> None:
        self._system = system
        self._repository = repository
        self._settings = settings
        self._coarseness = coarseness
        self._num_top1_images = num_top1_images
        self._tell = tell
        self._canary_percent = canary_percent
        self._files: dict[str, generation_pb2.File] = {}

    def publish(self) -> PublishResult:
        if self._canary_percent is not None and not self._repository.current:
            raise ExportError("found no current generation", "one that a canary stands beside", "publish without --canary first")
        # Read under the repository's lock: of two publishers the later one sees all that the earlier one saw.
        tasks = self._current_tasks()
        for name in tasks:
            self._repository.check_alias(name)
        segmentation, choice = self._segmentation(tasks)
        golden = {size: self._put_golden_images(of_size) for size, of_size in _by_size(tasks.values()).items()}
        # Before any export, so that torch is asked alone.
        messages = {name: self._task(task, segmentation, golden[task.image_size]) for name, task in tasks.items()}
        sharing = sharing_counts(task.path for task in tasks.values())
        for name, task in tasks.items():
            messages[name].accounted_parameters = accounted_parameters(task.path, others_of(task.path, sharing))
        new = self._put_segments(segmentation)
        self._check_routes(tasks, messages, new)
        generation = self._generation(segmentation, tasks, messages, new)
        changed = self._differs(generation)
        if changed:
            if self._repository.leaves_signatures:
                self._tell(
                    f"generation {generation.number} is not signed, as the one before was: who requires signatures refuses it"
                )
            self._repository.publish(generation, self._canary(generation.number))
            self._tell(f"published generation {generation.number} of {len(tasks)} tasks")
        else:
            self._tell(f"nothing changed: generation {self._repository.current} stays")
        if self._canary_percent is None:
            for name, message in messages.items():
                self._repository.put_ensemble(self._ensemble_of(message, segmentation).renamed(name))
            self._repository.remove_aliases(tasks)
        return PublishResult(
            generation=generation.number if changed else self._repository.current,
            new_segments=tuple(sorted(new)),
            reused_segments=tuple(name for name in segmentation.segments if name not in new),
            seconds=0.0,
            changed=changed,
            choice=choice,
        )

    def _current_tasks(self) -> dict[str, _Current]:
        tasks = {
            name: _Current(record, self._system.path(record.path_id), self._system.examples(record))
            for name, record in self._system.tasks().items()
        }
        if not tasks:
            raise ExportError(f"found no task in {self._system.folder}", "one or more", "`munet-evolve run` evolves them")
        for name, task in tasks.items():
            size, classes = task.image_size, task.path.layer(HEAD).spec.integer("classes")
            if len(task.record.labels) != classes:
                raise ExportError(
                    f"found {len(task.record.labels)} labels of task {name!r}", f"{classes}, as its head has classes"
                )
            if not len(task.images) or task.images.shape[1:] != (size, size, 3):
                raise ExportError(
                    f"found example images {list(task.images.shape)} of task {name!r}", f"one or more of [{size}, {size}, 3]"
                )
        return tasks

    def _segmentation(self, tasks: Mapping[str, _Current]) -> tuple[Segmentation, Choice | None]:
        cuts = published_cuts(self._repository.generations.values())
        shared = find_segments({name: task.path for name, task in tasks.items()}, cuts, self._settings)
        if self._coarseness is None:
            return shared, None
        sizes = {name: task.image_size for name, task in tasks.items()}
        return coarsen(shared, sizes, self._repository.current_generation, self._coarseness, self._settings)

    def _put_golden_images(self, tasks: Iterable[_Current]) -> tuple[str, Pixels]:
        """Writes some images of the oldest of these tasks, which stay the same when others come, and returns their file and them."""
        oldest = min(tasks, key=lambda task: (task.record.order, task.record.name))
        images = oldest.images[:NUM_GOLDEN_IMAGES]
        buffer = io.BytesIO()
        np.save(buffer, images)
        data = buffer.getvalue()
        path = f"golden-{oldest.image_size}.{hashlib.sha256(data).hexdigest()[:12]}.npy"
        self._put(path, data)
        return path, images

    def _task(self, task: _Current, segmentation: Segmentation, golden: tuple[str, Pixels]) -> generation_pb2.Task:
        """Returns what a generation says of a task, but for its accounted parameters."""
        record = task.record
        message = generation_pb2.Task(
            name=record.name,
            path_id=record.path_id,
            route=segmentation.routes[record.name],
            labels=record.labels,
            preprocessing=generation_pb2.Preprocessing(version=preprocessing.VERSION, image_size=task.image_size),
            quality=record.quality,
            test_accuracy=record.test_accuracy,
            num_parameters=task.path.num_parameters,
            golden=self._golden(task, *golden),
        )
        message.ensemble = self._ensemble_of(message, segmentation).name
        return message

    def _golden(self, task: _Current, file: str, images: Pixels) -> generation_pb2.GoldenLogits:
        known = self._published.get(task.record.name)
        if known is not None and (known.path_id, known.golden.images) == (task.record.path_id, file):
            # The same path and images: another machine's torch may differ in the last bit, which is no reason for a new generation.
            logits = np.array(known.golden.logits, dtype=np.float32).reshape(-1, len(task.record.labels))
        else:
            self._tell(f"computing golden logits of {task.record.name}")
            logits = reference_logits(task.path, self._system.tensors, images, batch_size=len(images))
        tolerance = tolerance_of(self._settings.precision, logits)
        return generation_pb2.GoldenLogits(images=file, logits=logits.ravel().tolist(), tolerance=tolerance)

    def _put_segments(self, segmentation: Segmentation) -> frozenset[str]:
        """Exports the segments that are missing or damaged, and returns their names."""
        new = set()
        for name, segment in segmentation.segments.items():
            known = self._repository.intact(f"{name}/{MODEL_FILE}")
            if known is not None:
                self._files[known.path] = known
            else:
                self._tell(f"exporting {name}: {len(segment.units)} units, {segment.num_parameters:,} parameters")
                self._put(f"{name}/{MODEL_FILE}", export_segment(segment, self._system.tensors, self._settings))
                new.add(name)
            proto = segment_to_proto(segment, self._settings)
            config = segment_config(proto, self._settings.target, self._settings.response_cache)
            self._put(f"{name}/{CONFIG_FILE}", config)
        return frozenset(new)

    def _check_routes(
        self, tasks: Mapping[str, _Current], messages: Mapping[str, generation_pb2.Task], new: frozenset[str]
    ) -> None:
        most = self._settings.max_batch_size
        routes = Routes(lambda name: self._repository.folder / name / MODEL_FILE)
        for name, message in messages.items():
            known = self._published.get(name)
            if (
                known is not None
                and (known.path_id, known.route) == (message.path_id, message.route)
                and new.isdisjoint(known.route)
            ):
                continue
            self._tell(f"comparing the route of {name} with torch")
            task, precision = tasks[name], self._settings.precision
            images = varied(task.images, most)
            if precision == "float16":
                self._check_magnitudes(task, images)
            expected = reference_logits(task.path, self._system.tensors, images, batch_size=most)
            routes.check(name, message.route, images, expected, (1, 2, most), precision)
            golden = np.load(self._repository.folder / message.golden.images, allow_pickle=False)
            answers = np.array(message.golden.logits, dtype=np.float32).reshape(len(golden), -1)
            routes.check(name, message.route, golden, answers, (len(golden),), precision)
            if precision == "float16":
                many = varied(task.images, self._num_top1_images)
                expected = reference_logits(task.path, self._system.tensors, many, batch_size=most)
                found = routes.check_best_classes(name, message.route, many, expected, most)
                self._tell(f"float16 route of {name}: {found}")

    def _check_magnitudes(self, task: _Current, images: Pixels) -> None:
        greatest = greatest_magnitude(task.path, self._system.tensors, images)
        # Written so that a magnitude that is no number is refused too.
        if not greatest <= MOST_IN_FLOAT16:
            raise ExportError(
                f"found values up to {greatest:g} within the path of task {task.record.name!r}",
                f"at most {MOST_IN_FLOAT16:g} for float16",
                "nothing was published; export in float32",
            )

    def _generation(
        self,
        segmentation: Segmentation,
        tasks: Mapping[str, _Current],
        messages: Mapping[str, generation_pb2.Task],
        new: frozenset[str],
    ) -> generation_pb2.Generation:
        """Returns the generation, and writes the ensembles now that their segments are there."""
        current = self._repository.current_generation
        generation = generation_pb2.Generation(
            format=FORMAT,
            number=self._repository.next_number,
            previous=self._repository.current,
            system_id=self._system.id,
            exporter=exporter_version() if new or current is None else current.exporter,
            segments=[segment_to_proto(segment, self._settings) for segment in segmentation.segments.values()],
            tasks=messages.values(),
        )
        generation.created.GetCurrentTime()
        for message in messages.values():
            self._put_ensemble(self._ensemble_of(message, segmentation))
        for size, of_size in _by_size(tasks.values()).items():
            names = [task.record.name for task in of_size]
            ensemble = multi_task_ensemble(size, [self._routed(messages[name], segmentation) for name in names])
            self._put_ensemble(ensemble)
            generation.multi_task_ensembles.add(image_size=size, name=ensemble.name, tasks=names)
        generation.files.extend(self._files[path] for path in sorted(self._files))
        return generation

    def _canary(self, number: int) -> generation_pb2.Canary | None:
        percent = self._canary_percent
        return None if percent is None else generation_pb2.Canary(generation=number, percent=percent)

    def _differs(self, generation: generation_pb2.Generation) -> bool:
        """Whether a generation says anything new."""
        current = self._repository.current_generation
        if current is None:
            return True
        renumbered = generation_pb2.Generation()
        renumbered.CopyFrom(generation)
        renumbered.number, renumbered.previous = current.number, current.previous
        renumbered.created.CopyFrom(current.created)
        return renumbered != current

    def _ensemble_of(self, task: generation_pb2.Task, segmentation: Segmentation) -> Ensemble:
        return task_ensemble(self._routed(task, segmentation))

    def _routed(self, task: generation_pb2.Task, segmentation: Segmentation) -> RoutedTask:
        route = tuple(segment_to_proto(segmentation.segments[name], self._settings) for name in task.route)
        return RoutedTask(task.name, route, tuple(task.labels))

    @functools.cached_property
    def _published(self) -> Mapping[str, generation_pb2.Task]:
        """What the generation that was current before says of its tasks, by name."""
        current = self._repository.current_generation
        return {known.name: known for known in current.tasks} if current is not None else {}

    def _put(self, path: str, data: bytes) -> None:
        self._files[path] = self._repository.put(path, data)

    def _put_ensemble(self, ensemble: Ensemble) -> None:
        self._files.update((file.path, file) for file in self._repository.put_ensemble(ensemble))


def _by_size(tasks: Iterable[_Current]) -> dict[int, list[_Current]]:
    """Returns the tasks of each image size, sizes ascending, tasks in the order given."""
    grouped: dict[int, list[_Current]] = {}
    for task in tasks:
        grouped.setdefault(task.image_size, []).append(task)
    return dict(sorted(grouped.items()))
