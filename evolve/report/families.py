"""The family tree of a task's searches: the score of each child, with a line from its parent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from evolve.report.drawing import ACCENT, BAD, INK, MUTED, SECOND, SMALL, SURFACE, WIDTH, new_figure, shorten
from evolve.report.searches import Child, Search


class _Look(NamedTuple):
    """How a child is drawn."""

    marker: str
    size: float
    face: str
    edge: str
    words: str


_OF_SEED = _Look("s", 22, SECOND, SECOND, "child of a seed")
_BETTER = _Look("o", 22, ACCENT, ACCENT, "beat its parent")
_WORSE = _Look("o", 16, SURFACE, MUTED, "did not")
_DIVERGED = _Look("x", 26, BAD, BAD, "diverged")


def draw_family(searches: Sequence[Search]) -> Figure:
    """Draws the score of each child of a task's searches, with a line from its parent, round by round.

    Args:
        searches: of one task, in the order of their rounds.
    """
    figure = new_figure(WIDTH, 320)
    axes = figure.add_subplot()
    places: dict[str, tuple[float, float]] = {}
    dots: dict[_Look, list[tuple[float, float]]] = {}
    offset = 0
    children = [child for search in searches for child in search.children]
    bottom, top = _score_range(children)
    for search in searches:
        if offset:
            axes.axvline(offset + 0.5, color=MUTED, linewidth=0.7, linestyle=(0, (2, 2)))
        family = _line_of(search)
        for child in search.children:
            here = (offset + child.number + 1.0, max(child.score, bottom))
            _draw_descent(axes, places.get(child.parent_id), here, child, is_ancestor=child.path_id in family)
            places.setdefault(child.path_id, here)
            dots.setdefault(_look(child), []).append(here)
        if search.end is not None and search.end.path_id in places:
            x, y = places[search.end.path_id]
            axes.scatter(x, y, s=110, facecolor="none", edgecolor=INK, linewidth=1.2, zorder=5, clip_on=False)
        offset += len(search.children)
    for look, those in dots.items():
        looks: dict[str, Any] = {"facecolor": look.face, "edgecolor": look.edge} if look.marker != "x" else {"color": look.edge}
        xs, ys = zip(*those, strict=True)
        axes.scatter(xs, ys, s=look.size, marker=look.marker, linewidth=1, zorder=4, clip_on=False, **looks)
    axes.set_xlim(0, max(offset, 1) + 1)
    axes.set_ylim(bottom, top)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("children, in the order in which they finished")
    scaled = any(search.scale_factor != 1 for search in searches)
    axes.set_ylabel("score" if scaled else "score (= quality)")
    unfinished = " (unfinished)" if any(search.end is None for search in searches) else ""
    axes.set_title(shorten(searches[0].task, 36) + unfinished)
    figure.legend(handles=_legend(children), loc="outside lower center", ncols=3, fontsize=SMALL, handletextpad=0.2)
    return figure


def _score_range(children: Sequence[Child]) -> tuple[float, float]:
    """Returns the limits of the scores; what diverged and scores nothing would flatten all others."""
    scores = [child.score for child in children if child.score > 0 or not child.diverged] or [0.0, 1.0]
    spread = max(max(scores) - min(scores), 0.02)
    return min(scores) - 0.08 * spread, max(scores) + 0.08 * spread


def _line_of(search: Search) -> set[str]:
    """Returns the ids of the path that became current, or is the best so far, and of its ancestors in this search."""
    parents = {child.path_id: child.parent_id for child in reversed(search.children)}
    best = search.best
    path_id = search.end.path_id if search.end is not None else best.path_id if best is not None else None
    line: set[str] = set()
    while path_id in parents and path_id not in line:
        line.add(path_id)
        path_id = parents[path_id]
    return line


def _draw_descent(
    axes: Axes, parent: tuple[float, float] | None, here: tuple[float, float], child: Child, *, is_ancestor: bool
) -> None:
    if parent is None:
        return
    looks: dict[str, Any] = {"color": MUTED, "linewidth": 0.5, "alpha": 0.45, "zorder": 1}
    if is_ancestor:
        looks = {"color": INK, "linewidth": 1.5, "zorder": 3}
    elif child.survived:
        looks = {"color": ACCENT, "linewidth": 0.9, "alpha": 0.8, "zorder": 2}
    axes.plot((parent[0], here[0]), (parent[1], here[1]), **looks)


def _look(child: Child) -> _Look:
    if child.diverged:
        return _DIVERGED
    if child.parent_score is None:
        return _OF_SEED
    return _BETTER if child.survived else _WORSE


def _legend(children: Sequence[Child]) -> list[Line2D]:
    looks = [_OF_SEED, _BETTER, _WORSE] + ([_DIVERGED] if any(child.diverged for child in children) else [])
    entries = [
        Line2D(
            *([], []),
            linestyle="none",
            marker=look.marker,
            markersize=5,
            markerfacecolor=look.face,
            markeredgecolor=look.edge,
            label=look.words,
        )
        for look in looks
    ]
    ring: dict[str, Any] = {"marker": "o", "markersize": 8, "markerfacecolor": "none", "markeredgecolor": INK}
    entries.append(Line2D([], [], linestyle="none", label="became current", **ring))
    entries.append(Line2D([], [], color=INK, linewidth=1.5, label="its ancestors"))
    return entries
