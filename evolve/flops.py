"""Estimates of floating point operations: a multiply-add counts as two; what works element by element is left out. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable

from evolve.layer import LayerKind, LayerSpec


def layer_flops(spec: LayerSpec, image_size: int, patch_size: int) -> int:
    """Estimates the operations of one layer's forward pass on one image.

    Args:
        spec: of the layer.
        image_size: height and width of the image, in pixels.
        patch_size: height and width of a patch, in pixels.
    """
    patches = (image_size // patch_size) ** 2
    tokens = patches + 1
    width = spec.integer("width")
    match spec.kind:
        case LayerKind.PATCH_EMBED:
            return 2 * patches * spec.integer("channels") * patch_size**2 * width
        case LayerKind.ADAPTER:
            return 2 * tokens * 2 * width * spec.integer("adapter_width")
        case LayerKind.BLOCK:
            projections = 4 * width**2 + 2 * width * spec.integer("mlp_width")
            return 2 * tokens * (projections + 2 * tokens * width)
        case LayerKind.HEAD:
            return 2 * width * spec.integer("classes")
        case LayerKind.CLASS_TOKEN | LayerKind.POS_EMBED | LayerKind.NORM:
            return 0


def forward_flops(specs: Iterable[LayerSpec], image_size: int) -> int:
    """Estimates the operations of a path's forward pass on one image.

    Args:
        specs: of the path's layers, in order.
        image_size: height and width of the image, in pixels.
    """
    return _flops([(spec, 1) for spec in specs], image_size)


def training_flops(layers: Iterable[tuple[LayerSpec, bool]], image_size: int) -> int:
    """Estimates the operations of one image's forward and backward pass in training.

    Relative to its forward pass, a trainable layer costs three times (gradients by its input and by its weights), a frozen one above
    the lowest trainable layer twice (by its input), a frozen one below it once.

    Args:
        layers: spec and whether it is trainable, in order.
        image_size: height and width of the image, in pixels.
    """
    weighted: list[tuple[LayerSpec, int]] = []
    above = False
    for spec, trainable in layers:
        above = above or trainable
        weighted.append((spec, 1 + above + trainable))
    return _flops(weighted, image_size)


def _flops(weighted: list[tuple[LayerSpec, int]], image_size: int) -> int:
    patch_size = next(spec.integer("patch_size") for spec, _ in weighted if spec.kind is LayerKind.PATCH_EMBED)
    return sum(times * layer_flops(spec, image_size, patch_size) for spec, times in weighted)
