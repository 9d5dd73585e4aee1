"""What a container of Triton takes, as far as a repository has to suit it. deploy/triton runs the one that is named here.

Sources: issue 8848 of github.com/triton-inference-server/server names the container's ONNX Runtime. What that takes was measured with the
wheel of the same version: a model of one Relu, stamped with ever newer versions, until it was refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from google.protobuf.message import DecodeError

from server.errors import Finding
from server.generation import Generation

CONTAINER = "nvcr.io/nvidia/tritonserver:26.05-py3"
"""The oldest that a repository must suit; newer ones take all that it takes."""

ONNX_RUNTIME = "1.24.4"

MAX_OPSET = 25
MAX_IR_VERSION = 13

_DEFAULT_DOMAINS = ("", "ai.onnx")


def check_versions(generation: Generation) -> Iterator[Finding]:
    """Finds the segments that the container's ONNX Runtime would refuse, whatever the server's own takes.

    Segments that cannot be read are passed over: others say so.
    """
    for name, segment in generation.segments.items():
        try:
            model = onnx.load(segment.model, load_external_data=False)
        except (OSError, DecodeError):
            continue
        opset = max((one.version for one in model.opset_import if one.domain in _DEFAULT_DOMAINS), default=0)
        for what, found, most in (("opset", opset, MAX_OPSET), ("IR version", model.ir_version, MAX_IR_VERSION)):
            if found > most:
                expected = f"at most {most}, for ONNX Runtime {ONNX_RUNTIME} in {CONTAINER}"
                advice = "export it for an older ONNX Runtime, or serve it with muNet's own engine only"
                yield Finding(f"segment {name!r}: {what}", str(found), expected, advice)
