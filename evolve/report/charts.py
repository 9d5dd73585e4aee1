"""All figures of a report, in the order of its page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from matplotlib.figure import Figure

from evolve.report.accuracy import draw_methods, draw_task, draw_tasks
from evolve.report.content import Content
from evolve.report.families import draw_family
from evolve.report.graph import draw_graph, draw_in_common
from evolve.report.spending import draw_flops, draw_seconds
from evolve.report.tuning import draw_hyperparameter, draw_mutations, varied


class Chart(NamedTuple):
    """A figure with its name, which its files have too, and the section of the page it belongs to."""

    name: str
    section: str
    figure: Figure


def draw_all(content: Content) -> Iterator[Chart]:
    """Yields every figure that a system gives cause for. The caller holds evolve.report.drawing.style."""
    if content.standings:
        yield from _draw_tasks(content)
    for cost in content.costs:
        if cost.num_children:
            yield Chart(f"family-{cost.task}", "families", draw_family(content.searches_of(cost.task)))
    for name, values in varied(content.searches).items():
        figure = draw_hyperparameter(name, values, content.searches)
        yield Chart(f"hyperparameter-{name.replace('_', '-')}", "hyperparameters", figure)
    if content.payoffs:
        yield Chart("mutations", "mutations", draw_mutations(content.payoffs))
    spent = [cost for cost in content.costs if cost.num_children]
    if spent:
        yield Chart("time", "cost", draw_seconds(spent))
        yield Chart("flops", "cost", draw_flops(spent))


def _draw_tasks(content: Content) -> Iterator[Chart]:
    yield Chart("accuracy", "accuracy", draw_tasks(content.standings))
    if content.methods:
        yield Chart("methods", "accuracy", draw_methods(content.methods))
    for standing in content.standings:
        name = standing.task.name
        baselines = [base for base in content.baselines if base.task == name]
        if baselines:
            yield Chart(f"accuracy-{name}", "accuracy", draw_task(standing, baselines))
    yield Chart("model", "model", draw_graph(content.structure))
    yield Chart("in-common", "model", draw_in_common(content.structure))
