"""How large numbers become within a path: whether float16 can hold them, whatever the device and the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evolve.layer import Tensors
from evolve.path import Path
from evolve.vit import build_path
from munet.preprocessing import Pixels

MOST_IN_FLOAT16 = 65504 / 2
"""Greatest magnitude within a float16 route on the images it is checked with: half of what it holds, as other images may go further."""


class _Magnitudes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the greatest magnitude that any operation gives, attention scores before the softmax included."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.greatest: float = 0.0

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                magnitude = float(value.abs().max())
                # Written so that what is no number stays noted.
                if not magnitude <= self.greatest:
                    self.greatest = magnitude
        return result


def greatest_magnitude(path: Path, tensors: Callable[[str], Tensors], images: Pixels) -> float:
    """Returns the greatest magnitude of any value that a path computes in float32 between the scaled image and the logits.

    ONNX Runtime's CPU provider cannot show an overflow of float16: it computes most operations in float32 and drops the roundings between
    two of them.

    Args:
        path: a task's path.
        tensors: a layer's weights by its id.
        images: [images, size, size, 3] uint8.
    """
    model = build_path(path, tensors, fused_attention=False)
    # The scaling of uint8 pixels stays in float32 in every precision.
    scaled = torch.from_numpy(images).to(torch.float32) / 127.5 - 1.0
    with torch.inference_mode(), _Magnitudes() as magnitudes:
        model(scaled)
    greatest: float = magnitudes.greatest
    return greatest
