import pytest
import torch

from evolve.training.optimiser import MomentumOptimiser, clip_jointly


def test_clipping_is_joint() -> None:
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    clip_jointly(gradients)
    assert gradients[0].tolist() == pytest.approx([0.6, 0.0])
    assert gradients[1].tolist() == [pytest.approx([0.8])]


def test_short_gradients_stay_as_they_are() -> None:
    gradients = [torch.tensor([0.3, 0.1]), torch.zeros(2)]
    clip_jointly(gradients)
    assert torch.equal(gradients[0], torch.tensor([0.3, 0.1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_do_not_hide(bad: float) -> None:
    gradients = [torch.tensor([bad]), torch.tensor([1.0])]
    clip_jointly(gradients)
    assert not torch.cat(gradients).isfinite().all()


@pytest.mark.parametrize(("momentum", "nesterov"), [(None, False), (None, True), (0.0, False), (0.9, False), (0.95, True)])
def test_follows_torch(momentum: float | None, nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)]
    theirs = [tensor.clone().requires_grad_() for tensor in ours]
    rates = [0.1, 0.05, 0.2]
    optimiser = MomentumOptimiser(ours, momentum, nesterov)
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=momentum or 0.0, nesterov=nesterov and bool(momentum))
    for rate in rates:
        gradients = [torch.randn(tensor.shape, generator=generator) for tensor in ours]
        for tensor, gradient in zip(theirs, gradients, strict=True):
            tensor.grad = gradient.clone()
        reference.param_groups[0]["lr"] = rate
        reference.step()
        optimiser.step(gradients, rate)
    for tensor, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(tensor, expected.detach(), rtol=1e-6, atol=1e-6)


def test_two_steps_by_hand() -> None:
    parameter = torch.tensor([1.0])
    optimiser = MomentumOptimiser([parameter], momentum=0.5, nesterov=True)
    optimiser.step([torch.tensor([2.0])], 0.1)  # trace 2, update 2 + 0.5 * 2
    assert parameter.item() == pytest.approx(0.7)
    optimiser.step([torch.tensor([1.0])], 0.1)  # trace 1 + 0.5 * 2, update 1 + 0.5 * 2
    assert parameter.item() == pytest.approx(0.5)
