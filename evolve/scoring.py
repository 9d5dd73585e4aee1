"""Score and scale control: what a path costs the system, and how much quality makes up for it.

Source: muNet (arXiv 2205.10937), section on scale control; search.md in short:
`score = quality * scale_factor ** (accounted_parameters / P)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from evolve.layer import PATCH_EMBED, Layer
from evolve.path import Path

Sharing = Mapping[str, int]
"""Number of other tasks whose current path uses a layer, by layer id; layers nobody else uses are left out."""


def sharing_counts(paths: Iterable[Path]) -> dict[str, int]:
    """Returns for each layer the number of these paths that use it, by layer id.

    Args:
        paths: current paths of distinct tasks; the root is no task.
    """
    counts: dict[str, int] = {}
    for path in paths:
        for layer_id in path.layer_ids:
            counts[layer_id] = counts.get(layer_id, 0) + 1
    return counts


def others_of(path: Path, every: Sharing) -> dict[str, int]:
    """Returns the sharing counts of a path's layers over the current paths of all other tasks, without looking at those again.

    Args:
        path: a task's current path.
        every: sharing counts over the current paths of all tasks, this one's among them.
    """
    return {layer_id: every[layer_id] - 1 for layer_id in path.layer_ids}


def accounted_parameters(path: Path, others: Sharing) -> float:
    """Returns the parameters a path answers for: each layer's, divided by the number of tasks that use it, its own counted in.

    Args:
        path: the path, as if it were its task's current one.
        others: sharing counts over the current paths of all other tasks.
    """
    layers: dict[str, Layer] = {layer.id: layer for _, layer in path.layers}
    return sum(layer.num_parameters / (1 + others.get(layer.id, 0)) for layer in layers.values())


def reference_parameters(root: Path, position_embedding: Layer) -> int:
    """Returns P: the parameters of the root with a head of two classes.

    Args:
        root: the root path, with its native position embedding.
        position_embedding: the one for the experiment's image size.
    """
    native = {position: layer for position, layer in root.layers if position.kind is not position_embedding.kind}
    width = native[PATCH_EMBED].spec.integer("width")
    return sum(layer.num_parameters for layer in native.values()) + position_embedding.num_parameters + 2 * width + 2


def score(quality: float, accounted: float, reference: float, scale_factor: float) -> float:
    """Returns quality times scale factor to the power of (accounted / reference parameters).

    Args:
        quality: validation accuracy, 0 to 1.
        accounted: accounted parameters of the path.
        reference: P, above 0.
        scale_factor: above 0, at most 1; 1 is off.
    """
    return float(quality * scale_factor ** (accounted / reference))
