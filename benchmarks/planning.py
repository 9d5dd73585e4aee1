"""What is planned from measured costs: bytes of a store by arithmetic, searches and campaigns by simulation. For benchmarks/scaling.py."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.many_tasks import NUM_CLASSES
from benchmarks.published import CHARACTERS, Architecture
from benchmarks.reporting import TOP, Report, Target, rounded
from benchmarks.simulation import Outcome, Search, Workers, simulate
from benchmarks.train import Case as Trained
from benchmarks.train import cases, cost

LARGE = Architecture("ViT-B/16 at 224 px", 768, 12, 12, 16, 224)
TASKS = (10, 100, 1000, 3000, 10_000)
DEVICES = (1, 2, 4, 8, 16, 32, 64)
NUM_CHILDREN = 64
"""Of a search, and eight a generation, as the published settings have them."""

ALLOWANCE = 0.02
"""Of a checkpoint, what Q6 allows a task beyond its own parameters."""

DRAWS = 5
"""Simulations of each case, with other children and other deaths."""

ASSUMED_SECONDS = (60.0, 600.0)
"""Of a child of the large model, assumed: no device that trains it was at hand."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """Bytes that a task adds to a system.

    Attributes:
        record: its file in tasks/.
        path: its file in paths/.
        examples: its example images.
        journal_child: what its journal says of a child.
        journal_child_packed: the same, compressed.
        row: what its journal says of each other task.
        row_packed: the same, compressed.
        own: its final norm and head, at the size of the systems that were measured.
    """

    record: float = 0.0
    path: float = 0.0
    examples: float = 0.0
    journal_child: float = 0.0
    journal_child_packed: float = 0.0
    row: float = 0.0
    row_packed: float = 0.0
    own: float = 0.0


Line = tuple[float, float]
"""Seconds without any task, and for each task of the system."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """What simulations go by.

    Attributes:
        relative: seconds of some children, by their mean.
        start_of_worker: seconds until a worker process takes packs.
        opening: of a search, as a line over the number of tasks.
        records: the part of it that reads records, holding the lock.
        closing: of a search.
        read_rate: bytes of layers a second, read and hashed.
        write_rate: bytes of layers a second, hashed and written.
    """

    relative: tuple[float, ...]
    start_of_worker: float
    opening: Line
    records: Line
    closing: Line
    read_rate: float
    write_rate: float

    @staticmethod
    def committed_child_seconds() -> float:
        """Returns what a child of the demo took to train and validate, from the committed results of benchmarks.search."""
        parts = _committed("all")["seconds_per_child"]
        return float(parts["train"] + parts["evaluate"])

    @staticmethod
    def committed_other_seconds() -> float:
        """Returns what a search took beside that for each child."""
        return float(_committed("all")["seconds_per_child"]["other"])

    @staticmethod
    def committed_start_seconds() -> float:
        """Returns what the command took beside its searches: Python, torch, data."""
        return float(_committed("the whole command")["wall_seconds"] - _committed("all")["wall_seconds"])


def _committed(journal: str) -> dict[str, Any]:
    file = max((TOP / "benchmarks" / "results").glob("search_*.jsonl"), key=lambda found: found.stem.rpartition("_")[2])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return next(line for line in lines if line.get("journal") == journal)


def _committed_own_share() -> float:
    """Returns the share of a checkpoint's parameters that a task of the demo has of its own, the mean."""
    file = max((TOP / "benchmarks" / "results").glob("search_*.jsonl"), key=lambda found: found.stem.rpartition("_")[2])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return statistics.mean(line["own_parameters_share"] for line in lines if "own_parameters_share" in line)


