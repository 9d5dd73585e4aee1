"""The start of a patch embedding: equal variances, no correlation."""

import torch

from evolve.training.whitening import whitening_projection


def test_projected_patches_are_decorrelated() -> None:
    generator = torch.Generator().manual_seed(0)
    # Neighbouring pixels go together and every image has its own brightness, as in photographs.
    rough = torch.randn((4000, 1, 4, 4), generator=generator)
    images = torch.nn.functional.interpolate(rough, size=8, mode="bilinear")[:, 0] + 3 * torch.randn(
        (4000, 1, 1), generator=generator
    )
    weight = whitening_projection(images, 4, 6, seed=0)
    assert weight.shape == (6, 4, 4)
    patches = images.unfold(1, 4, 4).unfold(2, 4, 4).reshape(-1, 16).double()
    projected = (patches - patches.mean(dim=0)) @ weight.reshape(6, 16).T
    covariance = projected.T @ projected / len(projected)
    assert covariance.diagonal().max() < 1.1
    # In the space of the kept directions all variances are alike but for the floor under the noise.
    eigenvalues = torch.linalg.eigvalsh(covariance)
    plain = torch.linalg.eigvalsh(patches.T @ patches / len(patches))
    assert eigenvalues[-1] / eigenvalues[0] < 0.1 * plain[-1] / plain[-6]


def test_wider_than_a_patch_has_pixels() -> None:
    weight = whitening_projection(torch.rand((50, 8, 8), generator=torch.Generator().manual_seed(1)), 4, 24, seed=3)
    assert weight.shape == (24, 4, 4)
    assert torch.isfinite(weight).all()
    assert torch.equal(weight, whitening_projection(torch.rand((50, 8, 8), generator=torch.Generator().manual_seed(1)), 4, 24, 3))
