"""Stochastic gradient descent with momentum, on gradients clipped jointly: of one child, and of several in one step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from evolve.hyperparameters import Hyperparameters
from evolve.training.device import upload

GREATEST_NORM = 1.0
"""Joint gradients that are longer are shortened to this length."""


def clip_jointly(gradients: Sequence[torch.Tensor]) -> None:
    """Scales gradients in place so that the norm of all of them together is at most GREATEST_NORM.

    A gradient that is not finite makes them all not finite.
    """
    norm = torch.stack(torch._foreach_norm(list(gradients))).norm()
    torch._foreach_mul_(list(gradients), GREATEST_NORM / norm.clamp(min=GREATEST_NORM))


class MomentumOptimiser:
    """Changes parameters in place: m = g + mu * m, then by -lr * m, or by -lr * (g + mu * m) if nesterov; without momentum by -lr * g."""

    def __init__(self, parameters: Sequence[torch.Tensor], momentum: float | None, nesterov: bool) -> None:
        """Starts fresh.

        Args:
            parameters: what to change.
            momentum: mu, 0 to 1, or None for plain descent.
            nesterov: whether momentum looks ahead; means nothing without momentum.
        """
        self._parameters = list(parameters)
        self._momentum = momentum
        self._nesterov = nesterov
        self._traces: list[torch.Tensor] | None = None

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor], learning_rate: float) -> None:
        """Takes one step.

        Args:
            gradients: of each parameter, already clipped; they may be overwritten.
            learning_rate: of this step.
        """
        updates = list(gradients)
        if self._momentum is not None:
            if self._traces is None:
                self._traces = [torch.zeros_like(parameter) for parameter in self._parameters]
            torch._foreach_mul_(self._traces, self._momentum)
            torch._foreach_add_(self._traces, updates)
            if self._nesterov:
                torch._foreach_add_(updates, self._traces, alpha=self._momentum)
            else:
                updates = self._traces
        torch._foreach_add_(self._parameters, updates, alpha=-learning_rate)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """A weight of several children.

    Attributes:
        children: whose, in the order of the first dimension.
        weights: [children, ...], changed in place.
        gradients: alike.
        traces: alike, of the momentum, zeros before the first step; changed in place.
    """

    children: tuple[int, ...]
    weights: torch.Tensor
    gradients: torch.Tensor
    traces: torch.Tensor


class StackedOptimiser:
    """What `clip_jointly` and MomentumOptimiser do to each of several children, each with its own rules, in one step for all of them."""

    def __init__(self, children: Mapping[int, Hyperparameters], device: torch.device) -> None:
        """Reads the rules.

        Args:
            children: hyperparameters of each, by what names it in stacks.
            device: where the weights are.
        """
        self._rows = {child: row for row, child in enumerate(children)}
        # No momentum is a momentum of 0. What is subtracted is ahead * trace + direct * gradient.
        momenta = [of.momentum or 0.0 for of in children.values()]
        rules = [(mu, mu, 1.0) if of.nesterov else (mu, 1.0, 0.0) for mu, of in zip(momenta, children.values(), strict=True)]
        self._layout: _Layout | None = None
        self._any_looks_ahead = any(of.nesterov for of in children.values())
        self._momentum, self._ahead, self._direct = torch.tensor(rules, device=device).unbind(1)

    @torch.no_grad()
    def step(self, stacks: Sequence[Stack], learning_rates: Mapping[int, float]) -> None:
        """Takes one step of every child; a gradient that is not finite spoils its own child only.

        Args:
            stacks: all weights of all children, in the same order at each step.
            learning_rates: of this step, by child.
        """
        if self._layout is None:
            self._layout = _Layout(stacks, self._rows, self._momentum.device)
        layout = self._layout
        rates = upload(torch.tensor([learning_rates[child] for child in self._rows]), self._momentum.device)
        norms = torch.cat([torch.linalg.vector_norm(stack.gradients.flatten(1), dim=1) for stack in stacks])
        # Chosen, not multiplied with zeros: what is not finite stays with its child. Nor added by index, which has no fixed order on a GPU.
        shrink = GREATEST_NORM / torch.where(layout.own, norms.square(), 0.0).sum(1).sqrt().clamp(min=GREATEST_NORM)
        table = torch.stack([self._momentum, shrink, -rates * self._ahead, -rates * self._direct * shrink])
        momentum, shrunk, ahead, direct = layout.beside(stacks, table)
        weights = [stack.weights for stack in stacks]
        gradients = [stack.gradients for stack in stacks]
        traces = [stack.traces for stack in stacks]
        torch._foreach_mul_(traces, momentum)
        torch._foreach_addcmul_(traces, gradients, shrunk)
        torch._foreach_addcmul_(weights, traces, ahead)
        if self._any_looks_ahead:
            torch._foreach_addcmul_(weights, gradients, direct)


class _Layout:
    """Where the children of some stacks stand in tables of all children.

    Attributes:
        own: [children, rows of all stacks], whether a row is the child's.
    """

    def __init__(self, stacks: Sequence[Stack], rows: Mapping[int, int], device: torch.device) -> None:
        owners = torch.tensor([rows[child] for stack in stacks for child in stack.children], device=device)
        self.own = owners == torch.arange(len(rows), device=device)[:, None]
        self._columns = {
            children: torch.tensor([rows[child] for child in children], device=device)
            for children in {stack.children for stack in stacks}
        }

    def beside(self, stacks: Sequence[Stack], table: torch.Tensor) -> list[list[torch.Tensor]]:
        """Returns each row of a table [rules, children] as factors of the stacks."""
        chosen = {children: table.index_select(1, columns) for children, columns in self._columns.items()}
        factors = []
        for stack in stacks:
            shape = (len(table), len(stack.children), *[1] * (stack.weights.ndim - 1))
            factors.append(chosen[stack.children].view(shape).unbind(0))
        return [list(factor) for factor in zip(*factors, strict=True)]
