"""Which generation answers: loading a published one beside the one that serves, rehearsing it, and swapping it in.

A swap replaces one immutable snapshot for all tasks at once. Requests hold a lease on the snapshot they started on, and a snapshot that
was replaced is unloaded when its last lease ends. A generation that fails any step is refused whole and the one before goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime as dt
import logging
import math
import time
from collections.abc import Callable, Coroutine, Hashable, Iterator
from typing import Any

import numpy as np

from munet.parity import find_disagreement
from server.engine import Engine, Question
from server.errors import Finding, GenerationRefusedError, SegmentLoadError, SegmentRunError, ServerError, UnavailableError
from server.generation import Generation, Task
from server.repository import Repository

_log = logging.getLogger(__name__)

NUM_REHEARSED_TASKS = 64
"""Tasks in one question of a rehearsal: enough to share what they share, few enough to let other questions in between."""


@dataclasses.dataclass(frozen=True, slots=True)
class ReloadAttempt:
    """How a try to serve another generation went.

    Attributes:
        number: the generation's; 0 if not even CURRENT could be read.
        finished: when, in UTC.
        duration_seconds: how long it took.
        error: why it was refused; empty if it serves.
    """

    number: int
    finished: dt.datetime
    duration_seconds: float
    error: str


class _Snapshot:
    """A generation that serves or served, with the number of leases on it."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.num_leases = 0


