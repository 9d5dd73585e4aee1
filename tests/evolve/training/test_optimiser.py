import pytest
import torch

from evolve.hyperparameters import Hyperparameters
from evolve.training.optimiser import MomentumOptimiser, Stack, StackedOptimiser, clip_jointly


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


RULES = {
    3: Hyperparameters(num_blocks=1, momentum=0.9, nesterov=True),
    5: Hyperparameters(num_blocks=1, momentum=None),
    8: Hyperparameters(num_blocks=1, momentum=0.5),
    9: Hyperparameters(num_blocks=1, momentum=None, nesterov=True),
}


def test_one_step_for_all_is_each_ones_own() -> None:
    generator = torch.Generator().manual_seed(1)
    # The first weight is one of all children, the second of two of them, in another order.
    members = [(3, 5, 8, 9), (9, 3)]
    weights = [torch.randn(4, 2, 3, generator=generator), torch.randn(2, 5, generator=generator)]
    traces = [torch.zeros_like(weight) for weight in weights]
    alone = {
        child: [
            weight[children.index(child)].clone() for weight, children in zip(weights, members, strict=True) if child in children
        ]
        for child in RULES
    }
    optimisers = {child: MomentumOptimiser(alone[child], rules.momentum, rules.nesterov) for child, rules in RULES.items()}
    together = StackedOptimiser(RULES, torch.device("cpu"))
    for step in range(4):
        rates = {child: 0.1 * (child + step) for child in RULES}
        # Some gradients are long, some short.
        gradients = [torch.randn(weight.shape, generator=generator) * (0.1 + step) for weight in weights]
        for child, optimiser in optimisers.items():
            own = [
                gradient[children.index(child)].clone()
                for gradient, children in zip(gradients, members, strict=True)
                if child in children
            ]
            clip_jointly(own)
            optimiser.step(own, rates[child])
        together.step([Stack(*parts) for parts in zip(members, weights, gradients, traces, strict=True)], rates)
    for child, expected in alone.items():
        found = [weight[children.index(child)] for weight, children in zip(weights, members, strict=True) if child in children]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_spoils_its_own_child_only(bad: float) -> None:
    weights, gradients = torch.ones(4, 2), torch.ones(4, 2)
    gradients[1, 0] = bad
    StackedOptimiser(RULES, torch.device("cpu")).step(
        [Stack(tuple(RULES), weights, gradients, torch.zeros(4, 2))], dict.fromkeys(RULES, 0.1)
    )
    assert not weights[1].isfinite().all()
    assert weights[[0, 2, 3]].isfinite().all()
    assert (weights[[0, 2, 3]] < 1).all()
