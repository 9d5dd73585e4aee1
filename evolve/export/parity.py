"""Checks of exported routes against torch, on real images. The rules are those of `munet.parity`."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evolve.errors import ExportError
from evolve.export.settings import Precision
from munet.parity import FLOAT32_TOLERANCE, Logits, find_disagreement, gaps, tolerance_of
from munet.preprocessing import Pixels
from munet.runtime import onnxruntime

NUM_TOP1_IMAGES = 1000
"""Images on which the best classes of a float16 route are compared with torch's: the fewest on which 99.9 % can be told from 100 %."""

LEAST_TOP1_AGREEMENT = 0.999

TIE = 2 * FLOAT32_TOLERANCE
"""A best class that leads by no more is a tie already in float32: two float32 computations may differ about it."""

RESOLUTION = 2.0**-10
"""Float16 cannot tell numbers apart that differ by less than this share of their size."""

MOST_TURNED = 0.01
"""Of all images, near ties that float16 turns round."""

_MOST_THREADS = 8

_REFUSALS = tuple(
    value
    for value in vars(onnxruntime.capi.onnxruntime_pybind11_state).values()
    if isinstance(value, type) and issubclass(value, Exception)
)
"""ONNX Runtime's errors have no common base."""


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

    def check(
        self,
        task: str,
        route: Sequence[str],
        images: Pixels,
        expected: Logits,
        batch_sizes: Sequence[int],
        precision: Precision = "float32",
    ) -> None:
        """Checks a route at several batch sizes.

        Args:
            task: for the message.
            route: names of its segments.
            images: [images, size, size, 3] uint8.
            expected: [images, classes] float32, by torch.
            batch_sizes: the first so many images at a time, each at most all of them.
            precision: of the route; decides the tolerance.

        Raises:
            ExportError: logits of another shape, further from torch's than the tolerance, or with another best class than torch's.
        """
        tolerance = tolerance_of(precision, expected)
        for batch_size in batch_sizes:
            disagreement = find_disagreement(self.run(route, images[:batch_size]), expected[:batch_size], tolerance)
            if disagreement is not None:
                found, wanted = disagreement
                raise ExportError(
                    f"found {found} between torch and the exported {precision} route of task {task!r} "
                    f"(batch of {batch_size}, segments {' '.join(route)})",
                    wanted,
                    "nothing was published",
                )

    def check_best_classes(self, task: str, route: Sequence[str], images: Pixels, expected: Logits, batch_size: int) -> str:
        """Checks that a float16 route puts the same class first as torch on at least 99.9 % of some images.

        Two kinds of images do not count towards that. Where the first two classes are a tie in float32, there is no best class. Where the
        best leads by less than float16 can tell at the size of these logits, it is a near tie: those that float16 turns round are
        counted apart, and are at most 1 % of all images.

        Args:
            task: for messages.
            route: names of its segments.
            images: [images, size, size, 3] uint8.
            expected: [images, classes] float32, by torch.
            batch_size: images in one batch.

        Returns:
            What was found, in words.

        Raises:
            ExportError: fewer agree, or a logit is no number.
        """
        starts = range(0, len(images), batch_size)
        found = np.concatenate([self.run(route, images[start : start + batch_size]) for start in starts])
        lead = gaps(expected)
        tie = lead <= TIE
        near_tie = ~tie & (lead <= RESOLUTION * np.ptp(expected, axis=1) / 2)
        decided = ~tie & ~near_tie
        differing = found.argmax(axis=1) != expected.argmax(axis=1)
        num_decided, num_differing = int(decided.sum()), int((decided & differing).sum())
        num_turned = int((near_tie & differing).sum())
        words = (
            f"{num_decided - num_differing} of {num_decided} best classes are torch's, {num_turned} of {int(near_tie.sum())} near ties "
            f"are not, {int(tie.sum())} are ties"
        )
        if (
            num_differing > (1 - LEAST_TOP1_AGREEMENT) * num_decided
            or num_turned > MOST_TURNED * len(images)
            or not np.isfinite(found).all()
        ):
            raise ExportError(
                f"found that on the float16 route of task {task!r} {words}; where they differ, torch's class leads by up to "
                f"{lead[differing].max(initial=0.0):.3g}",
                f"at least {LEAST_TOP1_AGREEMENT:.1%}, at most {MOST_TURNED:.0%} of all images turned near ties, and numbers only",
                "nothing was published; export in float32",
            )
        return words

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
    """Returns so many images: the given ones, then copies of them that are shifted, some mirrored, and of another contrast.

    Args:
        images: [images, size, size, 3] uint8, at least one.
        count: how many to return.
    """
    copies = [images]
    while sum(map(len, copies)) < count:
        draw = np.random.default_rng(len(copies))
        shifted = np.roll(images, draw.integers(0, images.shape[1:3]), axis=(1, 2))
        mirrored = shifted[:, :, ::-1] if draw.integers(2) else shifted
        contrast, centre = draw.uniform(0.5, 1.0), draw.uniform(64, 192)
        copies.append(((mirrored - centre) * contrast + centre).clip(0, 255).astype(np.uint8))
    return np.ascontiguousarray(np.concatenate(copies)[:count])
