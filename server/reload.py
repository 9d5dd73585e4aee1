"""Which generation answers: loading a published one beside the one that serves, rehearsing it, and swapping it in.

A swap replaces one immutable snapshot for all tasks at once. Requests hold a lease on the snapshot they started on, and a snapshot that
was replaced is unloaded when its last lease ends. A generation that fails any step is refused whole and the one before goes on.

Which one it is, CURRENT says, until somebody goes back by `Reloader.roll_back`: then it is that one, until CURRENT says something new.
Beside it a canary may be loaded, which answers a part of the requests.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import datetime as dt
import logging
import math
import time
from collections.abc import Callable, Collection, Coroutine, Hashable, Iterator
from typing import Any, TypeVar

from server.background import give_way
from server.canary import Canary, CanaryPointer, Label, differing_tasks
from server.engine import Engine
from server.errors import (
    GenerationRefusedError,
    NoCanaryError,
    RepositoryError,
    RollbackError,
    SegmentLoadError,
    ServerError,
    UnavailableError,
)
from server.generation import Generation
from server.rehearsal import changed_tasks, rehearse
from server.repository import Repository

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class ReloadAttempt:
    """How a try to serve another generation went.

    Attributes:
        number: the generation's; 0 if not even CURRENT could be read.
        finished: when, in UTC.
        duration_seconds: how long it took.
        error: why it was refused; empty if it serves.
        is_canary: whether it was to be tried beside what serves.
    """

    number: int
    finished: dt.datetime
    duration_seconds: float
    error: str
    is_canary: bool = False


class _Snapshot:
    """A generation that serves or served, with the number of leases on it."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.num_leases = 0


