"""What is measured side by side within one process: the embedded engine and whole ONNX models, on the same images."""

from __future__ import annotations

import contextlib
import io
import itertools
import pathlib
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks.published import Published
from benchmarks.reporting import Ratio, seconds_of
from benchmarks.serve.workbench import Effort
from munet.runtime import onnxruntime
from server.config import EngineSettings
from server.embedded.engine import EmbeddedEngine
from server.engine import Question
from server.generation import Generation
from server.repository import Repository

Pixels = npt.NDArray[np.uint8]
Logits = npt.NDArray[np.float32]


@contextlib.contextmanager
def loaded_engine(models: Published, threads: int = 1, workers: int = 0) -> Iterator[tuple[EmbeddedEngine, Generation]]:
    """Gives the embedded engine with the current generation loaded; 0 workers are as many as it has by default."""
    engine = EmbeddedEngine(EngineSettings(threads=threads, workers=workers))
    generation = Repository(models.repository).read()
    engine.load(generation)
    try:
        yield engine, generation
    finally:
        engine.close()


@contextlib.contextmanager
def engine_of(models: Published, threads: int = 1, workers: int = 0) -> Iterator[Callable[[Pixels, tuple[str, ...]], Any]]:
    """Gives the embedded engine as a function of images and tasks."""
    with loaded_engine(models, threads, workers) as (engine, generation):
        yield lambda images, tasks: engine.answer(Question(generation, images, tasks)).result()


def whole_model(file: pathlib.Path, threads: int) -> Callable[[Pixels], Any]:
    """Returns a whole model as a function of images, with ONNX Runtime's own settings but for the threads."""
    options = onnxruntime.SessionOptions()
    if threads == 1:
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
    else:
        # The pool that the engine has set up for this process.
        options.use_per_session_threads = False
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {session.get_inputs()[0].name: images})[0]


def random_images(models: Published, count: int = 1) -> Pixels:
    """Returns images, [count, size, size, 3]."""
    size = models.image_size
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def smooth_image(size: int, seed: int = 0) -> Pixels:
    """Returns an image with about as much detail as a photograph, [size, size, 3]."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    noise = random.normal(0, 4, (size, size, 3))
    return np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)


def to_jpeg(pixels: Pixels) -> bytes:
    """Returns an image as a JPEG file of the usual quality."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def check_equal(found: Logits, expected: Logits) -> None:
    """Checks, before anything is timed, that both sides compute the same.

    Raises:
        RuntimeError: they do not.
    """
    difference = float(np.abs(found - expected).max())
    if not difference <= 1e-4:
        raise RuntimeError(f"found answers that differ by {difference:g}, expected the same within 1e-4 from both sides")


def in_turns(first: Callable[[], float], second: Callable[[], float], repetitions: int) -> Ratio:
    """Measures both as often, each first as often as the other."""
    above, below = [], []
    for repetition in range(repetitions):
        if repetition % 2:
            below.append(second())
            above.append(first())
        else:
            above.append(first())
            below.append(second())
    return Ratio(above, below)


def medians_in_turns(sides: Mapping[str, Callable[[], Any]], effort: Effort) -> dict[str, list[float]]:
    """Returns the median seconds of each side in each repetition; within one, sides take turns in every order."""
    medians: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(effort.repetitions):
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for order in itertools.islice(itertools.cycle(itertools.permutations(sides)), effort.calls):
            for name in order:
                taken[name].append(seconds_of(sides[name]))
        for name, values in taken.items():
            medians[name].append(statistics.median(values))
    return medians