def checkpoint_bytes(architecture: Architecture) -> int:
    """Returns the bytes of a whole model in float32."""
    width, patches = architecture.width, (architecture.image_size // architecture.patch_size) ** 2
    block = 12 * width**2 + 13 * width
    stem = 3 * architecture.patch_size**2 * width + width + width + (1 + patches) * width
    return 4 * (stem + architecture.blocks * block + head_parameters(architecture))


def head_parameters(architecture: Architecture) -> int:
    """Returns the parameters of a final norm and a head."""
    return 2 * architecture.width + (architecture.width + 1) * NUM_CLASSES


# The store


def plan_store(parts: Parts, report: Report) -> None:
    """Reports what a system takes on disk as tasks come, each with one search."""
    for architecture in (CHARACTERS, LARGE):
        whole = checkpoint_bytes(architecture)
        shares = {"head and norm": 4 * head_parameters(architecture) / whole, "as in the demo": _committed_own_share()}
        size = architecture.image_size**2 / CHARACTERS.image_size**2
        fixed = parts.record + parts.path + parts.examples * size
        for own, share in shares.items():
            layers, packed = share * whole, NUM_CHILDREN * parts.journal_child_packed
            rows = max(0.0, ALLOWANCE * whole - fixed - packed) / parts.row_packed
            report.line(
                figure="P2",
                kind="arithmetic",
                model=architecture.name,
                own_layers=own,
                share_of_a_checkpoint=rounded(share),
                checkpoint_megabytes=rounded(whole / 1e6),
                children=NUM_CHILDREN,
                tasks=list(TASKS),
                gigabytes={
                    "own layers": _gigabytes(layers, 0),
                    "records, paths, examples": _gigabytes(fixed, 0),
                    "journals without snapshots, compressed": _gigabytes(packed, 0),
                    "snapshots": _gigabytes(0, parts.row),
                    "snapshots, compressed": _gigabytes(0, parts.row_packed),
                    "a checkpoint each": _gigabytes(whole, 0),
                },
                last_journal_megabytes=[rounded(tasks * parts.row / 1e6) for tasks in TASKS],
                tasks_within_allowance=round(rows),
                tasks_until_snapshots_outweigh_own_layers=round(2 * layers / parts.row_packed),
            )
            if architecture is CHARACTERS and own == "as in the demo":
                report.figure("P2", round(rows), Target(">=", 10_000), "tasks; the bundled root, 64 children")


def _gigabytes(each: float, row: float) -> list[float]:
    """Returns the gigabytes of so many tasks, if a task takes `each` bytes and `row` more for each task that was there before."""
    return [rounded((tasks * each + tasks * (tasks - 1) / 2 * row) / 1e9) for tasks in TASKS]


# Searches


@dataclasses.dataclass(frozen=True)
class Case:
    """What children are like.

    Attributes:
        architecture: of the model.
        seconds: of a child, mean, on one device.
        is_measured: whether that was measured; else it is assumed.
    """

    architecture: Architecture
    seconds: float
    is_measured: bool

    @property
    def own_bytes(self) -> float:
        """Of the layers that a child trains, and that a task has of its own."""
        return _committed_own_share() * checkpoint_bytes(self.architecture)

    def handle(self, costs: Costs) -> float:
        """Returns the seconds that it takes to take up a child: what was measured, and the writing of what is larger."""
        more = self.own_bytes - _committed_own_share() * checkpoint_bytes(CHARACTERS)
        return costs.committed_other_seconds() + more / costs.write_rate

    def to_json(self) -> dict[str, Any]:
        """Returns what a line says of it."""
        return {
            "model": self.architecture.name,
            "child_seconds": rounded(self.seconds),
            "child_seconds_are": "measured" if self.is_measured else "assumed",
        }


def cases_of(costs: Costs) -> list[Case]:
    """Returns the children that are simulated."""
    return [Case(CHARACTERS, costs.committed_child_seconds(), True), *(Case(LARGE, value, False) for value in ASSUMED_SECONDS)]


def plan_searches(costs: Costs, report: Report) -> None:
    """Reports one search on more and more devices: by size of generation and pack, with slow workers, with workers that die."""
    for case in cases_of(costs):
        for children, generation in ((64, 8), (64, 64), (512, 64)):
            _report_devices(case, costs, children, generation, 1, report)
    small, _, large = cases_of(costs)
    for pack in (2, 4, 8):
        _report_devices(small, costs, 64, 8, pack, report)
    for generation in (8, 64):
        for slow in (1, 4):
            workers = Workers((1.0,) * (8 - slow) + (0.5,) * slow)
            outcomes = [simulate([search], [workers]) for search in _draw(large, costs, 64, generation, 1)]
            alike = [simulate([search], [Workers.alike(8)]) for search in _draw(large, costs, 64, generation, 1)]
            report.line(
                figure="P4",
                kind="simulated",
                **large.to_json(),
                generation=generation,
                devices=8,
                half_as_fast=slow,
                wall_of_alike=rounded(_mean(outcomes, "wall") / _mean(alike, "wall")),
                fair_share=rounded(8 / (8 - slow / 2)),
            )
    for hours, one_fate in ((hours, one_fate) for hours in (24.0, 6.0, 1.0) for one_fate in (True, False)):
        workers = Workers((1.0,) * 8, 3600 * hours, costs.start_of_worker, one_fate)
        draws = _draw(large, costs, 512, 64, 1)
        outcomes = [simulate([search], [workers], random.Random(number)) for number, search in enumerate(draws)]
        without = [simulate([search], [Workers.alike(8)]) for search in draws]
        report.line(
            figure="P4",
            kind="simulated",
            **large.to_json(),
            children=512,
            generation=64,
            devices=8,
            hours_between_deaths_of_a_worker=hours,
            all_die_with_one=one_fate,
            deaths=rounded(_mean(outcomes, "num_deaths")),
            wall_of_immortal=rounded(_mean(outcomes, "wall") / _mean(without, "wall")),
            lost_share=rounded(_mean(outcomes, "lost") / _mean(outcomes, "busy")),
        )


def _report_devices(case: Case, costs: Costs, children: int, generation: int, pack: int, report: Report) -> None:
    draws = _draw(case, costs, children, generation, pack)
    outcomes = [[simulate([search], [Workers.alike(devices)]) for search in draws] for devices in DEVICES]
    wall = [_mean(some, "wall") for some in outcomes]
    report.line(
        figure="P4",
        kind="simulated",
        **case.to_json(),
        children=children,
        generation=generation,
        pack=pack,
        gain_of_pack=rounded(pack_gain(pack)),
        devices=list(DEVICES),
        wall_seconds=[rounded(seconds) for seconds in wall],
        speed_up=[rounded(wall[0] / seconds) for seconds in wall],
        efficiency=[rounded(_mean(some, "efficiency")) for some in outcomes],
    )


def _mean(outcomes: Sequence[Outcome], name: str) -> float:
    return statistics.mean(getattr(outcome, name) for outcome in outcomes)


@functools.cache
def pack_gain(pack: int) -> float:
    """Returns how many times faster children of the published rate of mutation are together than one by one, by sharing alone: arithmetic.

    Counted over the packs of the eight children of T3 of benchmarks.train, its bound.
    """
    case = _published_children()
    packs = [case.children[start : start + pack] for start in range(0, len(case.children), pack)]
    size, images = case.root.architecture.image_size, case.num_images
    alone, shared = (
        sum(cost(some, size, images, 1, shared=is_shared, cached=False) for some in packs) for is_shared in (False, True)
    )
    return alone / shared


@functools.cache
def _published_children() -> Trained:
    return next(case for case in cases(smoke=False) if case.name == "T3")


def _draw(case: Case, costs: Costs, children: int, generation: int, pack: int) -> list[Search]:
    """Returns searches whose children take as long, by their mean, as those that were measured, drawn at random, the same each time."""
    gain = pack_gain(pack) if pack > 1 else 1.0
    return [
        Search(
            generations=tuple(_generations(case, costs, children, generation, pack, gain, random.Random(number))),
            start=costs.committed_start_seconds() + costs.start_of_worker,
            handle=pack * case.handle(costs),
        )
        for number in range(DRAWS)
    ]


def _generations(
    case: Case, costs: Costs, children: int, generation: int, pack: int, gain: float, chance: random.Random
) -> Iterator[tuple[float, ...]]:
    for _ in range(0, children, generation):
        seconds = [case.seconds * value for value in chance.choices(costs.relative, k=generation)]
        yield tuple(sum(seconds[start : start + pack]) / gain for start in range(0, generation, pack))


# Campaigns


def plan_campaigns(costs: Costs, most: int, report: Report) -> None:
    """Reports one search for each of many new tasks, each with one device, of which many run at once on one system."""
    for case in cases_of(costs):
        for locked in ("all that is read", "records"):
            for tasks in (number for number in TASKS if 100 <= number <= most):
                outcomes = [_campaign(case, costs, tasks, devices, locked) for devices in (1, 8, 64)]
                report.line(
                    figure="P4",
                    kind="simulated",
                    **case.to_json(),
                    children=NUM_CHILDREN,
                    tasks=tasks,
                    lock_held_for=locked,
                    devices=[1, 8, 64],
                    wall_hours=[rounded(outcome.wall / 3600) for outcome in outcomes],
                    efficiency=[rounded(outcome.efficiency) for outcome in outcomes],
                    waited_for_lock_share=[
                        rounded(outcome.waited / (outcome.wall * outcome.num_workers)) for outcome in outcomes
                    ],
                    last_search={
                        name: rounded(getattr(_one(case, costs, tasks, locked, 1.0), name)) for name in ("open", "read", "close")
                    },
                )
                if case.is_measured and locked == "records" and tasks == most:
                    report.figure("P4", outcomes[-1].efficiency, Target(">=", 0.9), f"{tasks:,} tasks, 64 devices")


def _campaign(case: Case, costs: Costs, tasks: int, devices: int, locked: str) -> Outcome:
    chance = random.Random(0)
    spread = statistics.pstdev(costs.relative) / math.sqrt(NUM_CHILDREN)
    searches = [_one(case, costs, number, locked, max(0.5, chance.gauss(1.0, spread))) for number in range(tasks)]
    return simulate(searches, [Workers.alike(1)] * devices)


def _one(case: Case, costs: Costs, number: int, locked: str, relative: float) -> Search:
    """Returns the search of a task that so many others precede."""
    opening, records, closing = (fixed + each * number for fixed, each in (costs.opening, costs.records, costs.closing))
    # What the systems that were measured have of their own is a head and a norm.
    more = case.own_bytes - 4 * head_parameters(CHARACTERS)
    opening += number * more / costs.read_rate
    return Search(
        generations=((NUM_CHILDREN * case.seconds * relative,),),
        start=costs.committed_start_seconds(),
        open=records if locked == "records" else opening,
        read=opening - records if locked == "records" else 0.0,
        handle=NUM_CHILDREN * case.handle(costs),
        close=closing,
    )
