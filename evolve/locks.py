"""The locks of a system: who may evolve, publish, store, read and collect beside whom. Their ends, also by a crash, release them.

They are files in locks/, held with flock by processes. `collecting` keeps out whoever is storing, reading or publishing; `storing`
and `reading` are shared; `publishing` is for one at a time.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pathlib
from collections.abc import Callable, Iterator

from evolve.errors import BusyError, SystemFolderError

_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class Locks:
    """The locks of the system in one folder.

    All raise SystemFolderError if the folder cannot be written; those that only look are then held by nobody.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Locks below a system's folder; nothing is made before one is taken."""
        self._folder = folder

    @contextlib.contextmanager
    def creating(self) -> Iterator[None]:
        """Held while the system is made; waits for it."""
        with self._take("system", wait=True):
            yield

    @contextlib.contextmanager
    def evolving(self, task: str) -> Iterator[None]:
        """Held by who evolves a task.

        Raises:
            BusyError: another process holds it.
        """
        with self._take_or_tell(_task_lock(task), f"task {task!r}", "other tasks can be evolved meanwhile, each with --task"):
            yield

    @contextlib.contextmanager
    def comparing(self, baseline: str, task: str) -> Iterator[None]:
        """Held by who trains a task's baseline.

        Args:
            baseline: name of its folder in baselines/.
            task: name of the task.

        Raises:
            BusyError: another process holds it.
        """
        what = f"the baseline {baseline} of task {task!r}"
        with self._take_or_tell(_task_lock(task, baseline), what, "other tasks and methods can be run meanwhile"):
            yield

    @contextlib.contextmanager
    def unless_busy(self, task: str, baseline: str | None = None) -> Iterator[bool]:
        """Tells whether nobody evolves a task, or trains its baseline; whoever wants to begin waits until this is over."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._take("beginning", wait=True))
            try:
                stack.enter_context(self._take(_task_lock(task, baseline), wait=False))
                is_free = True
            except BlockingIOError:
                is_free = False
            yield is_free

    @contextlib.contextmanager
    def fetching(self, part: str) -> Iterator[None]:
        """Held while files are brought here from elsewhere; waits for it.

        Args:
            part: those of other parts can be fetched meanwhile.
        """
        with self._take(f"fetch-{part}", wait=True):
            yield

    @contextlib.contextmanager
    def publishing(self) -> Iterator[None]:
        """Held while tasks' records are changed; waits for it."""
        with self._take("tasks", wait=True):
            yield

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """Keeps layers, paths and examples from being collected until something names them; waits while garbage is collected.

        Whoever writes them, or finds them written, holds this from there to the record in a journal or the examination that needs
        them. Taken before `publishing`, never within it. Any number of processes may hold it.
        """
        with self._take("files", wait=True, shared=True):
            yield

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Keeps what the tasks' records name from being collected while it is read; waits while garbage is collected.

        Any number of processes may hold it. In a folder that cannot be written there is nothing to wait for.
        """
        with self._take("files", wait=True, shared=True, only_looks=True):
            yield

    @contextlib.contextmanager
    def collecting(self, *, only_looks: bool, waits: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Holds the system alone, for whoever removes files: nobody is storing, reading or publishing.

        Args:
            only_looks: nothing will be removed, so a folder that cannot be written will do.
            waits: is called if others have to finish first.
        """
        try:
            alone = self._take("files", wait=False, only_looks=only_looks)
        except BlockingIOError:
            waits()
            alone = self._take("files", wait=True, only_looks=only_looks)
        with alone, self._take("tasks", wait=True, only_looks=only_looks):
            yield

    def _take_or_tell(self, name: str, what: str, meanwhile: str) -> contextlib.ExitStack:
        """Takes a lock that one process may have at a time, or raises BusyError."""
        try:
            # Whoever looks whether it is free holds it for a moment.
            with self._take("beginning", wait=True):
                return self._take(name, wait=False)
        except BlockingIOError:
            raise BusyError(
                f"found another process at work on {what} of {self._folder}", "one at a time", f"wait until it ends; {meanwhile}"
            ) from None

    def _take(self, name: str, *, wait: bool, shared: bool = False, only_looks: bool = False) -> contextlib.ExitStack:
        """Takes a lock, alone or shared, to be held within the context that is returned.

        Raises:
            BlockingIOError: another process holds it, and it is not to be waited for.
        """
        file = self._folder / "locks" / f"{name}.lock"
        mode = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
        with contextlib.ExitStack() as stack:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(file, (os.O_RDONLY if shared else os.O_RDWR) | os.O_CREAT, 0o644)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, mode)
            except BlockingIOError:
                raise
            except OSError as error:
                if not (only_looks and error.errno in _READ_ONLY):
                    reason = error.strerror or str(error)
                    raise SystemFolderError(
                        f"could not write in {self._folder} ({reason})", "a writable folder with free space"
                    ) from error
            return stack.pop_all()


def _task_lock(task: str, baseline: str | None = None) -> str:
    return f"task-{task}" if baseline is None else f"baseline-{baseline}-{task}"
