"""Segments as ONNX files: each kind of layer is exported once, without weights; a segment is the chain of its layers' graphs with theirs.

torch.onnx sees the weights as inputs, so nothing of their values can end up in a graph: layers of one spec share one graph, and which
of them was exported first makes no difference. What the exporter writes about the machine (source paths, stack traces, names of symbols) is
left out, values and nodes are named by their place. The same segment therefore gives the same bytes wherever and whenever it is exported.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import torch
from torch import nn

import evolve.adapter
import evolve.vit
from evolve.errors import ExportError
from evolve.export.graph_cache import cached_model
from evolve.export.segments import Segment
from evolve.export.settings import ExportSettings, Precision, exporter_version
from evolve.export.tensors import BATCH, TOKENS, Tensor, input_of, output_of
from evolve.layer import Layer, LayerKind, LayerSpec, Tensors
from evolve.vit import build_module, scale_image

MAX_FILE_BYTES = 2**31 - 2**20
"""Most weights in one file: what a protobuf message may hold, less room for the graph."""

_EXAMPLE_BATCH = 3
_EXAMPLE_TOKENS = 7
"""Sizes the exporter traces with. It turns 0 and 1 into constants silently, and other sizes where the module does: each export is
checked with real batches and images, and 7 tokens are those of no square image."""

_TORCH_TYPES: dict[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16}

_EXAMPLE_CLASSES = 5
"""Classes of the one head that is exported: a head's graph does not say how many it has."""


@dataclasses.dataclass(frozen=True)
class _Graph:
    """What torch.onnx made of a layer, its weights being inputs.

    Attributes:
        nodes: in an order in which they can compute.
        constants: small tensors that belong to the computation, such as the shape of a reshape.
        input: the value that comes from the layer before.
        weights: value by the name of the layer's tensor.
        output: the value that goes to the layer after.
    """

    nodes: tuple[onnx.NodeProto, ...]
    constants: tuple[onnx.TensorProto, ...]
    input: str
    weights: dict[str, str]
    output: str


def export_segment(segment: Segment, tensors: Callable[[str], Tensors], settings: ExportSettings) -> bytes:
    """Returns a segment as an ONNX file, weights inside.

    The first segment of a route takes `image` uint8 [batch, height, width, 3], others `hidden` [batch, tokens, width]; the last gives
    `logits` float32 [batch, classes], others `next_hidden` [batch, tokens, width]. Hidden states and weights are of the settings'
    precision. In float16 the image is still scaled in float32, and a head still multiplies in float32 and adds a float32 bias, so that
    nothing is rounded once it is a logit.

    Args:
        segment: what to export.
        tensors: a layer's weights by its id.
        settings: how; they must be those of the segment's name.

    Raises:
        ExportError: the weights do not fit into one file or into the precision, or a layer needs operators beyond the standard ones.
    """
    num_bytes = np.dtype(settings.precision).itemsize * segment.num_parameters
    if num_bytes > MAX_FILE_BYTES:
        raise ExportError(
            f"found {num_bytes} bytes of weights in one segment of {len(segment.units)} units", f"at most {MAX_FILE_BYTES}"
        )
    graph = onnx.GraphProto(name="segment")
    source, target = input_of(segment.units, settings.precision), output_of(segment.units, settings.precision)
    value = source.name
    layers = segment.layers
    for index, layer in enumerate(layers):
        output = target.name if index == len(layers) - 1 else f"{index}.{layer.kind}"
        weights = _weights_of(layer, tensors(layer.id), settings.precision)
        _append(graph, f"{index}.{layer.kind}", _graph_of(layer, source, settings), weights, value, output)
        value = output
    graph.input.append(_value_info(source))
    graph.output.append(_value_info(target))
    model = onnx.ModelProto(
        ir_version=settings.ir_version,
        producer_name="munet",
        producer_version=exporter_version(),
        opset_import=[onnx.OperatorSetIdProto(domain="", version=settings.opset)],
        graph=graph,
    )
    return model.SerializeToString(deterministic=True)


def _append(graph: onnx.GraphProto, place: str, layer: _Graph, tensors: Tensors, source: str, target: str) -> None:
    """Adds a layer to a graph, every name of its own behind the name of its place."""
    names = {"": "", layer.input: source, layer.output: target}
    for tensor, value in layer.weights.items():
        names[value] = f"{place}.{tensor}"
        graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(tensors[tensor]), names[value]))
    for number, constant in enumerate(layer.constants):
        names[constant.name] = f"{place}/constant_{number}"
        # Rebuilt from its values: the exporter notes things of its own in a tensor.
        graph.initializer.append(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(constant), names[constant.name]))
    for number, node in enumerate(layer.nodes):
        name = f"{place}/{node.op_type}_{number}"
        for position, output in enumerate(node.output):
            names.setdefault(output, f"{name}/{position}")
        graph.node.append(
            onnx.NodeProto(
                name=name,
                op_type=node.op_type,
                input=[names[value] for value in node.input],
                output=[names[value] for value in node.output],
                attribute=[_bare(attribute) for attribute in sorted(node.attribute, key=lambda attribute: attribute.name)],
            )
        )


def _weights_of(layer: Layer, tensors: Tensors, precision: Precision) -> Tensors:
    """Returns a layer's weights as the file holds them."""
    stored = {}
    for name, tensor in tensors.items():
        # A weight beyond float16 becomes infinite: that is what is asked below, not a matter for a warning.
        with np.errstate(over="ignore"):
            stored[name] = tensor.astype(_stored_type(layer.spec.kind, name, precision))
        if not np.isfinite(stored[name]).all():
            raise ExportError(
                f"found weights up to {np.abs(tensor).max():g} in {name} of a {layer.spec.kind}",
                f"numbers that {precision} can hold, at most {np.finfo(precision).max:g}",
                "export in float32",
            )
    return stored


