"""Draws the figures of docs/scaling.md from the results of benchmarks/scaling.py, and from nothing else.

python -m benchmarks.scaling_figures benchmarks/results/scaling_<hardware>_<month>.jsonl docs/figures
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evolve.report.drawing import ACCENT, BAD, MUTED, SECOND, SMALL, THIRD, new_figure, style, to_svg

Lines = list[dict[str, Any]]


def main() -> None:
    """Draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=pathlib.Path)
    parser.add_argument("folder", type=pathlib.Path)
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.results.read_text().splitlines()]
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with style():
        for name, figure in (("scaling-store", draw_store(lines)), ("scaling-devices", draw_devices(lines))):
            (arguments.folder / f"{name}.svg").write_text(to_svg(figure, name))


def draw_store(lines: Lines) -> Figure:
    """Returns what a system takes on disk over its number of tasks, for a small and a large root."""
    stores = [line for line in lines if "gigabytes" in line and line["own_layers"] == "as in the demo"]
    figure = new_figure(820, 330)
    for axes, store in zip(figure.subplots(1, len(stores), sharey=True), stores, strict=True):
        curves = {
            "a checkpoint each": ("one checkpoint a task", MUTED, "--"),
            "own layers": ("layers of their own", ACCENT, "-"),
            "snapshots": ("snapshots in journals", BAD, "-"),
            "snapshots, compressed": ("the same, compressed by gc", SECOND, "-"),
            "records, paths, examples": ("records, paths, examples", THIRD, "-"),
        }
        for name, (label, colour, dashes) in curves.items():
            axes.plot(store["tasks"], store["gigabytes"][name], dashes, color=colour, label=label, marker="o", markersize=3)
        axes.set(xscale="log", yscale="log", xlabel="tasks", title=store["model"].removeprefix("the bundled root: "))
        axes.set_ylim(1e-3, 1e4)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("gigabytes")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=SMALL)
    return figure


def draw_devices(lines: Lines) -> Figure:
    """Returns how much faster one search is on more devices, for short and for long children."""
    searches = [line for line in lines if "speed_up" in line and line["pack"] == 1]
    shown = [
        (child, [line for line in searches if line["child_seconds"] == child])
        for child in (min(line["child_seconds"] for line in searches), max(line["child_seconds"] for line in searches))
    ]
    figure = new_figure(820, 330)
    for axes, (child, some) in zip(figure.subplots(1, 2, sharey=True), shown, strict=True):
        _draw_speed_ups(axes, child, some)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=SMALL)
    return figure


def _draw_speed_ups(axes: Axes, child: float, some: Lines) -> None:
    devices = some[0]["devices"]
    axes.plot(devices, devices, "--", color=MUTED, label="every device all the time")
    for line, colour in zip(some, (BAD, SECOND, ACCENT), strict=True):
        label = f"{line['children']} children, {line['generation']} a generation"
        axes.plot(devices, line["speed_up"], color=colour, marker="o", markersize=3, label=label)
    axes.set(xscale="log", yscale="log", xlabel="devices", title=f"children of {child:.3g} s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_ticks(devices, minor=False)
        axis.set_ticks([], minor=True)
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("times faster than on one")


if __name__ == "__main__":
    main()
