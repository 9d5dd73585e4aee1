"""Every number of a report as tables: for CSV, for JSON, and for whoever asks from Python. Torch-free."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evolve.report.content import Content
from evolve.report.searches import Search

Table = list[dict[str, Any]]
"""Rows with the same names in the same order; values are strings, numbers, truth values or None."""


def tables(content: Content) -> dict[str, Table]:
    """Returns all tables by name; one without rows is an empty list."""
    return {name: make(content) for name, make in _TABLES.items()}


def to_csv(table: Table) -> str:
    """Returns a table as CSV (RFC 4180, but with line feeds): a line of names, then the rows; None is an empty cell."""
    text = io.StringIO()
    if table:
        writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    return text.getvalue()


def _leaderboard(content: Content) -> Table:
    return [
        {
            "task": standing.task.name,
            "accuracy": standing.accuracy,
            "is_tested": standing.is_tested,
            "quality": standing.task.quality,
            "test_accuracy": standing.task.test_accuracy,
            "best_baseline": standing.rival.method if standing.rival else None,
            "margin": standing.margin,
            "accounted_parameters": standing.task.accounted_parameters,
            "own_parameters": standing.task.own_parameters,
            "num_parameters": standing.task.num_parameters,
            "num_classes": standing.task.num_classes,
            "num_blocks": standing.task.num_blocks,
            "image_size": standing.task.image_size,
            "adapters": " ".join(map(str, standing.task.adapters)),
            "parent": standing.task.parent,
            "rounds": standing.task.rounds,
            "private": standing.task.private,
            "path_id": standing.task.path_id,
        }
        for standing in content.standings
    ]


def _plain(names: Sequence[str], rows: Callable[[Content], Sequence[Any]]) -> Callable[[Content], Table]:
    """Returns what makes a table of the attributes with these names."""
    return lambda content: [{name: getattr(row, name) for name in names} for row in rows(content)]


def _layers(content: Content) -> Table:
    return [
        {
            "position": layer.position,
            "layer_id": layer.layer_id,
            "trained_by": layer.trained_by or None,
            "num_tasks": len(layer.tasks),
            "num_parameters": layer.num_parameters,
            "tasks": " ".join(sorted(layer.tasks)),
        }
        for row in content.structure.rows
        for layer in row.layers
    ]


def _searches(content: Content) -> Table:
    return [_search(search) for search in content.searches]


def _search(search: Search) -> dict[str, Any]:
    end, best = search.end, search.best
    return {
        "task": search.task,
        "round": search.round + 1,
        "closed": end is not None,
        "num_planned": search.num_planned,
        "num_children": len(search.children),
        "num_survived": search.num_survived,
        "num_diverged": search.num_diverged,
        "num_stopped_early": search.num_stopped_early,
        "quality": end.quality if end else best.quality if best else None,
        "score": end.score if end else best.score if best else None,
        "test_accuracy": end.test_accuracy if end else None,
        "scale_factor": search.scale_factor,
        "num_trained_images": sum(child.num_trained_images for child in search.children),
        "flops": sum(child.flops for child in search.children),
        "train_seconds": sum(child.train_seconds for child in search.children),
        "evaluate_seconds": sum(child.evaluate_seconds for child in search.children),
        "examine_seconds": end.examine_seconds if end else None,
        "other_seconds": search.other_seconds,
    }


def _children(content: Content) -> Table:
    return [
        {
            "task": search.task,
            "round": search.round + 1,
            "number": child.number + 1,
            "generation": child.generation,
            "index": child.index,
            "path_id": child.path_id,
            "parent_id": child.parent_id,
            "parent": child.parent,
            "mutations": "; ".join(child.mutations),
            "quality": child.quality,
            "score": child.score,
            "parent_score": child.parent_score,
            "survived": child.survived,
            "diverged": child.diverged,
            "stopped_early": child.stopped_early,
            "is_current": search.end is not None and child.path_id == search.end.path_id,
            "accounted_parameters": child.accounted_parameters,
            "num_trained_images": child.num_trained_images,
            "flops": child.flops,
            "train_seconds": child.train_seconds,
            "evaluate_seconds": child.evaluate_seconds,
            **child.hyperparameters,
        }
        for search in content.searches
        for child in search.children
    ]


_COST = (
    *("task", "num_searches", "num_children", "num_survived", "num_diverged", "num_stopped_early"),
    *("num_trained_images", "flops"),
    *("train_seconds", "evaluate_seconds", "examine_seconds", "other_seconds"),
)
_METHOD = (*("method", "num_tasks", "accuracy", "margin", "accounted_parameters", "num_trained_images", "flops", "seconds"),)
_BASELINE = (
    *("method", "task", "quality", "test_accuracy", "accounted_parameters", "num_trained_images", "flops"),
    *("train_seconds", "evaluate_seconds", "wall_seconds", "num_diverged"),
)

_TABLES: Mapping[str, Callable[[Content], Table]] = {
    "leaderboard": _leaderboard,
    "methods": _plain(_METHOD, lambda content: content.methods),
    "baselines": _plain(_BASELINE, lambda content: content.baselines),
    "layers": _layers,
    "in-common": _plain(
        ("task", "other", "num_layers", "num_trained", "num_parameters"), lambda content: content.structure.in_common
    ),
    "searches": _searches,
    "children": _children,
    "mutations": _plain(("kind", "num_children", "num_better", "share", "mean_gain"), lambda content: content.payoffs),
    "costs": _plain(_COST, lambda content: content.costs),
}
