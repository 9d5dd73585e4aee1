"""Where a patch embedding that is trained from nothing starts."""

from __future__ import annotations

import torch

NOISE_FLOOR = 0.1
"""Share of the mean variance that is added to that of every direction: those that hardly vary are noise, not to be blown up."""


def whitening_projection(images: torch.Tensor, patch_size: int, width: int, seed: int) -> torch.Tensor:
    """Returns a projection that decorrelates the patches of images and gives them equal variances, rotated at random.

    A projection drawn at random answers mostly to how light the paper of an image is, which says nothing about the letter: on 900
    letters the loss then stays at chance for hundreds of steps.

    Args:
        images: [images, height, width] float32; the patch size divides height and width.
        patch_size: height and width of a patch, in pixels.
        width: of the hidden states. Of more directions than that, those that vary most are kept.
        seed: of the rotation.

    Returns:
        [width, patch_size, patch_size] float64, on the CPU.
    """
    patches = images.unfold(1, patch_size, patch_size).unfold(2, patch_size, patch_size)
    rows = patches.reshape(-1, patch_size * patch_size).double().cpu()
    rows -= rows.mean(dim=0)
    variances, directions = torch.linalg.eigh(rows.T @ rows / len(rows))
    kept = min(width, len(variances))
    scales = 1 / torch.sqrt(variances[-kept:] + NOISE_FLOOR * variances.mean())
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
    weight = rotation[:, :kept] @ (directions[:, -kept:] * scales).T
    projection: torch.Tensor = weight.reshape(width, patch_size, patch_size)
    return projection
