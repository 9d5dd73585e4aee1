"""Coarse segments: which cuts to leave out where handing a row on costs more than sharing saves. Torch-free.

The cost model. A request asks `tasks_per_image` tasks of one image size about one image, every such set of tasks as often as any other. It
costs one hop and the computation for each piece that one of its tasks runs through, once for all tasks that got there through the same
pieces. Leaving a cut out of a task's route saves that task a hop; what it computed together with others it then computes alone, and the
joined piece holds weights that another holds too. With one task an image there is nothing to compute together: then hops stand against
memory alone. See docs/decisions/0012.

The choice starts from the shared segments and leaves out cuts, always those next that save most time for the memory they cost, as long
as all pieces together stay within `memory_factor` times what the shared segments take. Routes that were published stay
as they are unless the best choice is faster by more than `margin`, and so do the shared segments: a choice that gains little is no reason
to change anything.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from evolve.export.segments import Segment, Segmentation, segment_of
from evolve.export.settings import ExportSettings
from evolve.flops import layer_flops
from evolve.layer import LayerKind
from munet.v1 import generation_pb2

Engine = Literal["embedded", "triton"]
"""What is to serve: the engine in the server's process, or the wheel's Triton."""

Cuts = frozenset[int]
"""Where a route is cut: before so many of its shared segments, 1 to their number less one."""

_MIB = 2**20
_NOTHING = 1e-9
"""A gain smaller than this share of all is rounding."""


@dataclasses.dataclass(frozen=True)
class EngineCosts:
    """What pieces cost on an engine, in seconds for one row and in bytes.

    Attributes:
        hop_seconds: of handing a row to a piece and taking its result, however small.
        hop_seconds_per_byte: the same for each byte that goes in.
        flops_per_second: floating point operations of the computation itself, one row at a time.
        piece_bytes: memory of a piece beside its weights.
    """

    hop_seconds: float
    hop_seconds_per_byte: float
    flops_per_second: float
    piece_bytes: int


ENGINE_COSTS: Mapping[Engine, EngineCosts] = {
    "embedded": EngineCosts(0.15e-3, 0.0, 6e10, _MIB),
    "triton": EngineCosts(1.2e-3, 1.25e-9, 6e10, 27 * _MIB),
}
"""As measured on two cores, see benchmarks/results/triton_2-cpus-amd-epyc_2026-11.md. The seconds a byte of Triton: 7 ms for 8 x 197 x 768
float32 through its Python backend."""


@dataclasses.dataclass(frozen=True)
class Coarseness:
    """What coarse segments are chosen by.

    Attributes:
        costs: of the engine that is to serve.
        tasks_per_image: how many tasks a request asks about one image, at least 1; more than there are means all.
        memory_factor: most memory of all pieces, times that of the shared segments; at least 1.
        margin: share of the time that a change must gain.
    """

    costs: EngineCosts
    tasks_per_image: int = 1
    memory_factor: float = 2.0
    margin: float = 0.05


@dataclasses.dataclass(frozen=True)
class RouteCosts:
    """A task's route through the shared segments.

    Attributes:
        image_size: tasks of one size can be asked about one image.
        segments: names in the order they run.
        seconds: of each segment's computation for one row.
        hop_seconds: of handing a row to each.
    """

    image_size: int
    segments: tuple[str, ...]
    seconds: tuple[float, ...]
    hop_seconds: tuple[float, ...]

    @property
    def all_cuts(self) -> Cuts:
        """The cuts of the shared segments."""
        return frozenset(range(1, len(self.segments)))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a choice of cuts costs.

    Attributes:
        seconds: expected of one answer, a request for several tasks divided by their number.
        num_hops: pieces of all routes, each task's counted.
        num_pieces: distinct ones.
        num_bytes: memory of these.
    """

    seconds: float
    num_hops: int
    num_pieces: int
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which cuts routes have.

    Attributes:
        cuts: by task.
        chosen: what it costs.
        shared: what the shared segments cost.
    """

    cuts: Mapping[str, Cuts]
    chosen: Outcome
    shared: Outcome

    def __str__(self) -> str:
        """Says what was chosen and what for, in one line."""
        chosen, shared = self.chosen, self.shared
        times = f"{1e3 * chosen.seconds:.2f} ms an answer by the cost model, {1e3 * shared.seconds:.2f} through shared segments"
        if chosen == shared:
            return f"shared segments, as coarser ones gain too little: {times}"
        more = (chosen.num_bytes - shared.num_bytes) / _MIB
        return (
            f"{chosen.num_pieces} pieces instead of {shared.num_pieces} segments, {shared.num_hops - chosen.num_hops} of "
            f"{shared.num_hops} hops saved, {abs(more):.1f} MiB {'more' if more >= 0 else 'less'}: {times}"
        )


def coarsen(
    shared: Segmentation,
    image_sizes: Mapping[str, int],
    published: generation_pb2.Generation | None,
    coarseness: Coarseness,
    settings: ExportSettings,
) -> tuple[Segmentation, Choice]:
    """Chooses coarse segments instead of shared ones.

    Args:
        shared: what `find_segments` found.
        image_sizes: height and width of each task's images, in pixels.
        published: the current generation, whose routes stay if there is no reason against it.
        coarseness: what to choose by.
        settings: part of the segments' names.

    Returns:
        The segments and routes, and the choice.
    """
    itemsize = np.dtype(settings.precision).itemsize
    weights = {name: itemsize * segment.num_parameters for name, segment in shared.segments.items()}
    routes = {
        task: _route_costs([shared.segments[name] for name in route], image_sizes[task], itemsize, coarseness.costs)
        for task, route in shared.routes.items()
    }
    choice = choose(routes, weights, coarseness, _published_cuts(shared, published))
    segments: dict[str, Segment] = {}
    found: dict[str, tuple[str, ...]] = {}
    for task, route in shared.routes.items():
        pieces = [
            segment_of((unit for name in piece for unit in shared.segments[name].units), settings)
            for piece in _pieces(route, choice.cuts[task])
        ]
        segments.update((piece.name, piece) for piece in pieces)
        found[task] = tuple(piece.name for piece in pieces)
    return Segmentation(dict(sorted(segments.items())), found), choice


def choose(
    routes: Mapping[str, RouteCosts], weights: Mapping[str, int], coarseness: Coarseness, published: Mapping[str, Cuts]
) -> Choice:
    """Chooses the cuts of every route.

    Args:
        routes: through the shared segments, by task.
        weights: bytes of each segment.
        coarseness: what to choose by.
        published: cuts of the tasks whose current routes are of the same layers.
    """
    shared = _Plan(routes, weights, coarseness)
    most = coarseness.memory_factor * shared.num_bytes
    best = _Plan(routes, weights, coarseness)
    best.improve(most, list(routes))
    kept = _Plan(routes, weights, coarseness)
    kept.change(published)
    kept.improve(most, [task for task in routes if task not in published])
    candidates = [plan for plan in (kept, shared) if plan.num_bytes <= most] if published else [shared]
    chosen = next((plan for plan in candidates if plan.seconds <= best.seconds * (1 + coarseness.margin + _NOTHING)), best)
    return Choice(chosen.cuts, chosen.outcome(), shared.outcome())


class _Plan:
    """Cuts of every route and what they cost, kept up to date: the shared segments at first.

    Attributes:
        cuts: by task.
        seconds: expected for asking every task once.
        num_bytes: of all distinct pieces.
    """

    def __init__(self, routes: Mapping[str, RouteCosts], weights: Mapping[str, int], coarseness: Coarseness) -> None:
        self._routes = routes
        self._weights = weights
        self._coarseness = coarseness
        self._num_tasks = Counter(route.image_size for route in routes.values())
        # How many tasks run through each piece behind each prefix, and how many in all.
        self._visits: Counter[tuple[int, tuple[tuple[str, ...], ...]]] = Counter()
        self._uses: Counter[tuple[str, ...]] = Counter()
        self.cuts: dict[str, Cuts] = {}
        self.seconds = 0.0
        self.num_bytes = 0
        for task in sorted(routes):
            self.cuts[task] = routes[task].all_cuts
            self._count(task, 1)

    def change(self, cuts: Mapping[str, Cuts]) -> None:
        """Gives some tasks other cuts."""
        for task in cuts:
            self._count(task, -1)
        self.cuts.update(cuts)
        for task in cuts:
            self._count(task, 1)

    def improve(self, most_bytes: float, tasks: Iterable[str]) -> None:
        """Leaves cuts of these tasks out while that saves time and all pieces fit."""
        free = sorted(tasks)
        changed = True
        while changed:
            rated = []
            for move in self._moves(free):
                gain, more = self._try(move)
                if gain > 0 and self.num_bytes + more <= most_bytes:
                    rated.append(((True, -gain / more) if more > 0 else (False, -gain), move))
            changed = False
            for _, move in sorted(rated, key=lambda each: each[0]):
                gain, more = self._try(move)
                if gain > 0 and self.num_bytes + more <= most_bytes:
                    self.change(self._without(move))
                    changed = True

    def outcome(self) -> Outcome:
        """Returns what it costs."""
        return Outcome(
            self.seconds / max(len(self._routes), 1),
            sum(1 + len(cuts) for cuts in self.cuts.values()),
            sum(uses > 0 for uses in self._uses.values()),
            self.num_bytes,
        )

    def _moves(self, tasks: Iterable[str]) -> list[dict[str, Cuts]]:
        """Returns sets of cuts that could be left out together.

        One cut of one task or all of them; and for all tasks alike what lies between two pieces, behind a piece, or before one. (Where
        several tasks compute a piece together, nothing is gained before the last of them stops doing so.)
        """
        moves: dict[tuple[object, ...], dict[str, set[int]]] = {}

        def add(key: tuple[object, ...], task: str, cut: int) -> None:
            moves.setdefault(key, {}).setdefault(task, set()).add(cut)

        for task in tasks:
            route = self._routes[task].segments
            for (before, after), cut in zip(
                itertools.pairwise(_pieces(route, self.cuts[task])), sorted(self.cuts[task]), strict=True
            ):
                for key in (
                    ("cut", task, cut),
                    ("route", task),
                    ("between", before, after),
                    ("behind", before),
                    ("before", after),
                    ("all",),
                ):
                    add(key, task, cut)
        distinct = {tuple((task, frozenset(cuts)) for task, cuts in move.items()): None for move in moves.values()}
        return [dict(move) for move in distinct]

    def _without(self, move: Mapping[str, Cuts]) -> dict[str, Cuts]:
        return {task: self.cuts[task] - cuts for task, cuts in move.items()}

    def _try(self, move: Mapping[str, Cuts]) -> tuple[float, int]:
        """Returns the seconds that a move would save, none if hardly any, and the bytes that it would cost."""
        seconds, num_bytes = self.seconds, self.num_bytes
        before = {task: self.cuts[task] for task in move}
        self.change(self._without(move))
        gain, more = seconds - self.seconds, self.num_bytes - num_bytes
        self.change(before)
        self.seconds = seconds
        return (gain if gain > _NOTHING * seconds else 0.0), more

    def _count(self, task: str, sign: Literal[1, -1]) -> None:
        """Adds a task's route to what all cost, or takes it away."""
        route = self._routes[task]
        pieces = _pieces(route.segments, self.cuts[task])
        start = 0
        for number, piece in enumerate(pieces, start=1):
            end = start + len(piece)
            node = (route.image_size, pieces[:number])
            before = self._share(route.image_size, self._visits[node])
            self._visits[node] += sign
            asked = self._share(route.image_size, self._visits[node]) - before
            self.seconds += asked * (route.hop_seconds[start] + sum(route.seconds[start:end]))
            start = end
            self._uses[piece] += sign
            if self._uses[piece] == (sign > 0):
                weights = sum(self._weights[name] for name in set(piece))
                self.num_bytes += sign * (weights + self._coarseness.costs.piece_bytes)

    def _share(self, image_size: int, visitors: int) -> float:
        """Returns how often a node with so many tasks behind it is visited while every task is asked once."""
        tasks = self._num_tasks[image_size]
        asked = min(self._coarseness.tasks_per_image, tasks)
        return (1 - math.comb(tasks - visitors, asked) / math.comb(tasks, asked)) * tasks / asked


