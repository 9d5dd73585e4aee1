"""Children of a generation as one computation, layer by layer.

All children of a pack take the same batch. At each position, what meets the same frozen layer with the same input is computed once for all
of them; what meets the same frozen layer with different inputs runs as one batch; trainable layers of one shape run as one batched
operation over stacked weights, or one after another where that is faster (`stacks`). Losses add up, and as no two children share a
trainable layer, the gradient of the sum is each child's own. Below a child's lowest trainable layer nothing keeps a gradient.

A child computes as in evolve.training.child, up to the rounding of larger products. A child that leaves takes its rows with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from evolve.generation import ChildPlan, LayerPlan
from evolve.layer import LayerSpec, Position, Tensors
from evolve.path import ordered_positions
from evolve.training.child import initial_weights
from evolve.training.optimiser import Stack, StackedOptimiser
from evolve.vit import build_module, tensors_of

Hidden = Mapping[int, torch.Tensor]
"""What each child, by its index, has at some position. Children with the same value have the very same tensor."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Where children enter a forward pass.

    Attributes:
        layers: how many of its first layers a child has behind it; 0 starts from the image.
        values: what they gave, [batch, ...], or the images.
    """

    layers: int
    values: torch.Tensor


class PackModel:
    """Children that train together on the same batches.

    Attributes:
        children: those that are still in training, by index.
    """

    def __init__(
        self,
        plans: Sequence[ChildPlan],
        tensors: Callable[[str], Tensors],
        device: torch.device,
        *,
        bf16: bool,
        stacks: bool,
    ) -> None:
        """Builds them from the weights their plans name.

        Args:
            plans: of the children, one or more.
            tensors: a stored layer's weights by its id.
            device: where they train.
            bf16: whether they compute under bfloat16 autocast.
            stacks: whether trainable layers of one shape are one batched operation; else they run one after another.

        Raises:
            ValueError: nothing of a child is trainable, or weights do not fit their layer.
        """
        self.children = {plan.index: plan for plan in plans}
        for plan in plans:
            if not any(layer.trainable for layer in plan.layers):
                raise ValueError(f"found no trainable layer in child {plan.index}, expected at least its head")
        self._bf16 = bf16
        self._frozen = _build_frozen(plans, tensors, device)
        used = {layer.position for plan in plans for layer in plan.layers}
        blocks = range(max(plan.hyperparameters.num_blocks for plan in plans))
        self._order = [position for position in ordered_positions(len(blocks), blocks) if position in used]
        self._trained: dict[Position, list[_TrainedLayer]] = {}
        for position in self._order:
            by_spec: dict[LayerSpec, dict[int, LayerPlan]] = {}
            for plan in plans:
                for layer in plan.layers:
                    if layer.position == position and layer.trainable:
                        by_spec.setdefault(layer.spec, {})[plan.index] = layer
            self._trained[position] = [
                made
                for spec, layers in by_spec.items()
                for made in _build_trained(spec, layers, self.children, tensors, device, stacks=stacks)
            ]
        self._device = device
        self._optimiser = self._make_optimiser()
        self._sums_of_losses = {plan.index: torch.zeros((), device=device) for plan in plans}

    def step(self, starts: Mapping[int, Start], labels: torch.Tensor, learning_rates: Mapping[int, float]) -> None:
        """Takes one optimiser step of every child.

        Args:
            starts: where each child enters, by its index; images are [batch, size, size, 3] float32 in [-1, 1].
            labels: [batch] int64.
            learning_rates: of this step, by child.
        """
        with self._autocast():
            logits = self._run(starts)
        losses = {child: functional.cross_entropy(given.float(), labels) for child, given in logits.items()}
        leaves = [leaf for layers in self._trained.values() for layer in layers for leaf in layer.leaves]
        torch.autograd.backward(list(losses.values()), inputs=leaves)
        for child, loss in losses.items():
            self._sums_of_losses[child] += loss.detach()
        self._optimiser.step(
            [stack for layers in self._trained.values() for layer in layers for stack in layer.stacks()], learning_rates
        )
        for leaf in leaves:
            leaf.grad = None

    def predict(self, starts: Mapping[int, Start]) -> Hidden:
        """Returns each child's logits, [batch, classes], by its index."""
        with torch.inference_mode(), self._autocast():
            return self._run(starts)

    def finite_children(self) -> set[int]:
        """Returns the children whose losses so far and trainable weights are all finite."""
        found = set()
        for child in self.children:
            norms = torch.stack(torch._foreach_norm(self._weights(child)))
            if bool((norms.sum().isfinite() & self._sums_of_losses[child].isfinite()).item()):
                found.add(child)
        return found

    def trained(self, child: int) -> dict[Position, dict[str, npt.NDArray[np.float32]]]:
        """Returns a copy of the weights of a child's trainable layers."""
        return {
            position: layer.tensors(child)
            for position in self._order
            for layer in self._trained[position]
            if child in layer.children
        }

    def remove(self, child: int) -> None:
        """Takes a child out; the others go on as they would have."""
        del self.children[child], self._sums_of_losses[child]
        for position, layers in self._trained.items():
            self._trained[position] = [left for layer in layers if (left := layer.without(child)) is not None]
        self._optimiser = self._make_optimiser()

    def run_frozen(self, layers: Iterable[LayerPlan], values: torch.Tensor) -> torch.Tensor:
        """Runs frozen layers of the pack one after the other, without gradient."""
        with torch.no_grad(), self._autocast():
            for layer in layers:
                values = self._frozen[_source_id(layer)](values)
        return values

    def _run(self, starts: Mapping[int, Start]) -> dict[int, torch.Tensor]:
        hidden = {child: starts[child].values for child in self.children}
        left = {
            child: {layer.position: layer for layer in plan.layers[starts[child].layers :]}
            for child, plan in self.children.items()
        }
        for position in self._order:
            frozen: dict[str, list[int]] = {}
            for child, layers in left.items():
                layer = layers.get(position)
                if layer is not None and not layer.trainable:
                    frozen.setdefault(_source_id(layer), []).append(child)
            given: dict[int, torch.Tensor] = {}
            for layer_id, children in frozen.items():
                given.update(_run_shared(self._frozen[layer_id], {child: hidden[child] for child in children}))
            for trained in self._trained[position]:
                given.update(trained.run({child: hidden[child] for child in trained.children}))
            hidden.update(given)
        return hidden

    def _make_optimiser(self) -> StackedOptimiser:
        return StackedOptimiser({index: plan.hyperparameters for index, plan in self.children.items()}, self._device)

    def _weights(self, child: int) -> list[torch.Tensor]:
        layers = (layer for layers in self._trained.values() for layer in layers if child in layer.children)
        return [weight for layer in layers for weight in layer.weights(child)]

    def _autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", dtype=torch.bfloat16) if self._bf16 else contextlib.nullcontext()


