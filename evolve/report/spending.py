"""What searches cost: where the time went, arithmetic and images."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from evolve.report.content import TaskCost
from evolve.report.drawing import ACCENT, LONGEST_NAME, MUTED, SECOND, SMALL, THIRD, WIDTH, in_time, in_units, new_figure, shorten


def draw_seconds(costs: Sequence[TaskCost]) -> Figure:
    """Draws where the time of each task's searches went."""
    parts = (
        ("train", ACCENT, [cost.train_seconds for cost in costs]),
        ("validate", THIRD, [cost.evaluate_seconds for cost in costs]),
        ("examine", SECOND, [cost.examine_seconds for cost in costs]),
        ("other", MUTED, [cost.other_seconds for cost in costs]),
    )
    figure, axes = _bars([cost.task for cost in costs], extra_height=24)
    starts = [0.0] * len(costs)
    for words, colour, seconds in parts:
        axes.barh(range(len(costs)), seconds, left=starts, height=0.66, color=colour, label=words)
        starts = [start + length for start, length in zip(starts, seconds, strict=True)]
    _write_ends(axes, starts, [in_time(cost.seconds) for cost in costs])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_time(value)))
    axes.set_title("time")
    figure.legend(loc="outside lower center", ncols=4, fontsize=SMALL, handlelength=1.0)
    return figure


def draw_flops(costs: Sequence[TaskCost]) -> Figure:
    """Draws the arithmetic of each task's searches, and says how many images were trained."""
    figure, axes = _bars([cost.task for cost in costs], extra_height=24)
    flops = [cost.flops for cost in costs]
    axes.barh(range(len(costs)), flops, height=0.66, color=ACCENT)
    _write_ends(axes, flops, [f"{in_units(cost.num_trained_images)} images" for cost in costs])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_units(value)))
    axes.set_title("floating point operations, and images trained")
    return figure


def _bars(names: Sequence[str], extra_height: int) -> tuple[Figure, Axes]:
    figure = new_figure(WIDTH, 62 + extra_height + 19 * len(names))
    axes = figure.add_subplot()
    axes.set_yticks(range(len(names)), [shorten(name, LONGEST_NAME) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(3))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    return figure, axes


def _write_ends(axes: Axes, ends: Sequence[float], words: Sequence[str]) -> None:
    longest = max(ends) or 1.0
    for index, (end, text) in enumerate(zip(ends, words, strict=True)):
        axes.text(end + longest * 0.02, index, text, va="center", color=MUTED, fontsize=SMALL)
    axes.set_xlim(0, longest * 1.45)
