"""Checks of exported routes against torch, on real images."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from evolve.errors import ExportError
from munet.preprocessing import Pixels

TOLERANCE = 1e-4
"""Greatest absolute difference between float32 logits of a route and of torch."""

_MOST_THREADS = 8

_REFUSALS = tuple(
    value
    for value in vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
    if isinstance(value, type) and issubclass(value, Exception)
)
"""ONNX Runtime's errors have no common base."""

Logits = npt.NDArray[np.float32]


class Routes:
    """Runs routes with ONNX Runtime on the CPU. Each segment is loaded once and stays."""

    def __init__(self, model_file: Callable[[str], pathlib.Path]) -> None:
        """Takes the function that gives a segment's ONNX file by its name."""
        self._model_file = model_file
        self._sessions: dict[str, Any] = {}

    def run(self, route: Sequence[str], images: Pixels) -> Logits:
        """Returns a route's logits, [images, classes] float32, all images in one batch.

        Raises:
            ExportError: ONNX Runtime refuses a segment or what goes into it.
        """
        values: Any = images
        for name in route:
            try:
                session = self._session(name)
                values = session.run(None, {session.get_inputs()[0].name: values})[0]
            except _REFUSALS as error:
                raise ExportError(f"ONNX Runtime refused segment {name} ({error})", "a model that runs") from error
        logits: Logits = values
        return logits

    def check(self, task: str, route: Sequence[str], images: Pixels, expected: Logits, batch_sizes: Sequence[int]) -> None:
        """Checks a route at several batch sizes.

        Args:
            task: for the message.
            route: names of its segments.
            images: [images, size, size, 3] uint8.
            expected: [images, classes] float32, by torch.
            batch_sizes: the first so many images at a time, each at most all of them.

        Raises:
            ExportError: logits of another shape, or further from torch's than the tolerance.
        """
        for batch_size in batch_sizes:
            found = self.run(route, images[:batch_size])
            wanted = expected[:batch_size]
            if found.shape != wanted.shape:
                raise ExportError(f"found logits {list(found.shape)} on the route of task {task!r}", f"{list(wanted.shape)}")
            difference = float(np.abs(found - wanted).max())
            # Written so that a difference that is no number fails too.
            if not difference <= TOLERANCE:
                raise ExportError(
                    f"found logits that differ from torch's by {difference:g} on the exported route of task {task!r} "
                    f"(batch of {batch_size}, segments {' '.join(route)})",
                    f"at most {TOLERANCE:g}",
                    "nothing was published",
                )

    def _session(self, name: str) -> Any:
        if name not in self._sessions:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = min(os.cpu_count() or 1, _MOST_THREADS)
            # Many sessions, one running at a time: the others' threads must not spin.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            self._sessions[name] = onnxruntime.InferenceSession(
                self._model_file(name), options, providers=["CPUExecutionProvider"]
            )
        return self._sessions[name]


def varied(images: Pixels, count: int) -> Pixels:
    """Returns so many images: the given ones, then mirrored and shifted copies of them.

    Args:
        images: [images, size, size, 3] uint8, at least one.
        count: how many to return.
    """
    size = images.shape[2]
    copies = [images]
    while sum(map(len, copies)) < count:
        shifted = np.roll(images, len(copies) * max(1, size // 8), axis=2)
        copies.append(shifted[:, :, ::-1] if len(copies) % 2 else shifted)
    return np.ascontiguousarray(np.concatenate(copies)[:count])
