"""Hyperparameters over time, and which mutations paid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from evolve.report.drawing import ACCENT, MAX_ANNOTATED, MUTED, SMALL, WIDTH, new_figure
from evolve.report.mutations import ANY, Payoff
from evolve.report.searches import Search


def varied(searches: Sequence[Search]) -> dict[str, list[Any]]:
    """Returns the hyperparameters that are not the same for all children, each with its values in order."""
    values: dict[str, set[Any]] = {}
    for search in searches:
        for child in search.children:
            for name, value in child.hyperparameters.items():
                values.setdefault(name, set()).add(value)
    return {name: sorted(found, key=_order) for name, found in values.items() if len(found) > 1}


def _order(value: Any) -> tuple[float, str]:
    """Sorts numbers by their size, behind `none`, and words by the alphabet."""
    if value is None:
        return -1.0, ""
    return (0.0, value) if isinstance(value, str) else (float(value), "")


def draw_hyperparameter(name: str, values: Sequence[Any], searches: Sequence[Search]) -> Figure:
    """Draws the value of a hyperparameter of every child, in the order in which searches opened and children finished.

    Args:
        name: of the hyperparameter.
        values: that it has taken, in order: a level of the chart each.
        searches: in the order in which they opened.
    """
    shown = values if len(values) <= 12 else values[:: -(-len(values) // 12)]
    figure = new_figure(WIDTH, 88 + 16 * min(len(values), 12))
    axes = figure.add_subplot()
    level = {value: index for index, value in enumerate(values)}
    offset = 0
    for search in searches:
        rows = [(offset + child.number + 1, level[child.hyperparameters[name]], child.survived) for child in search.children]
        lost = [row for row in rows if not row[2]]
        kept = [row for row in rows if row[2]]
        axes.scatter([x for x, _, _ in lost], [y for _, y, _ in lost], s=7, facecolor="none", edgecolor=MUTED, linewidth=0.6)
        axes.scatter([x for x, _, _ in kept], [y for _, y, _ in kept], s=9, color=ACCENT, zorder=3)
        offset += len(rows)
        if len(searches) <= MAX_ANNOTATED and search is not searches[-1]:
            axes.axvline(offset + 0.5, color=MUTED, linewidth=0.6, linestyle=(0, (2, 2)))
    axes.set_yticks([level[value] for value in shown], [_word(value) for value in shown])
    axes.set_ylim(-0.6, len(values) - 0.4)
    axes.set_xlim(0, offset + 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set_xlabel("children of all searches")
    axes.set_title(name)
    return figure


def _word(value: Any) -> str:
    return "none" if value is None else {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def draw_mutations(rows: Sequence[Payoff]) -> Figure:
    """Draws for each kind of mutation which share of the children that carried it beat their parent.

    Args:
        rows: the first of all children.
    """
    figure = new_figure(WIDTH, 70 + 19 * len(rows))
    axes = figure.add_subplot()
    longest = max(row.share for row in rows) or 1.0
    for index, row in enumerate(rows):
        axes.barh(index, row.share, height=0.66, color=MUTED if row.kind == ANY else ACCENT)
        words = f"{row.num_better} of {row.num_children}, {row.mean_gain:+.4f}"
        # In a column of their own, which the line of all children does not cross.
        axes.text(longest * 1.06, index, words, va="center", color=MUTED, fontsize=SMALL)
    axes.axvline(rows[0].share, color=MUTED, linewidth=1, linestyle=(0, (3, 2)), zorder=0)
    axes.set_yticks(range(len(rows)), [row.kind for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, longest * 1.7)
    axes.set_xticks([tick for tick in MaxNLocator(3).tick_values(0, longest) if 0 <= tick <= longest])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("share that beat their parent")
    return figure
