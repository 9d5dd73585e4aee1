"""Scalars of a search for TensorBoard, written through tensorboardX (the extra `tensorboard`)."""

from __future__ import annotations

import contextlib
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from evolve.documents import TaskRecord
from evolve.errors import SystemFolderError
from evolve.generation import ChildPlan, GenerationPlan
from evolve.hyperparameters import tunables
from evolve.journal import Record
from evolve.outcomes import Outcomes
from evolve.path import Path

_WORDS = {
    tunable.name: tunable.options for tunable in tunables(max_blocks=1, patch_size=1) if isinstance(tunable.options[0], str)
}
"""Options of the hyperparameters that are words: they are written as their places in the list."""


class TensorBoardObserver:
    """Writes a point for each child; see evolve.search.Observer.

    Every round of every task is a run of its own, `<task>/round-<n>`, with the children counted from 1. A search that goes on is told
    of its earlier children again: they are written again, and TensorBoard is told to forget what the run had before. So each point
    is shown once, also of children that were trained but not yet in the journal when the process was killed.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Writes below a folder, made if missing.

        Raises:
            SystemFolderError: it cannot be made.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from error
        self._folder = folder
        # Not its SummaryWriter: that one writes in a thread of its own, whose end by a full disk would block the search for ever.
        self._writer: Any = None
        self._step = 0
        self._best_quality = 0.0
        self._best_score = 0.0

    def search_opened(self, task: str, round_number: int, seeds: Sequence[Path], num_children: int, reused: int) -> None:
        """Begins a run."""
        self.stop()
        self._step, self._best_quality, self._best_score = 0, 0.0, 0.0
        run = self._folder / task / f"round-{round_number + 1}"
        try:
            run.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(run / "events"))
        except OSError as error:
            self._give_up(error)
        self._write([Event(step=0, session_log=SessionLog(status=SessionLog.START))])

    def generation_planned(self, plan: GenerationPlan) -> None:
        """Nothing to write before results come."""

    def child_finished(self, plan: ChildPlan, record: Record) -> None:
        """Writes a child's point."""
        self._step += 1
        outcome = Outcomes.of_one(record)
        if outcome.survived:
            # What may become current: a child that was dropped never does.
            self._best_quality = max(self._best_quality, record["quality"])
            self._best_score = max(self._best_score, record["score"])
        scalars = {
            "child/quality": record["quality"],
            "child/score": record["score"],
            "child/accounted_parameters": record["accounted_parameters"],
            "child/seconds": record["seconds"]["train"] + record["seconds"]["evaluate"],
            "child/survived": float(outcome.survived),
            "child/diverged": float(outcome.diverged),
            "child/stopped_early": float(outcome.stopped_early),
            "best/quality": self._best_quality,
            "best/score": self._best_score,
            **{f"hyperparameters/{name}": value for name, value in numbers(plan.hyperparameters.to_dict()).items()},
        }
        self._write_scalars(scalars)

    def search_closed(self, task: str, path: Path, record: TaskRecord) -> None:
        """Writes what became current, and ends the run."""
        scalars = {"current/quality": record.quality}
        if record.test_accuracy is not None:
            scalars["current/test_accuracy"] = record.test_accuracy
        self._write_scalars(scalars)
        self.stop()

    def stop(self) -> None:
        """Ends the run; also after an error."""
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except OSError as error:
                self._give_up(error)

    def _write_scalars(self, scalars: Mapping[str, float]) -> None:
        self._write([Event(step=self._step, summary=scalar(name, value)) for name, value in scalars.items()])

    def _write(self, events: Sequence[Event]) -> None:
        if self._writer is None:
            return
        now = time.time()
        try:
            for event in events:
                event.wall_time = now
                self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Writes no more of this run: a search goes on without its pictures."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()
        sys.stderr.write(f"warning: {_unwritable(self._folder, error)}; this round goes on without TensorBoard\n")


def _unwritable(folder: pathlib.Path, error: OSError) -> SystemFolderError:
    return SystemFolderError(f"could not write in {folder} ({error.strerror})", "a writable folder with free space")


def numbers(hyperparameters: Mapping[str, Any]) -> dict[str, float]:
    """Returns hyperparameters as numbers: words as their places in the list of options, on as 1, off and `none` as 0.

    Args:
        hyperparameters: by name.
    """
    values = {}
    for name, value in hyperparameters.items():
        if name in _WORDS:
            values[name] = float(_WORDS[name].index(value))
        else:
            values[name] = 0.0 if value is None else float(value)
    return values
