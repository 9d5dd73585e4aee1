"""A trainer that gives packs to worker processes of this machine, each with a trainer of its own and, if there are several, a GPU.

A worker that dies, or meets an error of its GPU, takes the others with it: all start anew, and what was under way runs again. So it is
when one hangs, which shows once the others have nothing left to do and it is not done for far longer than anything took before. Workers
end with the process that started them, however that ends.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import math
import multiprocessing
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evolve.config import TrainingSettings
from evolve.data.task import TaskData
from evolve.errors import EvolveError, WorkersDiedError
from evolve.generation import Trainer
from evolve.observers import Tell
from evolve.store import Location, System
from evolve.training.spread import MOST_DEATHS, START_SECONDS, UNKNOWN, Order, SpreadTrainer, carry_out, make_trainer, size_of

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

TICK_SECONDS = 1.0
"""How often a search that waits for answers looks whether it was itself held up: what a stopped process did not see is no hanging."""

_PRELOADED = ("evolve.training.together", "evolve.data.load")

_trainer: Trainer | Exception | None = None
"""A worker's own; or the error that kept it from being made."""


class WorkersTrainer(SpreadTrainer):
    """A Trainer (evolve.generation) whose packs are trained by worker processes."""

    def __init__(self, system: System, data: TaskData, settings: TrainingSettings, tell: Tell = lambda _sentence: None) -> None:
        """Prepares to train; workers start with the first pack.

        Args:
            system: gives the layers; workers open it themselves.
            data: of the task; each worker gets a copy, and shares what is mapped from a cache.
            settings: `workers` is how many, all else is as for a single process. On CUDA, the first worker has the first GPU, and so on,
                beginning again after the last.
            tell: told of workers that seem to hang.

        Raises:
            SettingsError: the settings ask for a device that is not there, or a precision that it does not have.
        """
        super().__init__(system, data, settings, tell)
        self._arguments = (system.location, data, settings)
        self._num_workers = settings.workers
        # What it depends on is what a trainer in this process would.
        self._identity = dict(make_trainer(system, data, settings).identity)
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    @property
    def identity(self) -> Mapping[str, str]:
        """See Trainer.identity: the number of workers is no part of it."""
        return self._identity

    def _answers(self, orders: Sequence[Order]) -> Iterator[Any]:
        waiting = list(orders)
        deaths = given_up = 0
        while waiting:
            start_seconds = START_SECONDS if self._pool is None else 0.0
            pool = self._workers()
            futures = {pool.submit(_carry_out, order): order for order in waiting}
            try:
                while futures:
                    done = self._next_done(futures, given_up, start_seconds)
                    start_seconds = 0.0
                    if not done:
                        given_up += 1
                        self._dismiss()
                        break
                    # What was done before a worker died counts.
                    for future in sorted(done, key=lambda one: one.exception() is not None):
                        seconds, answer = future.result()
                        order = futures.pop(future)
                        waiting.remove(order)
                        self._note_duration(order, seconds)
                        deaths = 0
                        yield answer
            except RuntimeError as error:
                # Of a pool whose worker died; or of a GPU: after such an error its process can compute nothing any more.
                deaths += 1
                self._dismiss()
                if deaths == MOST_DEATHS:
                    if not isinstance(error, concurrent.futures.process.BrokenProcessPool):
                        raise
                    raise WorkersDiedError(MOST_DEATHS, f"at {self._described(waiting)}") from error
            except BaseException:
                # Interrupted, or an error of a pack: what still runs is of no use.
                self._dismiss()
                raise

    def _next_done(
        self, futures: Mapping[concurrent.futures.Future[Any], Order], given_up: int, start_seconds: float
    ) -> set[concurrent.futures.Future[Any]]:
        """Waits until some of what workers were given is done, and returns it; nothing if they seem to hang.

        Whatever a worker is at now it began at the last answer at the latest: so long as nobody answers, all have been at it.

        Args:
            futures: all that is not done yet.
            given_up: how often it seemed so before.
            start_seconds: that workers may take to begin.
        """
        if not self._longest:
            bound = self._most_seconds(1, 0)
            done = _wait(futures, bound)
            if not done:
                self._tell(f"no worker is done after {bound:.0f} s; {UNKNOWN}")
                done = _wait(futures, math.inf)
            return done
        bound = start_seconds + self._most_seconds(max(map(size_of, futures.values())), given_up)
        done = _wait(futures, bound)
        if not done:
            what = self._described(list(futures.values()))
            self._tell(
                f"no worker is done with {what} after {bound:.0f} s, far longer than any before; all start anew, and it runs again"
            )
        return done

    def _workers(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._pool is None:
            # Not forked from this process, whose threads and GPU contexts a copy could not use.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(list(_PRELOADED))
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._num_workers, context, _begin, (context.Value("i", 0), *self._arguments)
            )
            weakref.finalize(self, _end, self._pool)
        return self._pool

    def _dismiss(self) -> None:
        if self._pool is not None:
            _end(self._pool)
            self._pool = None


def _wait(futures: Iterable[concurrent.futures.Future[Any]], seconds: float) -> set[concurrent.futures.Future[Any]]:
    """Returns those that are done, once some are; none after so many seconds of waiting."""
    waited_seconds = 0.0
    while waited_seconds < seconds:
        began_seconds = time.monotonic()
        done = concurrent.futures.wait(
            futures, min(TICK_SECONDS, seconds - waited_seconds), concurrent.futures.FIRST_COMPLETED
        ).done
        if done:
            return done
        waited_seconds += min(time.monotonic() - began_seconds, 2 * TICK_SECONDS)
    return set()


def _end(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """Ends workers at once, also in the middle of a pack."""
    processes = list((pool._processes or {}).values())
    for process in processes:
        process.kill()
    pool.shutdown(wait=True, cancel_futures=True)


# What runs in the workers


def _begin(counter: Synchronized[int], location: Location, data: TaskData, settings: TrainingSettings) -> None:
    global _trainer
    # Whoever started them decides when they end: Ctrl-C goes to all processes of a terminal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_owner, daemon=True).start()
    with counter.get_lock():
        number = counter.value
        counter.value += 1
    _choose_gpu(number)
    try:
        _trainer = make_trainer(System.open(location), data, settings)
    except (EvolveError, OSError, RuntimeError) as error:
        # Raised here, it would be the death of all workers, without a reason.
        _trainer = error


def _end_with_owner() -> None:
    """Waits until the process that started this one has ended, and ends this one, whatever it is at."""
    owner = multiprocessing.parent_process()
    if owner is not None:
        owner.join()
    os._exit(1)


def _choose_gpu(number: int) -> None:
    """Leaves one GPU visible to this process, before anything has looked for one."""
    import torch

    count = torch.cuda.device_count()
    if count > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[number % len(visible)]


def _carry_out(order: Order) -> tuple[float, Any]:
    """Returns how many seconds an order took, and the answer to it."""
    if _trainer is None:
        raise RuntimeError("a worker that has not begun")
    if isinstance(_trainer, Exception):
        raise _trainer
    began_seconds = time.monotonic()
    answer = carry_out(_trainer, order)
    return time.monotonic() - began_seconds, answer