def _stored_type(kind: LayerKind, tensor: str, precision: Precision) -> np.dtype[Any]:
    # A head's bias is a shift of the logits themselves: rounded, it would cost more than all its weights together.
    return np.dtype(np.float32 if kind is LayerKind.HEAD and tensor == "bias" else precision)


def _bare(attribute: onnx.AttributeProto) -> onnx.AttributeProto:
    bare = onnx.AttributeProto()
    bare.CopyFrom(attribute)
    bare.ClearField("doc_string")
    return bare


def _value_info(tensor: Tensor) -> onnx.ValueInfoProto:
    element = onnx.helper.np_dtype_to_tensor_dtype(tensor.data_type)
    return onnx.helper.make_tensor_value_info(tensor.name, element, [BATCH, *(TOKENS if d is None else d for d in tensor.shape)])


# Graphs of layers


def _graph_of(layer: Layer, source: Tensor, settings: ExportSettings) -> _Graph:
    """Returns the graph of a layer of a segment with this input; exported at the first call for its like in this process."""
    spec = layer.spec
    if spec.kind is LayerKind.HEAD:
        spec = LayerSpec.of(spec.kind, **{**spec.config, "classes": _EXAMPLE_CLASSES})
    if spec.kind is LayerKind.PATCH_EMBED:
        return _export_layer(spec, source.shape, settings.opset, settings.precision)
    return _export_layer(spec, None, settings.opset, settings.precision)


@functools.cache
def _export_layer(spec: LayerSpec, image_shape: tuple[int | None, ...] | None, opset: int, precision: Precision) -> _Graph:
    module = _LayerFunction(spec, precision)
    what = {"kind": spec.kind, "config": spec.config, "image_shape": image_shape, "opset": opset, "precision": precision}
    sources = [evolve.adapter, evolve.vit, sys.modules[__name__]]
    model = cached_model(what, sources, lambda: _run_exporter(module, spec, image_shape, opset, precision))
    inputs = [value.name for value in model.graph.input]
    return _Graph(
        nodes=tuple(model.graph.node),
        constants=tuple(model.graph.initializer),
        input=inputs[0],
        weights=dict(zip(module.weight_names, inputs[1:], strict=True)),
        output=model.graph.output[0].name,
    )


def _run_exporter(
    module: _LayerFunction, spec: LayerSpec, image_shape: tuple[int | None, ...] | None, opset: int, precision: Precision
) -> onnx.ModelProto:
    example, free = _example_input(spec, image_shape)
    if example.is_floating_point():
        example = example.to(_TORCH_TYPES[precision])
    program = torch.onnx.export(
        module.eval(),
        (example, module.example_weights),
        dynamo=True,
        dynamic_shapes=(dict.fromkeys(free, torch.export.Dim.DYNAMIC), [None] * len(module.example_weights)),
        opset_version=opset,
        verbose=False,
    )
    if program is None:
        raise ExportError(f"found no graph for {spec}", "one from torch.onnx")
    model: onnx.ModelProto = program.model_proto
    foreign = sorted({node.domain for node in model.graph.node if node.domain} | {f.name for f in model.functions})
    if foreign:
        raise ExportError(f"found operators of {foreign} in the graph of a {spec.kind}", "standard ONNX operators only")
    return model


class _LayerFunction(nn.Module):
    """A layer as a function of its input and its weights."""

    def __init__(self, spec: LayerSpec, precision: Precision) -> None:
        super().__init__()
        self._kind = spec.kind
        self._type = _TORCH_TYPES[precision]
        # In a list, so that its weights do not become this module's own, which torch.onnx would write into the graph.
        self._layer = [build_module(spec, None, fused_attention=False).eval()]
        state = self._layer[0].state_dict()
        self.weight_names = tuple(state)
        self.example_weights = [
            torch.zeros(tensor.shape, dtype=_TORCH_TYPES[_stored_type(spec.kind, name, precision).name])
            for name, tensor in state.items()
        ]

    def forward(self, x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        """Returns what the layer makes of x with these weights, given in the order of `weight_names`."""
        named = dict(zip(self.weight_names, weights, strict=True))
        if self._type is not torch.float32:
            if self._kind is LayerKind.PATCH_EMBED:
                x = scale_image(x).to(self._type)
            elif self._kind is LayerKind.HEAD:
                x = x.float()
                named = {name: weight.float() for name, weight in named.items()}
        result: torch.Tensor = torch.func.functional_call(self._layer[0], named, (x,))
        return result


def _example_input(spec: LayerSpec, image_shape: tuple[int | None, ...] | None) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Returns an input for the exporter and which of its axes are free."""
    if image_shape is not None:
        # Free heights and widths would become constants silently; the position embedding fixes them anyway.
        return torch.zeros([_EXAMPLE_BATCH, *(size or 0 for size in image_shape)], dtype=torch.uint8), (0,)
    width = spec.integer("width")
    if spec.kind is LayerKind.HEAD:
        return torch.zeros(_EXAMPLE_BATCH, width), (0,)
    if spec.kind is LayerKind.POS_EMBED:
        tokens = 1 + spec.integer("grid_height") * spec.integer("grid_width")
        return torch.zeros(_EXAMPLE_BATCH, tokens, width), (0,)
    return torch.zeros(_EXAMPLE_BATCH, _EXAMPLE_TOKENS, width), (0, 1)
