"""Every error of the offline half, as one tree.

    EvolveError                 something a person can mend; the command line prints it and exits with status 2
    ├── SettingsError           an experiment or recipe that cannot be run
    ├── DataError               a task's images or labels cannot be used
    ├── CheckpointError         a root cannot be loaded, or is of an architecture that is not supported
    ├── SystemFolderError       a folder is no system, of a newer format, or cannot be written
    │   ├── DamagedError        a file of a system is missing or altered
    │   └── StoreError          a store cannot be used, or does not answer
    ├── TrainerError            a trainer of somebody's own does not keep its promises
    ├── WorkersDiedError        workers of a search die again and again
    ├── DeviceFailedError       a GPU failed in the process that trains
    ├── ClusterError            a Ray cluster cannot be reached, or none of its nodes can train
    ├── MemoryShortageError     a child does not fit into memory, however small the parts
    ├── BusyError               another process is evolving the same task
    │   └── ConflictError       another machine has gone on with the same round of a task
    └── ExportError             a path cannot be published

Messages say what was found, what was expected and what to do.
"""

from __future__ import annotations

from typing import Any


class EvolveError(Exception):
    """Something a person can mend. The message says what was found, what was expected and what to do."""

    def __init__(self, found: str, expected: str, advice: str = "") -> None:
        self.found = found
        self.expected = expected
        self.advice = advice
        super().__init__(f"{found}; expected {expected}" + (f"; {advice}" if advice else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors come back from workers: Python would make them anew with the message for all arguments."""
        return _remade, (type(self), self.args, self.__dict__)


def _remade(kind: type[EvolveError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> EvolveError:
    error = kind.__new__(kind)
    error.args = arguments
    error.__dict__.update(attributes)
    return error


class SettingsError(EvolveError):
    """An experiment or recipe that cannot be run."""


class DataError(EvolveError):
    """A task's images or labels cannot be used."""


class CheckpointError(EvolveError):
    """A root cannot be loaded, or is of an architecture that is not supported."""


class SystemFolderError(EvolveError):
    """A folder is no system, of a newer format, or cannot be written."""


class DamagedError(SystemFolderError):
    """A file of a system is missing or altered."""


class StoreError(SystemFolderError):
    """A store cannot be used, or has not answered for too long."""


class TrainerError(EvolveError):
    """A trainer does not keep the promises of evolve.generation.Trainer."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(
            f"found {found} from the trainer", expected, "mend the trainer; evolve.generation says what it must answer"
        )


class ClusterError(EvolveError):
    """A Ray cluster cannot be reached, or none of its nodes can train."""


class WorkersDiedError(EvolveError):
    """Workers of a search die again and again.

    Attributes:
        num_times: how often in a row.
    """

    def __init__(self, num_times: int, what: str, reason: str = "") -> None:
        self.num_times = num_times
        super().__init__(
            f"found worker processes that died {num_times} times in a row {what}" + (f" ({reason})" if reason else ""),
            "workers that live",
            "too little memory ends processes without a word: set fewer workers or a smaller pack_size",
        )


class DeviceFailedError(EvolveError):
    """A GPU failed in the process that trains, which can compute nothing more on it."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"found {reason}",
            "a device that computes",
            "what was trained so far is kept: run the same command again. With workers = 2 or more, workers start anew by themselves",
        )


class MemoryShortageError(EvolveError):
    """A path does not fit into memory, however small the parts in which its batches are computed.

    Attributes:
        num_parts: the last number of parts tried.
    """

    def __init__(self, what: str, num_parts: int, shortage: str) -> None:
        self.num_parts = num_parts
        super().__init__(
            f"found too little memory for {what}, even in {num_parts} parts ({shortage})",
            "memory for one image at a time",
            "end what else uses the device and run again, nothing that was finished is lost; or lower defaults.image_size "
            "(with auto_tune it also grows by itself), root.blocks, or the number of images",
        )


class BusyError(EvolveError):
    """Another process is evolving the same task."""


class ConflictError(BusyError):
    """Another machine has gone on with the same round of a task, or has closed or removed it."""


class ExportError(EvolveError):
    """A path cannot be published."""
