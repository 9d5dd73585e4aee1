"""Requests of the Open Inference Protocol, good ones and any others, as plain messages."""

from __future__ import annotations

from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.support.repository import random_images

Request = service_pb2.ModelInferRequest
Stub = service_pb2_grpc.GRPCInferenceServiceStub

IMAGES = random_images(2, 8, seed=2)


def good(task: str = "digits", **fields: Any) -> Any:
    return tensor(IMAGES.shape, raw=IMAGES.tobytes(), model_name=task, **fields)


def tensor(
    shape: Any,
    datatype: str = "UINT8",
    name: str = "image",
    raw: bytes | None = None,
    model_name: str = "digits",
    parameters: dict[str, Any] | None = None,
    **contents: Any,
) -> Any:
    """Returns a request of one input; `contents` are fields of its contents, or of the request if it has such ones."""
    own = {key: contents.pop(key) for key in list(contents) if key in Request.DESCRIPTOR.fields_by_name}
    request = Request(model_name=model_name, **own)
    sent = request.inputs.add(name=name, datatype=datatype, shape=shape)
    if contents:
        sent.contents.CopyFrom(service_pb2.InferTensorContents(**contents))
    for key, value in (parameters or {}).items():
        sent.parameters[key].CopyFrom(value)
    if raw is not None:
        request.raw_input_contents.append(raw)
    return request


def infer(channel: grpc.Channel, request: Any, timeout: float | None = 10) -> tuple[grpc.StatusCode, str]:
    """Returns the status of an inference, and the words that came with it."""
    try:
        Stub(channel).ModelInfer(request, timeout=timeout)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""