def _pieces(route: tuple[str, ...], cuts: Cuts) -> tuple[tuple[str, ...], ...]:
    places = [0, *sorted(cuts), len(route)]
    return tuple(route[start:end] for start, end in itertools.pairwise(places))


def _route_costs(route: list[Segment], image_size: int, itemsize: int, costs: EngineCosts) -> RouteCosts:
    stem = next(layer.spec for layer in route[0].layers if layer.kind is LayerKind.PATCH_EMBED)
    patch_size, width = stem.integer("patch_size"), stem.integer("width")
    hidden_bytes = itemsize * width * (1 + (image_size // patch_size) ** 2)
    image_bytes = image_size**2 * stem.integer("channels")
    operations = [sum(layer_flops(layer.spec, image_size, patch_size) for layer in segment.layers) for segment in route]
    return RouteCosts(
        image_size,
        tuple(segment.name for segment in route),
        tuple(number / costs.flops_per_second for number in operations),
        tuple(
            costs.hop_seconds + costs.hop_seconds_per_byte * num_bytes
            for num_bytes in [image_bytes, *[hidden_bytes] * (len(route) - 1)]
        ),
    )


def _published_cuts(shared: Segmentation, published: generation_pb2.Generation | None) -> dict[str, Cuts]:
    """Returns where the current routes are cut, by task, of those tasks whose layers are the same as then."""
    if published is None:
        return {}
    units = {segment.name: [tuple(unit.layer_ids) for unit in segment.units] for segment in published.segments}
    cuts = {}
    for task in published.tasks:
        route = shared.routes.get(task.name, ())
        segments = [[unit.layer_ids for unit in shared.segments[name].units] for name in route]
        if list(itertools.chain(*segments)) == list(itertools.chain(*(units[name] for name in task.route))):
            ends = {end: number for number, end in enumerate(itertools.accumulate(map(len, segments)), start=1)}
            places = itertools.accumulate(len(units[name]) for name in task.route[:-1])
            cuts[task.name] = frozenset(ends[place] for place in places)
    return cuts
