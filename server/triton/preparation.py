"""Has one Triton hold a generation: its segments, then its ensembles, then its golden answers.

Every name is one of content, so nothing that answers now is replaced: until the front door asks for it, a new generation is as good as
thrown away. Whatever fails leaves what was there before.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Collection, Iterator, Sequence

from munet.parity import find_disagreement
from server.config import TritonSettings
from server.errors import (
    EndpointError,
    EndpointGoneError,
    Finding,
    GenerationRefusedError,
    SegmentLoadError,
)
from server.generation import Task
from server.triton.asking import ask
from server.triton.counters import Counters
from server.triton.endpoint import Endpoint
from server.triton.plans import HeldGeneration

NUM_REHEARSED_TASKS = 64
"""Tasks in one question of a rehearsal: enough to share what they share, few enough to let other questions in between."""

_NUM_THREADS = 4
"""So many models are loaded at a time: Triton itself starts no more."""

_ADVICE = "publish again"


class Preparation:
    """One generation on its way into one Triton.

    Args:
        endpoint: the Triton.
        held: the generation.
        known: models that were loaded and answered as they should; if they are ready they are left alone.
        counters: where its segments are counted from now on.
        settings: how long what may take.
        stop: when set, no more is begun, and `run` fails with one error or another; none means that it is never set.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        held: HeldGeneration,
        known: Collection[str],
        counters: Counters,
        settings: TritonSettings,
        stop: threading.Event | None = None,
    ) -> None:
        self._endpoint = endpoint
        self._held = held
        self._generation = held.generation
        self._known = known
        self._counters = counters
        self._settings = settings
        self._stops = [threading.Event(), *([stop] if stop else [])]

    def run(self) -> None:
        """Loads what is new and has it answer.

        Raises:
            SegmentLoadError: a segment cannot be loaded.
            GenerationRefusedError: an ensemble cannot be loaded, or a golden answer is another one.
            EndpointGoneError: Triton does not answer.
            EndpointError: it has another repository.
        """
        self._check_repository()
        ready = self._endpoint.loaded()
        new = self._held.models.difference(model for model in self._known if model in ready)
        with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="triton-load") as threads:
            self._load_segments(threads, sorted(new - self._held.ensembles))
            # From here on, so that what the golden images cost is known and not counted.
            counts = self._endpoint.counts()
            self._counters.see(counts)
            self._counters.begin(self._generation.segments, counts)
            self._load_ensembles(threads, sorted(new & self._held.ensembles))
            findings = [finding for found in threads.map(self._rehearse, self._questions(new)) for finding in found]
        if findings:
            raise GenerationRefusedError(self._generation.number, findings)

    def _check_repository(self) -> None:
        missing = sorted(self._held.models - self._endpoint.models())
        if missing:
            raise EndpointError(
                self._endpoint.address,
                f"found {len(missing)} of {len(self._held.models)} models missing in its model repository, such as {missing[0]!r}, "
                f"expected all of generation {self._generation.number}; start it with the repository that this server has",
            )

    def _load_segments(self, threads: concurrent.futures.Executor, names: Sequence[str]) -> None:
        errors = dict(zip(names, threads.map(self._try_to_load, names), strict=True))
        self._raise_if_gone(errors.values())
        for name, error in errors.items():
            if error is not None:
                raise SegmentLoadError(name, str(error), "a segment that Triton loads")

    def _load_ensembles(self, threads: concurrent.futures.Executor, names: Sequence[str]) -> None:
        errors = dict(zip(names, threads.map(self._try_to_load, names), strict=True))
        self._raise_if_gone(errors.values())
        findings = [
            Finding(f"ensemble {name!r}", str(error), "an ensemble that Triton loads", _ADVICE)
            for name, error in errors.items()
            if error is not None
        ]
        if findings:
            raise GenerationRefusedError(self._generation.number, findings)

    def _try_to_load(self, name: str) -> EndpointError | None:
        # What fails once fails the whole: no more is begun.
        if any(stop.is_set() for stop in self._stops):
            return None
        try:
            self._endpoint.load(name, self._settings.load_timeout_seconds)
        except EndpointError as error:
            self._stops[0].set()
            return error
        return None

    def _raise_if_gone(self, errors: Collection[EndpointError | None]) -> None:
        for error in errors:
            if isinstance(error, EndpointGoneError):
                raise error

    def _questions(self, new: Collection[str]) -> Iterator[list[Task]]:
        """Returns the tasks to ask together: each alone, and then those of a size together, as far as their ensembles are new."""
        tasks = self._generation.tasks.values()
        yield from ([task] for task in tasks if task.ensemble in new)
        for size, ensemble in self._generation.ensembles.items():
            of_size = sorted((task for task in tasks if task.image_size == size), key=lambda task: str(task.golden.images))
            if ensemble in new and len(of_size) > 1:
                yield from (of_size[start : start + NUM_REHEARSED_TASKS] for start in range(0, len(of_size), NUM_REHEARSED_TASKS))

    def _rehearse(self, tasks: Sequence[Task]) -> list[Finding]:
        where = f"task {tasks[0].name!r}: golden answer" if len(tasks) == 1 else f"golden answers of {len(tasks)} tasks together"
        where = f"{where} at {self._endpoint.address}"
        findings = []
        # The tasks of a size have the same golden images, unless they were published apart.
        for images_file in dict.fromkeys(task.golden.images for task in tasks):
            asked = [task for task in tasks if task.golden.images == images_file]
            try:
                plan = self._held.plan(tuple(task.name for task in asked))
                images = asked[0].golden.read_images()
                answers = ask(self._endpoint, self._counters, plan, images, self._settings.load_timeout_seconds)
            except (OSError, ValueError) as error:
                findings.append(Finding(images_file.name, str(error)[:300], f"golden images of {tasks[0].image_size} pixels"))
                continue
            except EndpointGoneError:
                raise
            except EndpointError as error:
                findings.append(Finding(where, str(error), "logits", "export it again"))
                continue
            for task in asked:
                disagreement = find_disagreement(answers[task.name], task.golden.logits, task.golden.tolerance)
                if disagreement is not None:
                    findings.append(Finding(f"{where}, task {task.name!r}", *disagreement, "export it again"))
        return findings
