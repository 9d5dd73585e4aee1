"""One child as a torch model: started from its plan, taken step by step, measured."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from evolve.generation import ChildPlan, LayerPlan
from evolve.layer import Position, Tensors
from evolve.training.images import DeviceImages
from evolve.training.optimiser import MomentumOptimiser, clip_jointly
from evolve.vit import PathModel, build_module, new_tensors, run_layers, tensors_of

EVALUATION_BATCH = 256
"""Images that are classified at a time."""


class ChildModel:
    """A child in training. Layers below the lowest trainable one never see a gradient; shared layers are never changed.

    Attributes:
        model: all its layers.
    """

    def __init__(
        self, plan: ChildPlan, tensors: Callable[[str], Tensors], device: torch.device, *, bf16: bool, batch_parts: int = 1
    ) -> None:
        """Builds it from the weights its plan names.

        Args:
            plan: of the child.
            tensors: a stored layer's weights by its id.
            device: where it trains.
            bf16: whether it computes under bfloat16 autocast.
            batch_parts: parts in which each batch is computed one after another; the gradient is that of the whole batch but for
                its rounding.

        Raises:
            ValueError: nothing is trainable, or weights do not fit their layer.
        """
        trainable = [index for index, layer in enumerate(plan.layers) if layer.trainable]
        if not trainable:
            raise ValueError(f"found no trainable layer in child {plan.index}, expected at least its head")
        placed = [(layer.position, build_module(layer.spec, initial_weights(plan, layer, tensors))) for layer in plan.layers]
        self.model = PathModel(placed).eval().to(device)
        self._bf16 = bf16
        self._batch_parts = batch_parts
        self._trainable = [(plan.layers[index].position, self.model.layers[index]) for index in trainable]
        self._frozen_below = list(self.model.layers)[: trainable[0]]
        self._above = list(self.model.layers)[trainable[0] :]
        for module in self.model.layers:
            module.requires_grad_(False)
        for _, module in self._trainable:
            module.requires_grad_(True)
        self._parameters: list[torch.Tensor] = [parameter for _, module in self._trainable for parameter in module.parameters()]
        wanted = plan.hyperparameters
        self._optimiser = MomentumOptimiser(self._parameters, wanted.momentum, wanted.nesterov)
        self._sum_of_losses = torch.zeros((), device=device)

    def step(self, images: torch.Tensor, labels: torch.Tensor, learning_rate: float) -> None:
        """Takes one optimiser step.

        Args:
            images: [batch, size, size, 3] float32 in [-1, 1].
            labels: [batch] int64.
            learning_rate: of this step.
        """
        gradients: list[torch.Tensor] = []
        for some_images, some_labels in zip(images.chunk(self._batch_parts), labels.chunk(self._batch_parts), strict=True):
            loss = self._loss(some_images, some_labels)
            if len(some_labels) < len(labels):
                loss = loss * (len(some_labels) / len(labels))
            more = torch.autograd.grad(loss, self._parameters)
            if gradients:
                torch._foreach_add_(gradients, list(more))
            else:
                gradients = list(more)
            self._sum_of_losses += loss.detach()
        clip_jointly(gradients)
        self._optimiser.step(gradients, learning_rate)

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            # Not inference mode: what it makes cannot be kept for a backward pass.
            with torch.no_grad():
                hidden = run_layers(self._frozen_below, images)
            logits = run_layers(self._above, hidden)
        return functional.cross_entropy(logits.float(), labels)

    def is_finite(self) -> bool:
        """Tells whether all losses so far and all trainable weights are finite."""
        norms = torch.stack(torch._foreach_norm(self._parameters))
        return bool((norms.sum().isfinite() & self._sum_of_losses.isfinite()).item())

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the logits [batch, classes] of images [batch, size, size, 3], uint8 or float32 in [-1, 1]."""
        with self._autocast():
            logits: torch.Tensor = self.model(images)
        return logits

    def trained(self) -> dict[Position, dict[str, npt.NDArray[np.float32]]]:
        """Returns a copy of the weights of its trainable layers."""
        return {position: tensors_of(module) for position, module in self._trainable}

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", dtype=torch.bfloat16) if self._bf16 else contextlib.nullcontext()


def accuracy(predict: Callable[[torch.Tensor], torch.Tensor], images: DeviceImages, batch_parts: int = 1) -> float:
    """Measures how many images are classified rightly.

    Args:
        predict: gives the logits of uint8 images.
        images: one or more.
        batch_parts: parts into which EVALUATION_BATCH is divided.

    Returns:
        0 to 1.
    """
    at_once = max(1, EVALUATION_BATCH // batch_parts)
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    with torch.inference_mode():
        for start in range(0, len(images), at_once):
            pixels, labels, _ = images.take(np.arange(start, min(start + at_once, len(images))))
            correct += (predict(pixels).argmax(1) == labels).sum()
    return int(correct.item()) / len(images)


def initial_weights(child: ChildPlan, layer: LayerPlan, tensors: Callable[[str], Tensors]) -> Tensors:
    """Returns the weights that a layer of a child starts with: its source's, or a new adapter's or head's.

    New layers are drawn from the child's seed and their block, so that none depends on how many others are new.
    """
    if layer.source is not None:
        return tensors(layer.source.id)
    return new_tensors(layer.spec, [child.seed, layer.position.block or 0])
