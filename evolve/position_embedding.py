"""Position embeddings for other grids of patches, resampled from the checkpoint's native grid."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from evolve.layer import LayerKind, LayerSpec, Tensors


def position_embedding_spec(width: int, grid_height: int, grid_width: int) -> LayerSpec:
    """Returns the spec of a position embedding: tensor `weight` [1 + grid_height * grid_width, width], the class row first."""
    return LayerSpec.of(LayerKind.POS_EMBED, width=width, grid_height=grid_height, grid_width=grid_width)


def resample(spec: LayerSpec, tensors: Tensors, grid: int) -> tuple[LayerSpec, dict[str, npt.NDArray[np.float32]]]:
    """Resamples a position embedding to a square grid: bilinear, corners aligned; the class row is unchanged.

    Args:
        spec: of the native embedding.
        tensors: `weight` [1 + grid_height * grid_width, width].
        grid: height and width of the wanted grid, in patches.

    Returns:
        Spec and tensors of the resampled embedding: `weight` [1 + grid * grid, width] float32. On the native grid, equal values.
    """
    width, height_in, width_in = (spec.integer(name) for name in ("width", "grid_height", "grid_width"))
    weight = np.asarray(tensors["weight"], dtype=np.float32)
    patches = weight[1:].reshape(height_in, width_in, width).astype(np.float64)
    patches = _interpolate(patches, grid, axis=0)
    patches = _interpolate(patches, grid, axis=1)
    resampled = np.concatenate([weight[:1], patches.reshape(grid * grid, width).astype(np.float32)])
    return position_embedding_spec(width, grid, grid), {"weight": resampled}


def _interpolate(values: npt.NDArray[np.float64], size: int, axis: int) -> npt.NDArray[np.float64]:
    length = values.shape[axis]
    if length == size:
        return values
    at = np.linspace(0, length - 1, size) if size > 1 else np.zeros(1)
    low = np.minimum(np.floor(at).astype(int), length - 1)
    high = np.minimum(low + 1, length - 1)
    shape = [1] * values.ndim
    shape[axis] = size
    share = (at - low).reshape(shape)
    result: npt.NDArray[np.float64] = np.take(values, low, axis) * (1 - share) + np.take(values, high, axis) * share
    return result