class Reloader:
    """Holds the generation that serves, and replaces it.

    All methods are for one event loop. Reading, loading and rehearsing happen in a thread; only the swap itself happens here.

    Args:
        repository: where generations are published.
        engine: what loads them.
        on_swap: called with each generation from the moment it serves.
        on_attempt: called after each attempt, whichever way it went.
        retry_seconds: a refused generation is tried again after so long, for where not only its files may be to blame; none means not
            before something changes.
    """

    def __init__(
        self,
        repository: Repository,
        engine: Engine,
        on_swap: Callable[[Generation], None],
        on_attempt: Callable[[ReloadAttempt], None],
        retry_seconds: float | None = None,
    ) -> None:
        self._repository = repository
        self._engine = engine
        self._on_swap = on_swap
        self._on_attempt = on_attempt
        self._retry_seconds = math.inf if retry_seconds is None else retry_seconds
        self._refused_seconds = 0.0
        self._snapshot: _Snapshot | None = None
        self._reading = asyncio.Lock()
        self._background: set[asyncio.Future[Any]] = set()
        self._seen: Hashable = None
        self._refused: Hashable = None
        self.last_attempt: ReloadAttempt | None = None

    @property
    def generation(self) -> Generation | None:
        """The generation that serves now; none before the first."""
        return self._snapshot.generation if self._snapshot else None

    @contextlib.contextmanager
    def lease(self) -> Iterator[Generation]:
        """Gives the generation that serves now, and keeps it loaded until the end of the block.

        Raises:
            UnavailableError: none serves.
        """
        snapshot = self._snapshot
        if snapshot is None:
            raise UnavailableError("without a generation")
        snapshot.num_leases += 1
        try:
            yield snapshot.generation
        finally:
            snapshot.num_leases -= 1
            if snapshot is not self._snapshot and not snapshot.num_leases:
                self._unload(snapshot.generation)

    async def reload(self) -> bool:
        """Serves the repository's current generation, if it does not do so already.

        Returns:
            Whether another generation serves now.

        Raises:
            ServerError: the generation was refused; the one before goes on serving.
        """
        # Shielded, because a thread cannot be stopped: a caller who leaves must not leave a half-done reload behind.
        return bool(await asyncio.shield(self._start(self._reload())))

    async def watch(self, interval_seconds: float) -> None:
        """Reloads whenever the repository's current generation changes, until it is cancelled.

        A refused generation is tried again when CURRENT, its own file or any of its files changes, and otherwise only if and when
        `retry_seconds` say so.
        """
        while True:
            await asyncio.sleep(interval_seconds)
            try:
                if await self._has_news():
                    await self.reload()
            except ServerError:
                # Said in the log and in `last_attempt` already.
                continue
            except Exception:
                # The edge of the task: without it no generation would ever be noticed again.
                _log.exception("watching the repository failed")

    async def close(self) -> None:
        """Waits until what is under way is done."""
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)

    async def _has_news(self) -> bool:
        async with self._reading:
            if await asyncio.to_thread(self._repository.fingerprint) != self._seen:
                return True
            if self._refused is None:
                return False
            if time.monotonic() - self._refused_seconds >= self._retry_seconds:
                return True
            return await asyncio.to_thread(self._repository.fingerprint_of_files) != self._refused

    async def _reload(self) -> bool:
        async with self._reading:
            # Taken before reading: whatever changes from now on is looked at again.
            self._seen = await asyncio.to_thread(self._repository.fingerprint)
            files = await asyncio.to_thread(self._repository.fingerprint_of_files)
            self._refused = None
            started = time.monotonic()
            number = 0
            try:
                number = await asyncio.to_thread(self._repository.current_number)
                changed = await self._replace(number)
            except Exception as error:
                reason = str(error) if isinstance(error, ServerError) else repr(error)
                if self._snapshot is not None:
                    _log.error("generation %d goes on: %s", self._snapshot.generation.number, reason)
                self._record(number, time.monotonic() - started, reason)
                self._refused = files
                self._refused_seconds = time.monotonic()
                raise
            if changed:
                self._record(number, time.monotonic() - started, "")
            return changed

    async def _replace(self, number: int) -> bool:
        old = self._snapshot
        generation = await asyncio.to_thread(self._repository.read, number)
        if old is not None and generation.digest == old.generation.digest:
            return False
        await asyncio.to_thread(self._prepare, generation, old.generation if old else None)
        self._snapshot = _Snapshot(generation)
        _log.info("generation %d serves %d tasks with %d segments", number, len(generation.tasks), len(generation.segments))
        self._on_swap(generation)
        if old is not None and not old.num_leases:
            self._unload(old.generation)
        return True

    def _prepare(self, generation: Generation, serving: Generation | None) -> None:
        """Loads a generation and rehearses it; in a thread. If it raises, nothing of the generation stays loaded."""
        try:
            self._engine.load(generation)
        except SegmentLoadError as error:
            raise GenerationRefusedError(generation.number, [error.finding]) from error
        try:
            findings = rehearse(self._engine, generation, _changed_tasks(generation, serving))
            if findings:
                raise GenerationRefusedError(generation.number, findings)
        except BaseException:
            self._engine.unload(generation)
            raise

    def _record(self, number: int, duration_seconds: float, error: str) -> None:
        self.last_attempt = ReloadAttempt(number, dt.datetime.now(dt.UTC), duration_seconds, error)
        self._on_attempt(self.last_attempt)

    def _unload(self, generation: Generation) -> None:
        self._start(asyncio.to_thread(self._engine.unload, generation))

    def _start(self, work: Coroutine[Any, Any, Any]) -> asyncio.Future[Any]:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._finish)
        return task

    def _finish(self, task: asyncio.Future[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled():
            # Whoever waited has been told; if nobody did, the log has been.
            task.exception()


def rehearse(engine: Engine, generation: Generation, tasks: list[Task]) -> list[Finding]:
    """Asks a loaded generation its golden images; this also runs each of its segments once before a caller does.

    Args:
        engine: what holds the generation.
        generation: what to ask.
        tasks: the tasks to ask, of this generation.

    Returns:
        A finding for each task that does not answer as it should.
    """
    findings: list[Finding] = []
    by_images: dict[tuple[str, int], list[Task]] = {}
    for task in tasks:
        by_images.setdefault((str(task.golden.images), task.image_size), []).append(task)
    for alike in by_images.values():
        for start in range(0, len(alike), NUM_REHEARSED_TASKS):
            findings += _rehearse_together(engine, generation, alike[start : start + NUM_REHEARSED_TASKS])
    return findings


def _rehearse_together(engine: Engine, generation: Generation, tasks: list[Task]) -> Iterator[Finding]:
    golden = tasks[0].golden
    try:
        question = Question(generation, golden.read_images(), tuple(task.name for task in tasks), counted=False)
        answers = engine.answer(question).result()
    except (OSError, ValueError) as error:
        yield Finding(golden.images.name, str(error)[:300], f"the golden images of tasks of {tasks[0].image_size} pixels")
        return
    except SegmentRunError as error:
        if len(tasks) > 1:
            # One of them is to blame, and the finding is to name it.
            for task in tasks:
                yield from _rehearse_together(engine, generation, [task])
        else:
            yield Finding(f"task {tasks[0].name!r}: golden answer", str(error), "logits", "export it again")
        return
    except ServerError as error:
        yield Finding(f"golden answers of {len(tasks)} tasks", str(error), "logits")
        return
    for task in tasks:
        disagreement = find_disagreement(answers[task.name], task.golden.logits, task.golden.tolerance)
        if disagreement is not None:
            yield Finding(f"task {task.name!r}: golden answer", *disagreement, "export it again")


def _changed_tasks(generation: Generation, serving: Generation | None) -> list[Task]:
    """Returns the tasks that the serving generation does not already answer with the same segments and golden answers."""
    if serving is None:
        return list(generation.tasks.values())
    changed = []
    for task in generation.tasks.values():
        known = serving.tasks.get(task.name)
        if (
            known is None
            or known.route != task.route
            or known.golden.images != task.golden.images
            or known.golden.tolerance != task.golden.tolerance
            or not np.array_equal(known.golden.logits, task.golden.logits)
        ):
            changed.append(task)
    return changed
