"""Adapters: small residual layers before a block that let a frozen block serve a new task.

Source: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751 (2019), section 2; placed and initialised as
muNet does (arXiv 2205.10937).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from evolve.layer import LayerSpec


class Adapter(nn.Module):
    """`x + up(gelu(down(norm(x))))` with the exact GELU.

    Tensors: `norm.weight` and `norm.bias` [width], `down.weight` [adapter_width, width], `down.bias` [adapter_width],
    `up.weight` [width, adapter_width], `up.bias` [width].
    """

    def __init__(self, width: int, adapter_width: int, eps: float) -> None:
        """Makes an adapter with torch's own initial weights; `initial_tensors` gives those of a new one."""
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.down = nn.Linear(width, adapter_width)
        self.up = nn.Linear(adapter_width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the adapted hidden states.

        Args:
            x: [batch, tokens, width].

        Returns:
            [batch, tokens, width].
        """
        adapted: torch.Tensor = x + self.up(nn.functional.gelu(self.down(self.norm(x))))
        return adapted


def initial_tensors(spec: LayerSpec, seed: int | Sequence[int]) -> dict[str, npt.NDArray[np.float32]]:
    """Returns the weights of a new adapter: it changes no hidden state until it is trained.

    The first linear layer is drawn from a normal distribution of variance 1 / width (LeCun, not truncated), the second is zero;
    biases are zero, the norm's scale is one.

    Args:
        spec: of an adapter.
        seed: of the draw; anything numpy.random.default_rng takes as a seed of whole numbers.
    """
    width, adapter_width = spec.integer("width"), spec.integer("adapter_width")
    draw = np.random.default_rng(seed).standard_normal((adapter_width, width))
    return {
        "norm.weight": np.ones(width, dtype=np.float32),
        "norm.bias": np.zeros(width, dtype=np.float32),
        "down.weight": (draw / math.sqrt(width)).astype(np.float32),
        "down.bias": np.zeros(adapter_width, dtype=np.float32),
        "up.weight": np.zeros((width, adapter_width), dtype=np.float32),
        "up.bias": np.zeros(width, dtype=np.float32),
    }
