"""Stochastic gradient descent with momentum, on gradients clipped jointly."""

from __future__ import annotations

from collections.abc import Sequence

import torch

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

    def rebind(self, parameters: Sequence[torch.Tensor]) -> None:
        """Goes on with the same parameters in another place.

        Args:
            parameters: of the same values, in the same order.
        """
        self._parameters = list(parameters)

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