class _TrainedLayer:
    """Trainable layers of one spec at one position, of one child, or of several with their weights stacked.

    Attributes:
        children: whose layers they are, in the order in which they are stacked.
        leaves: what gradients are taken of: [...] of one child, [children, ...] of several.
    """

    def __init__(
        self,
        module: nn.Module,
        children: tuple[int, ...],
        weights: Mapping[str, torch.Tensor],
        traces: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self._module = module
        self.children = children
        self._names = tuple(weights)
        self.leaves = [weight.requires_grad_() for weight in weights.values()]
        self._traces = [torch.zeros_like(leaf) for leaf in self.leaves] if traces is None else traces

    @property
    def _is_stacked(self) -> bool:
        return len(self.children) > 1

    def run(self, hidden: Hidden) -> dict[int, torch.Tensor]:
        """Returns what each child's layer gives."""
        weights = dict(zip(self._names, self.leaves, strict=True))
        values = [hidden[child] for child in self.children]
        if not self._is_stacked:
            return {self.children[0]: torch.func.functional_call(self._module, weights, (values[0],))}
        same = all(value is values[0] for value in values)
        batched = torch.vmap(
            lambda weights, value: torch.func.functional_call(self._module, weights, (value,)), in_dims=(0, None if same else 0)
        )
        given = batched(weights, values[0] if same else torch.stack(values))
        return dict(zip(self.children, given.unbind(0), strict=True))

    def weights(self, child: int) -> list[torch.Tensor]:
        """Returns the weights of a child, to be changed in place."""
        return [self._part(leaf.detach(), child) for leaf in self.leaves]

    def stacks(self) -> Iterable[Stack]:
        """Yields the weights with their gradients after a backward pass."""
        for leaf, trace in zip(self.leaves, self._traces, strict=True):
            # A layer whose output no loss depends on has no gradient.
            gradient = torch.zeros_like(trace) if leaf.grad is None else leaf.grad
            values = (leaf.detach(), gradient, trace)
            yield Stack(self.children, *(values if self._is_stacked else (value[None] for value in values)))

    def tensors(self, child: int) -> dict[str, npt.NDArray[np.float32]]:
        """Returns a copy of the weights of a child by name."""
        return {name: weight.cpu().numpy().copy() for name, weight in zip(self._names, self.weights(child), strict=True)}

    def without(self, child: int) -> _TrainedLayer | None:
        """Returns what is left when a child leaves; None if nothing is."""
        if child not in self.children:
            return self
        left = tuple(other for other in self.children if other != child)
        if not left:
            return None
        rows = [self.children.index(other) for other in left]

        def kept(stacked: torch.Tensor) -> torch.Tensor:
            return stacked.detach()[rows] if len(left) > 1 else stacked.detach()[rows[0]].clone()

        weights = {name: kept(leaf) for name, leaf in zip(self._names, self.leaves, strict=True)}
        return _TrainedLayer(self._module, left, weights, [kept(trace) for trace in self._traces])

    def _part(self, tensor: torch.Tensor, child: int) -> torch.Tensor:
        return tensor[self.children.index(child)] if self._is_stacked else tensor


def _build_frozen(plans: Iterable[ChildPlan], tensors: Callable[[str], Tensors], device: torch.device) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for layer in (layer for plan in plans for layer in plan.layers if not layer.trainable):
        layer_id = _source_id(layer)
        if layer_id not in modules:
            modules[layer_id] = build_module(layer.spec, tensors(layer_id)).eval().requires_grad_(False).to(device)
    return modules


def _build_trained(
    spec: LayerSpec,
    layers: Mapping[int, LayerPlan],
    plans: Mapping[int, ChildPlan],
    tensors: Callable[[str], Tensors],
    device: torch.device,
    *,
    stacks: bool,
) -> Iterable[_TrainedLayer]:
    # The module only says what is computed: weights are passed in. Fused attention has no rule for stacked weights on a CPU.
    groups = [tuple(layers)] if stacks else [(child,) for child in layers]
    for children in groups:
        module = build_module(
            spec, initial_weights(plans[children[0]], layers[children[0]], tensors), fused_attention=len(children) == 1
        )
        starts = [initial_weights(plans[child], layers[child], tensors) for child in children]
        names = tensors_of(module).keys()
        stacked = {
            name: torch.tensor(np.stack([start[name] for start in starts]) if len(children) > 1 else starts[0][name]).to(device)
            for name in names
        }
        yield _TrainedLayer(module.eval().requires_grad_(False).to(device), children, stacked)


def _run_shared(module: nn.Module, hidden: Hidden) -> dict[int, torch.Tensor]:
    """Runs a frozen layer for several children: once for each different input, all of them in one batch."""
    distinct = {id(value): value for value in hidden.values()}
    given: dict[int, torch.Tensor] = {}
    # Rows that need no gradient stay apart, so that none is computed for them.
    for needs_gradient in (False, True):
        inputs = [value for value in distinct.values() if value.requires_grad is needs_gradient]
        if len(inputs) == 1:
            given[id(inputs[0])] = module(inputs[0])
        elif inputs:
            outputs = module(torch.cat(inputs)).split([len(value) for value in inputs])
            given.update((id(value), output) for value, output in zip(inputs, outputs, strict=True))
    return {child: given[id(value)] for child, value in hidden.items()}


def _source_id(layer: LayerPlan) -> str:
    if layer.source is None:
        raise ValueError(f"found no weights of frozen layer {layer.position}, expected those of a stored layer")
    return layer.source.id
