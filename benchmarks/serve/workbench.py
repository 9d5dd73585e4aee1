"""What every figure is measured with: how much of it, on which published systems, in which processes."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import multiprocessing
import pathlib
from collections.abc import Callable
from typing import TypeVar

from benchmarks.published import Published, System
from benchmarks.reporting import Report

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        smoke: tiny models, all in one process: whether it runs, not what it measures.
        repetitions: of each measurement.
        calls: of each side in one repetition, where calls are timed one by one.
        seconds: of each side in one repetition, where calls are counted.
        requests: that a load has open at a time.
        reloads: under load.
        swaps: that are timed.
    """

    smoke: bool
    repetitions: int
    calls: int
    seconds: float
    requests: int
    reloads: int
    swaps: int


FULL = Effort(smoke=False, repetitions=7, calls=25, seconds=4.0, requests=16, reloads=1000, swaps=10)
SMOKE = Effort(smoke=True, repetitions=2, calls=2, seconds=0.1, requests=4, reloads=20, swaps=2)


class Workbench:
    """Publishes systems and runs measurements.

    Args:
        folder: for what is published.
        effort: how much is measured.
        report: where it is said.
    """

    def __init__(self, folder: pathlib.Path, effort: Effort, report: Report) -> None:
        self._folder = folder
        self.effort = effort
        self.report = report
        self._published: dict[str, Published] = {}

    def publish(self, system: System) -> Published:
        """Publishes a system with random weights, once for all figures that want it."""
        if system.name not in self._published:
            self._published[system.name] = self.apart(publish, self._folder / system.name, system)
        return self._published[system.name]

    def apart(self, function: Callable[..., T], *arguments: object) -> T:
        """Returns what a function of a module returns in a process of its own, which has one ONNX Runtime pool for life and no torch.

        For a smoke test it runs here.
        """
        return function(*arguments) if self.effort.smoke else in_fresh_process(function, *arguments)


def in_fresh_process(function: Callable[..., T], *arguments: object) -> T:
    """Returns what a function of a module returns in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def publish(folder: pathlib.Path, system: System) -> Published:
    """Publishes a system. It alone needs torch."""
    from benchmarks import random_models

    return random_models.publish(folder, system)
