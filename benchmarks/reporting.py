"""What every benchmark says in the same way: JSON lines, figures beside their targets, and on which hardware and commit.

A figure is a ratio of two things measured side by side in one run, since machines are shared and noisy: `Ratio` holds what each repetition
gave. The last line of a run is its summary.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import functools
import json
import math
import os
import pathlib
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

TOP = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Target:
    """What a figure should be.

    Attributes:
        relation: whether the bound is the least or the most.
        bound: the figure.
    """

    relation: Literal[">=", "<="]
    bound: float

    def is_met(self, value: float) -> bool:
        """Tells whether a value meets it; one that is no number does not."""
        return value >= self.bound if self.relation == ">=" else value <= self.bound

    def __str__(self) -> str:
        return f"{self.relation} {self.bound:.4g}"


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One quantity over another, repetition by repetition.

    Attributes:
        above: measured in each repetition.
        below: measured beside it.
    """

    above: Sequence[float]
    below: Sequence[float]

    @functools.cached_property
    def each(self) -> list[float]:
        """The ratio within each repetition."""
        return [above / below for above, below in zip(self.above, self.below, strict=True)]

    @property
    def median(self) -> float:
        """The middle one: what a burst of other work on the machine moves least."""
        return statistics.median(self.each)

    def spread(self, scale: float = 1.0) -> dict[str, Any]:
        """Returns median, quartiles and extremes, each times `scale`, as JSON values."""
        each = [scale * value for value in self.each]
        low, _, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
        return {
            "median": rounded(scale * self.median),
            "quartiles": [rounded(low), rounded(high)],
            "range": [rounded(min(each)), rounded(max(each))],
            "repetitions": len(each),
        }


class Report:
    """Prints lines as they come, and writes them to a file at the end. To be made before anything is measured: it notes the commit.

    Args:
        what: what was measured, the first part of the file's name.
        arguments: as `add_arguments` made them.
    """

    def __init__(self, what: str, arguments: argparse.Namespace) -> None:
        self._what = what
        self._results: pathlib.Path | None = arguments.results
        self._hardware: str = arguments.hardware or hardware()
        self._commit = commit()
        self._lines: list[str] = []
        self._figures: dict[str, dict[str, Any]] = {}

    def line(self, **fields: Any) -> None:
        """Prints one JSON line."""
        self._lines.append(json.dumps(fields))
        print(self._lines[-1], flush=True)

    def figure(self, name: str, value: float, target: Target, note: str = "") -> None:
        """Notes a figure for the summary.

        Args:
            name: its id, such as `S1`.
            value: what the target is about.
            target: what it should be.
            note: what the bound is made of, if that depends on the run.
        """
        described = f"{target} ({note})" if note else str(target)
        # JSON has no word for what is infinite or no number.
        self._figures[name] = {
            "value": rounded(value) if math.isfinite(value) else None,
            "target": described,
            "met": target.is_met(value),
        }

    def finish(self, model: str) -> None:
        """Prints the summary, and writes all lines to the folder of results if there is one.

        Args:
            model: which models were measured.
        """
        self.line(summary=self._figures, hardware=self._hardware, model=model, commit=self._commit)
        if self._results is not None:
            month = dt.datetime.now(dt.UTC).strftime("%Y-%m")
            slug = re.sub(r"[^a-z0-9]+", "-", self._hardware.partition(",")[0].lower()).strip("-")
            self._results.mkdir(parents=True, exist_ok=True)
            (self._results / f"{self._what}_{slug}_{month}.jsonl").write_text("\n".join(self._lines) + "\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what every benchmark takes."""
    parser.add_argument(
        "--smoke", action="store_true", help="tiny models and few repetitions: whether it runs, not what it measures"
    )
    parser.add_argument("--results", type=pathlib.Path, metavar="DIR", help="also write the lines to a file in this folder")
    parser.add_argument("--hardware", help="what this machine is, its first words name the file; found out by default")


def hardware() -> str:
    """Returns what this process may compute on, such as `2 cpus AMD EPYC, family 25 model 1, Linux`."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    info: dict[str, str] = {}
    file = pathlib.Path("/proc/cpuinfo")
    if file.exists():
        pairs = (line.partition(":") for line in file.read_text().splitlines())
        info = {name.strip(): value.strip() for name, _, value in pairs}
    name = info.get("model name") or platform.processor() or platform.machine()
    generation = f", family {info['cpu family']} model {info['model']}" if {"cpu family", "model"} <= info.keys() else ""
    return f"{cpus} cpus {name}{generation}, {platform.system()}"


def commit() -> str:
    """Returns the commit that is measured, with a + if files were changed since; `unknown` outside of git."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=TOP, capture_output=True, text=True, check=True).stdout.strip()


def seconds_of(call: Callable[[], Any]) -> float:
    """Returns how long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def rounded(value: float) -> float:
    """Returns a value with four significant digits."""
    return float(f"{value:.4g}")


def milliseconds(values: Sequence[float]) -> float:
    """Returns the median of some seconds in milliseconds."""
    return rounded(1000 * statistics.median(values))
