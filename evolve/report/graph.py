"""The multitask model: its graph, bottom to top, one node per layer, coloured by who trained it, one line per task; and what is shared."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch, Rectangle
from matplotlib.path import Path as Outline

from evolve.report.drawing import (
    ACCENT,
    DARK,
    GRID,
    INK,
    LONGEST_NAME,
    MAX_ANNOTATED,
    MUTED,
    PALE,
    ROOT_COLOUR,
    SMALL,
    SURFACE,
    UNKNOWN_COLOUR,
    new_figure,
    shorten,
    task_colours,
)
from evolve.report.searches import ROOT
from evolve.report.structure import UNKNOWN, Row, SharedLayer, Structure

_ROW_PITCH = 42.0
_NODE_HEIGHT = 18.0
_LEFT = 92.0
_RIGHT = 16.0
_BOTTOM = 44.0
_CHARACTER = 6.9
"""Width of a character of 11 pixels, at most as seen in names."""


def draw_graph(structure: Structure) -> Figure:
    """Draws the graph; a figure as wide as the tasks need.

    Args:
        structure: with one task or more.
    """
    tasks, rows = structure.tasks, structure.rows
    names = {task: shorten(task, LONGEST_NAME) for task in tasks}
    longest = max(len(name) for name in names.values()) * _CHARACTER
    pitch = 88.0 if len(tasks) == 1 else max(15.0, min(40.0, 900 / len(tasks)))
    upright = longest > pitch
    top = 14 + (longest if upright else 14)
    # A legend of its own width below, where there are few tasks.
    width = max(_LEFT + pitch * len(tasks) + _RIGHT, 250.0, _LEFT + (0 if upright else longest + _RIGHT))
    height = _BOTTOM + _ROW_PITCH * len(rows) + top
    figure = new_figure(width, height, layout=None)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    colours = task_colours(tasks) | {ROOT: ROOT_COLOUR, UNKNOWN: UNKNOWN_COLOUR}
    heights = [_BOTTOM + _ROW_PITCH * (index + 0.5) for index in range(len(rows))]
    places = [{task: _LEFT + pitch * (lane + 0.5) for lane, task in enumerate(row.lanes)} for row in rows]
    for row, y in zip(rows, heights, strict=True):
        axes.plot((_LEFT, width - _RIGHT), (y, y), color=GRID, linewidth=0.8, zorder=0)
        axes.text(_LEFT - 10, y, _row_name(row), ha="right", va="center", color=MUTED, fontsize=SMALL)
    for task in tasks:
        _draw_line(axes, [place[task] for place in places], heights, colours[task], min(3.0, pitch * 0.14))
    for row, y in zip(rows, heights, strict=True):
        for layer in row.layers:
            _draw_layer(axes, layer, y, pitch, colours)
    for task in tasks:
        x = places[-1][task]
        y = heights[-1] + _NODE_HEIGHT / 2 + 6
        axes.text(x, y, names[task], ha="center", va="bottom", rotation=90 if upright else 0, color=INK)
    _draw_legend(axes, any(layer.trained_by == UNKNOWN for row in rows for layer in row.layers))
    return figure


def _row_name(row: Row) -> str:
    return row.position.replace("_", " ").replace(".", " ")


def _draw_line(axes: Axes, xs: list[float], ys: list[float], colour: str, width: float) -> None:
    """Draws a task's line: upright through each row, bent between them."""
    half = _NODE_HEIGHT / 2
    points = [(xs[0], ys[0] - half)]
    codes = [Outline.MOVETO]
    for (x, y), (after_x, after_y) in zip(zip(xs, ys, strict=True), zip(xs[1:], ys[1:], strict=True), strict=False):
        low, high = y + half, after_y - half
        bend = (high - low) * 0.6
        points += [(x, low), (x, low + bend), (after_x, high - bend), (after_x, high)]
        codes += [Outline.LINETO, *[Outline.CURVE4] * 3]
    points.append((xs[-1], ys[-1] + half))
    codes.append(Outline.LINETO)
    axes.add_patch(PathPatch(Outline(points, codes), fill=False, edgecolor=colour, linewidth=width, zorder=1))


def _draw_layer(axes: Axes, layer: SharedLayer, y: float, pitch: float, colours: Mapping[str, str]) -> None:
    margin = min(5.0, pitch * 0.12)
    x = _LEFT + pitch * layer.first_lane + margin
    width = pitch * len(layer.tasks) - 2 * margin
    # A trainer that is no current task: it was removed.
    colour = colours.get(layer.trained_by, UNKNOWN_COLOUR)
    shape = f"round,pad=0,rounding_size={min(5.0, width / 2.5)}"
    axes.add_patch(
        FancyBboxPatch(
            (x, y - _NODE_HEIGHT / 2),
            width,
            _NODE_HEIGHT,
            boxstyle=shape,
            facecolor=colour,
            edgecolor=SURFACE,
            linewidth=1,
            zorder=2,
        )
    )
    words = f"{len(layer.tasks)} tasks"
    if len(layer.tasks) > 1 and width > (len(words) + 1) * 6.2:
        axes.text(x + width / 2, y, words, ha="center", va="center_baseline", color=_on(colour), fontsize=SMALL, zorder=3)


def _on(colour: str) -> str:
    """Returns the colour of words that are read well on a ground of this colour."""
    red, green, blue = _rgb(colour)
    return DARK if 0.3 * red + 0.6 * green + 0.1 * blue > 0.6 else PALE


def _draw_legend(axes: Axes, has_unknown: bool) -> None:
    entries = [(ROOT_COLOUR, "the root's")] + ([(UNKNOWN_COLOUR, "a removed task's")] if has_unknown else [])
    x = 12.0
    for colour, words in entries:
        axes.add_patch(Rectangle((x, 14), 12, 12, facecolor=colour))
        axes.text(x + 18, 20, words, va="center", color=MUTED, fontsize=SMALL)
        x += 18 + (len(words) + 3) * 6.2


def draw_in_common(structure: Structure) -> Figure:
    """Draws how many layers each two tasks have in common; on the diagonal, how many a task uses."""
    tasks = structure.tasks
    names = [shorten(task, LONGEST_NAME) for task in tasks]
    cell = max(15.0, min(36.0, 900 / len(tasks)))
    margin = 14 + 6.6 * max(len(name) for name in names)
    width = max(margin + cell * len(tasks) + 12, 180.0)
    height = margin + cell * len(tasks) + 12
    figure = new_figure(width, height, layout=None)
    axes = figure.add_axes((margin / width, margin / height, cell * len(tasks) / width, cell * len(tasks) / height))
    place = {task: index for index, task in enumerate(tasks)}
    most = max(pair.num_layers for pair in structure.in_common)
    for pair in structure.in_common:
        column, row = place[pair.other], place[pair.task]
        if column > row:
            continue
        strength = 0.06 + 0.74 * pair.num_layers / most
        axes.add_patch(Rectangle((column, row), 1, 1, facecolor=(*_rgb(ACCENT), strength), linewidth=0))
        if len(tasks) <= MAX_ANNOTATED:
            axes.text(column + 0.5, row + 0.5, str(pair.num_layers), ha="center", va="center", fontsize=SMALL)
    axes.set_xlim(0, len(tasks))
    axes.set_ylim(len(tasks), 0)
    ticks = [index + 0.5 for index in range(len(tasks))]
    axes.set_xticks(ticks, names, rotation=90)
    axes.set_yticks(ticks, names)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def _rgb(colour: str) -> tuple[float, float, float]:
    return int(colour[1:3], 16) / 255, int(colour[3:5], 16) / 255, int(colour[5:7], 16) / 255
