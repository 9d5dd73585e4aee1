"""Accuracy against accounted parameters: of all tasks, of all methods, and of each task with its baselines."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from evolve.report.baselines import Baseline
from evolve.report.content import SEARCH, MethodStanding, Standing
from evolve.report.drawing import (
    ACCENT,
    INK,
    LONGEST_NAME,
    MAX_ANNOTATED,
    MUTED,
    SECOND,
    SURFACE,
    THIRD,
    WIDTH,
    in_units,
    new_figure,
    place_labels,
    shorten,
)

_MARKERS = {SEARCH: ("*", ACCENT), "finetune": ("s", INK), "freeze": ("^", SECOND), "adapters": ("D", THIRD)}


def draw_tasks(standings: Sequence[Standing]) -> Figure:
    """Draws each task's accuracy against its accounted parameters."""
    figure = new_figure(WIDTH, 320) if len(standings) <= MAX_ANNOTATED else new_figure(2.4 * WIDTH, 560)
    axes = figure.add_subplot()
    points = [(standing.task.accounted_parameters, standing.accuracy, standing.task.name) for standing in standings]
    tested = [point for point, standing in zip(points, standings, strict=True) if standing.is_tested]
    others = [point for point, standing in zip(points, standings, strict=True) if not standing.is_tested]
    axes.scatter([x for x, _, _ in tested], [y for _, y, _ in tested], s=26, color=ACCENT)
    axes.scatter([x for x, _, _ in others], [y for _, y, _ in others], s=26, facecolor=SURFACE, edgecolor=ACCENT)
    axes.set_title("tasks" + (" (hollow: quality, no test split)" if others else ""))
    _dress_accuracy(axes, points, "test accuracy" if tested else "quality (validation accuracy)")
    place_labels(axes, [(x, y, shorten(name, LONGEST_NAME)) for x, y, name in points])
    return figure


def draw_methods(methods: Sequence[MethodStanding]) -> Figure:
    """Draws the mean accuracy of the search and of each baseline that all tasks have, against their mean accounted parameters."""
    most = max(method.num_tasks for method in methods)
    whole = [method for method in methods if method.num_tasks == most]
    points = [(method.accounted_parameters, method.accuracy, method.method) for method in whole]
    return _draw_methods(points, f"mean over {most} task{'' if most == 1 else 's'}", "mean test accuracy")


def draw_task(standing: Standing, baselines: Sequence[Baseline]) -> Figure:
    """Draws a task's accuracy and that of its baselines, against accounted parameters.

    Args:
        standing: of the task.
        baselines: of the task.
    """
    points = [(standing.task.accounted_parameters, standing.accuracy, SEARCH)]
    for base in baselines:
        accuracy = base.test_accuracy if standing.is_tested else base.quality
        if accuracy is not None:
            points.append((base.accounted_parameters, accuracy, base.method))
    label = "test accuracy" if standing.is_tested else "quality (validation accuracy)"
    return _draw_methods(points, shorten(standing.task.name, 40), label)


def _draw_methods(points: Sequence[tuple[float, float, str]], title: str, label: str) -> Figure:
    figure = new_figure(WIDTH, 280)
    axes = figure.add_subplot()
    for x, y, method in points:
        marker, colour = _MARKERS.get(method.partition(":")[0].partition(" ")[0], ("o", MUTED))
        # A tuned baseline is drawn hollow.
        face = SURFACE if "tuned" in method else colour
        axes.scatter([x], [y], s=70 if marker == "*" else 26, marker=marker, facecolor=face, edgecolor=colour, zorder=3)
    axes.set_title(title)
    _dress_accuracy(axes, points, label)
    place_labels(axes, points)
    return figure


def _dress_accuracy(axes: Axes, points: Sequence[tuple[float, float, str]], label: str) -> None:
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    axes.set_xlabel("accounted parameters")
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    if min(xs) > 0 and max(xs) > 8 * min(xs):
        axes.set_xscale("log")
        axes.set_xlim(min(xs) / 1.6, max(xs) * 1.9)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if max(xs) < 300 * min(xs) else (1.0,)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        spread = (max(xs) - min(xs)) or max(abs(max(xs)), 1.0) * 0.2
        axes.set_xlim(min(xs) - 0.15 * spread, max(xs) + 0.25 * spread)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_units(value)))
    spread = max(max(ys) - min(ys), 0.02)
    axes.set_ylim(min(ys) - 0.15 * spread, max(ys) + 0.15 * spread)
