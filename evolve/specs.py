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


def new_parameters(spec: LayerSpec) -> int:
    """Returns the number of parameters of a new layer of a child, which nobody has trained yet.

    Raises:
        ValueError: neither an adapter nor a head; nothing else is ever new.
    """
    width = spec.integer("width")
    if spec.kind is LayerKind.HEAD:
        return (width + 1) * spec.integer("classes")
    if spec.kind is LayerKind.ADAPTER:
        hidden = spec.integer("adapter_width")
        return 2 * width + (width + 1) * hidden + (hidden + 1) * width
    raise ValueError(f"found a new layer of kind {spec.kind}, expected an adapter or a head")
