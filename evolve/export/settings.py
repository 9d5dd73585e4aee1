"""What an export is made with. Part of every segment's name, so a change of anything here makes new segments beside the old ones."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from typing import Literal

Target = Literal["cpu", "gpu"]
"""Where Triton is to run the segments."""

Precision = Literal["float32", "float16"]
"""Of weights and hidden states."""

EXPORTER_NUMBER = 1
"""Raised by every change of evolve.export that changes a byte of what a segment's folder holds."""

_TOOLS = ("torch", "onnxscript", "onnx-ir", "onnx")


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """How segments are exported.

    Attributes:
        target: where Triton is to run them.
        precision: of weights and hidden states. Images stay uint8 and logits float32.
        max_batch_size: most rows of one execution.
        opset: version of the ONNX operators; 20 is what ONNX Runtime 1.27 and today's Triton containers all know.
        ir_version: version of the ONNX file format, for the same reason.
        response_cache: whether a Triton that has a cache may keep what the segments answer that take the image. It never asks whether they
            changed; as their names are of content, they never do. Ensembles and aliases are not kept.
    """

    target: Target = "cpu"
    precision: Precision = "float32"
    max_batch_size: int = 32
    opset: int = 20
    ir_version: int = 10
    response_cache: bool = False


@functools.cache
def exporter_version() -> str:
    """Returns the exporter's own number and the versions of the tools that write the bytes, without their build tags."""
    tools = (f"{tool} {importlib.metadata.version(tool).partition('+')[0]}" for tool in _TOOLS)
    return ", ".join([f"munet export {EXPORTER_NUMBER}", *tools])
