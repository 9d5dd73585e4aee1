"""Requests and answers of the Open Inference Protocol, which several servers speak."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2

from benchmarks.serve.sides import Logits, Pixels


def pixels_request(model: str, images: Pixels) -> service_pb2.ModelInferRequest:
    """Returns a request for some images, [images, size, size, 3]."""
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[images.tobytes()])
    request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
    return request


def file_request(model: str, file: bytes) -> service_pb2.ModelInferRequest:
    """Returns a request for one image file."""
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=[struct.pack("<I", len(file)) + file])
    request.inputs.add(name="image", datatype="BYTES", shape=[1])
    return request


def only_logits(request: service_pb2.ModelInferRequest) -> service_pb2.ModelInferRequest:
    """Has a request ask for nothing but logits."""
    request.outputs.add(name="logits")
    return request


def logits_of(answer: Any) -> Logits:
    """Returns the logits that an answer holds, flat; servers may give other outputs beside them."""
    index = [output.name for output in answer.outputs].index("logits")
    return np.frombuffer(answer.raw_output_contents[index], np.float32)
