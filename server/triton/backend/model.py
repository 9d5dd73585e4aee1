"""Runs ONNX files within Triton's Python backend, so that a Triton without ONNX Runtime of its own serves the same repository.

Triton starts this file in a process for each instance of each segment, with the Python and numpy of its own environment: nothing of this
package can be imported here. It reads what Triton's backend of the same name reads of a config, as far as segments need it.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

# As munet.runtime says.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton

THREADS_VARIABLE = "MUNET_TRITON_THREADS"
"""Threads of a segment whose config has no `intra_op_thread_count`."""


class TritonPythonModel:
    """One instance of one segment, as Triton's Python backend wants it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the segment's ONNX file.

        Args:
            args: what Triton says of the instance: `model_config` as JSON, `model_repository` (the segment's folder), `model_version`.
        """
        config = json.loads(args["model_config"])
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._outputs = [tensor["name"] for tensor in config["output"]]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = _num_threads(config)
        options.inter_op_num_threads = 1
        # Threads that wait in a busy loop take the time of the other segments' processes.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = (
            pathlib.Path(args["model_repository"]) / args["model_version"] / (config["default_model_filename"] or "model.onnx")
        )
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        for kind, wanted, tensors in (
            ("input", self._inputs, self._session.get_inputs()),
            ("output", self._outputs, self._session.get_outputs()),
        ):
            found = [tensor.name for tensor in tensors]
            if not set(wanted) <= set(found):
                raise triton.TritonModelException(f"{model}: found {kind}s {found}, expected those of config.pbtxt, {wanted}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answers requests that Triton hands over together, as one batch.

        Args:
            requests: one or more, each with a tensor [rows, ...] for every input.

        Returns:
            A response for each request in its order: a tensor [rows, ...] for every output, or an error.
        """
        return self._answer(
            [[triton.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs] for request in requests]
        )

    def _answer(self, feeds: Sequence[Sequence[Any]]) -> list[Any]:
        try:
            tensors = [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*feeds, strict=True)]
            outputs = self._session.run(self._outputs, dict(zip(self._inputs, tensors, strict=True)))
        except Exception as error:
            # One bad request must not harm those that Triton batched with it.
            if len(feeds) > 1:
                return [response for feed in feeds for response in self._answer([feed])]
            return [triton.InferenceResponse(error=triton.TritonError(str(error)))]
        ends = np.cumsum([len(feed[0]) for feed in feeds])[:-1]
        parts = zip(*(np.split(output, ends) for output in outputs), strict=True)
        return [triton.InferenceResponse(output_tensors=list(map(triton.Tensor, self._outputs, tensors))) for tensors in parts]

    def finalize(self) -> None:
        """Frees the session."""
        del self._session


def _num_threads(config: dict[str, Any]) -> int:
    """Returns what the config says, or else what whoever started Triton says, or else 1; 0 means one for each core."""
    parameter = config.get("parameters", {}).get("intra_op_thread_count")
    return int(parameter["string_value"] if parameter else os.environ.get(THREADS_VARIABLE, "1"))
