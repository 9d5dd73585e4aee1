"""A whole model as MLServer runs it. Copied beside the models and imported by MLServer, in an environment without this project."""

from __future__ import annotations

import io

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from PIL import Image


class WholeModel(MLModel):
    """An ONNX file, one thread; takes image files (BYTES) or pixels (UINT8, [images, size, size, 3])."""

    async def load(self) -> bool:
        """Loads the file that the settings name."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(self.settings.parameters.uri, options, providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0]
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answers with logits."""
        (sent,) = payload.inputs
        are_files = sent.datatype == "BYTES"
        images = np.stack(list(map(self._decode, sent.data.root))) if are_files else NumpyCodec.decode_input(sent)
        (logits,) = self._session.run(["logits"], {self._input.name: images})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("logits", logits)])

    def _decode(self, file: bytes) -> np.ndarray:
        height, width = self._input.shape[1:3]
        with Image.open(io.BytesIO(file)) as image:
            rgb = image.convert("RGB")
            if rgb.size != (width, height):
                rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
            return np.asarray(rgb)
