"""Specs of the layers that the search itself adds to a path. Torch-free."""

from __future__ import annotations

from evolve.layer import LayerKind, LayerSpec

ADAPTER_EPS = 1e-6
"""Of the layer norm within an adapter."""


def adapter_spec(width: int, adapter_width: int) -> LayerSpec:
    """Returns the spec of an adapter; evolve.adapter says what it computes.

    Args:
        width: of the hidden states.
        adapter_width: of the adapter's own hidden layer.
    """
    return LayerSpec.of(LayerKind.ADAPTER, width=width, adapter_width=adapter_width, eps=ADAPTER_EPS)


def head_spec(width: int, classes: int) -> LayerSpec:
    """Returns the spec of a head: tensors `weight` [classes, width] and `bias` [classes].

    Args:
        width: of the hidden states.
        classes: number of the task's classes.
    """
    return LayerSpec.of(LayerKind.HEAD, width=width, classes=classes)