class Reloader:
    """Holds the generation that serves, and replaces it; and the canary beside it, if there is one.

    All methods are for one event loop. Reading, loading and rehearsing happen in a thread that gives way to those that answer; only the
    swap itself happens here.

    Args:
        repository: where generations are published.
        engine: what loads them.
        on_swap: called with each generation from the moment it serves.
        on_attempt: called after each attempt, whichever way it went.
        retry_seconds: a refused generation is tried again after so long, for where not only its files may be to blame; none means not
            before something changes.

    Attributes:
        last_attempt: how the last try to serve another generation went; none before the first.
        rolled_back_from: number that CURRENT had when somebody went back; none if nobody did, or CURRENT is followed again.
        canary: what the repository tries beside what serves; none if nothing.
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
        self._stable: _Snapshot | None = None
        self._trial: _Snapshot | None = None
        self._differing: frozenset[str] = frozenset()
        self._reading = asyncio.Lock()
        self._swapped = asyncio.Event()
        self._background: set[asyncio.Future[Any]] = set()
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "reload", initializer=give_way)
        self._seen: Hashable = None
        self._refused: Hashable = None
        self._current_number = 0
        self.last_attempt: ReloadAttempt | None = None
        self.rolled_back_from: int | None = None
        self.canary: Canary | None = None

    @property
    def generation(self) -> Generation | None:
        """The generation that serves now; none before the first."""
        return self._stable.generation if self._stable else None

    @property
    def trial(self) -> Generation | None:
        """The generation that is tried beside it; none if none answers."""
        return self._trial.generation if self._trial else None

    @contextlib.contextmanager
    def lease(self, label: Label = Label.STABLE, tasks: Collection[str] = ()) -> Iterator[Generation]:
        """Gives a generation that answers now, and keeps it loaded until the end of the block.

        Args:
            label: which one. With `Label.ANY`, the canary gets its part of the requests about tasks that it answers otherwise.
            tasks: names of the tasks that are to answer; they matter with `Label.ANY`.

        Raises:
            UnavailableError: none serves.
            NoCanaryError: the canary is to answer, and there is none.
        """
        snapshot = self._pick(label, tasks)
        snapshot.num_leases += 1
        try:
            yield snapshot.generation
        finally:
            snapshot.num_leases -= 1
            self._unload_if_over(snapshot)

    async def reload(self) -> bool:
        """Serves the repository's current generation, if it does not do so already. This ends a rollback.

        Returns:
            Whether another generation serves now.

        Raises:
            ServerError: the generation was refused; the one before goes on serving.
        """
        return bool(await self._finish_alone(self._follow(is_order=True)))

    async def roll_back(self, number: int = 0) -> tuple[int, int]:
        """Serves a generation that is still kept, until CURRENT changes or somebody reloads. A canary ends.

        Going to the one that CURRENT names ends a rollback, though not so that a canary comes back.

        Args:
            number: which; 0 means the one that the serving generation was published on top of.

        Returns:
            The number of the generation that serves now, and of the one before.

        Raises:
            RollbackError: no such generation is kept; or none is named and the server is rolled back already.
            ServerError: the generation was refused; the one that serves goes on.
        """
        if not number:
            if self.rolled_back_from is not None or self.generation is None:
                serving = self.generation.number if self.generation else 0
                raise RollbackError(0, await self.kept_numbers(), f"{serving} serves already instead of {self.rolled_back_from}")
            # Now, and not when it is this one's turn: two people who go back at once mean the same.
            number = self.generation.previous
        numbers: tuple[int, int] = await self._finish_alone(self._roll_back(number))
        return numbers

    async def kept_numbers(self) -> list[int]:
        """Returns the numbers of the generations that the repository holds, ascending."""
        return await asyncio.to_thread(self._repository.kept_numbers)

    async def other_than(self, known: Generation | None) -> Generation:
        """Waits until another generation serves than the one that is known, and returns it."""
        while self._stable is None or self._stable.generation is known:
            await self._swapped.wait()
        return self._stable.generation

    async def watch(self, interval_seconds: float) -> None:
        """Reloads whenever what the repository says is to answer changes, until it is cancelled.

        A refused generation is tried again when CURRENT or CANARY, its own file or any of its files changes, and otherwise only if and when
        `retry_seconds` say so.
        """
        while True:
            await asyncio.sleep(interval_seconds)
            try:
                if await self._has_news():
                    await self._finish_alone(self._follow())
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
        self._thread.shutdown()

    def _pick(self, label: Label, tasks: Collection[str]) -> _Snapshot:
        stable, trial, canary = self._stable, self._trial, self.canary
        if stable is None:
            raise UnavailableError("without a generation")
        if label is Label.STABLE:
            return stable
        if trial is None or canary is None:
            if label is Label.CANARY:
                raise NoCanaryError(stable.generation.number, canary.refusal if canary else "")
            return stable
        if label is Label.ANY:
            drawn = self._differing.intersection(tasks)
            if not drawn or not all(task in trial.generation.tasks for task in tasks) or not canary.draw(drawn):
                return stable
        canary.num_requests += 1
        return trial

    async def _has_news(self) -> bool:
        async with self._reading:
            if await self._is_passed_over():
                return False
            if await asyncio.to_thread(self._repository.fingerprint) != self._seen:
                return True
            if self._refused is None:
                return False
            if time.monotonic() - self._refused_seconds >= self._retry_seconds:
                return True
            return await asyncio.to_thread(self._repository.fingerprint_of_files) != self._refused

    async def _is_passed_over(self) -> bool:
        """Whether somebody went back, and CURRENT says nothing new since."""
        if self.rolled_back_from is None:
            return False
        try:
            return await asyncio.to_thread(self._repository.current_number) == self.rolled_back_from
        except RepositoryError:
            return True

    async def _follow(self, is_order: bool = False) -> bool:
        """Goes where the repository says; unless somebody went back, who gave an order later than that."""
        async with self._reading:
            if not is_order and await self._is_passed_over():
                return False
            # Taken before reading: whatever changes from now on is looked at again.
            self._seen = await asyncio.to_thread(self._repository.fingerprint)
            files = await asyncio.to_thread(self._repository.fingerprint_of_files)
            self._refused = None
            try:
                changed = await self._attempt()
                self.rolled_back_from = None
            except Exception:
                self._refuse(files)
                raise
            finally:
                if not await self._follow_canary():
                    self._refuse(files)
            return changed

    async def _roll_back(self, number: int) -> tuple[int, int]:
        async with self._reading:
            before = self._stable.generation.number if self._stable else 0
            kept = await self.kept_numbers()
            if number not in kept:
                raise RollbackError(number, kept)
            await self._attempt(number)
            self.rolled_back_from = self._current_number if number != self._current_number else None
            self._end_trial(None)
            if self.rolled_back_from is not None:
                _log.warning(
                    "generation %d serves instead of %d until CURRENT changes: rolled back", number, self.rolled_back_from
                )
            return number, before

    async def _attempt(self, number: int = 0) -> bool:
        """Serves a generation, by default the current one, and records how that went."""
        started = time.monotonic()
        try:
            if not number:
                number = self._current_number = await asyncio.to_thread(self._repository.current_number)
            changed = await self._replace(number)
        except Exception as error:
            if self._stable is not None:
                _log.error("generation %d goes on: %s", self._stable.generation.number, _reason_of(error))
            self.last_attempt = self._record(number, started, _reason_of(error))
            raise
        # What serves already and is whole again ends a refusal, too.
        if changed or (self.last_attempt is not None and self.last_attempt.error):
            self.last_attempt = self._record(number, started)
        return changed

    async def _replace(self, number: int) -> bool:
        old, trial = self._stable, self._trial
        generation = await self._giving_way(self._repository.read, number)
        if old is not None and generation.digest == old.generation.digest:
            return False
        if trial is not None and generation.digest == trial.generation.digest:
            # The canary is promoted: loaded and rehearsed it is.
            self._stable, generation = trial, trial.generation
            self._end_trial(None)
        else:
            await self._giving_way(self._prepare, generation, old.generation if old else None)
            self._stable = _Snapshot(generation)
        _log.info("generation %d serves %d tasks with %d segments", number, len(generation.tasks), len(generation.segments))
        self._on_swap(generation)
        self._swapped.set()
        self._swapped = asyncio.Event()
        if old is not None:
            self._unload_if_over(old)
        return True

    async def _follow_canary(self) -> bool:
        """Tries beside what serves what the repository says is to be tried; returns whether that could be done."""
        if self._stable is None or self.rolled_back_from is not None:
            return True
        started = time.monotonic()
        pointer = CanaryPointer(0, 0.0, {})
        try:
            found = await asyncio.to_thread(self._repository.canary)
            # One that is older than what serves is what a publisher left behind that was killed.
            if found is None or found.number <= self._current_number:
                self._end_trial(None)
                return True
            pointer = found
            generation = await self._giving_way(self._repository.read, pointer.number)
            await self._try_beside(generation, pointer, started)
        except Exception as error:
            # Whatever is wrong with a canary, it is refused and what serves goes on.
            self._end_trial(Canary(pointer, _reason_of(error)))
            _log.error("no canary: %s", _reason_of(error))
            self._record(pointer.number, started, _reason_of(error), is_canary=True)
            return False
        return True

    async def _try_beside(self, generation: Generation, pointer: CanaryPointer, started: float) -> None:
        stable = self._stable
        if stable is None or generation.digest == stable.generation.digest:
            self._end_trial(None)
            return
        if self._trial is None or self._trial.generation.digest != generation.digest:
            self._end_trial(None)
            await self._giving_way(self._prepare, generation, stable.generation)
            self._trial = _Snapshot(generation)
            _log.info("generation %d is the canary beside %d", generation.number, stable.generation.number)
            self._record(generation.number, started, is_canary=True)
        self._differing = differing_tasks(stable.generation, self._trial.generation)
        if self.canary is None or self.canary.refusal or self.canary.pointer != pointer:
            self.canary = Canary(pointer)

    def _end_trial(self, canary: Canary | None) -> None:
        """Gives the canary no more requests, and says of it what is given."""
        ended, self._trial, self.canary = self._trial, None, canary
        if ended is not None:
            self._unload_if_over(ended)

    def _prepare(self, generation: Generation, serving: Generation | None) -> None:
        """Loads a generation and rehearses it; in a thread. If it raises, nothing of the generation stays loaded."""
        try:
            self._engine.load(generation)
        except SegmentLoadError as error:
            raise GenerationRefusedError(generation.number, [error.finding]) from error
        try:
            findings = rehearse(self._engine, generation, changed_tasks(generation, serving))
            if findings:
                raise GenerationRefusedError(generation.number, findings)
        except BaseException:
            self._engine.unload(generation)
            raise

    async def _giving_way(self, function: Callable[..., T], *arguments: object) -> T:
        # With the context of whoever asked, as in `asyncio.to_thread`: the log names the request.
        run = contextvars.copy_context().run
        return await asyncio.get_running_loop().run_in_executor(self._thread, run, function, *arguments)

    def _refuse(self, files: Hashable) -> None:
        self._refused = files
        self._refused_seconds = time.monotonic()

    def _record(self, number: int, started: float, error: str = "", is_canary: bool = False) -> ReloadAttempt:
        attempt = ReloadAttempt(number, dt.datetime.now(dt.UTC), time.monotonic() - started, error, is_canary)
        self._on_attempt(attempt)
        return attempt

    def _unload_if_over(self, snapshot: _Snapshot) -> None:
        if snapshot is not self._stable and snapshot is not self._trial and not snapshot.num_leases:
            self._start(asyncio.to_thread(self._engine.unload, snapshot.generation))

    async def _finish_alone(self, work: Coroutine[Any, Any, Any]) -> Any:
        # Shielded, because a thread cannot be stopped: a caller who leaves must not leave a half-done reload behind.
        return await asyncio.shield(self._start(work))

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


def _reason_of(error: Exception) -> str:
    return str(error) if isinstance(error, ServerError) else repr(error)
