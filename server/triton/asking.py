"""Asking a Triton and waiting, for rehearsals and probes: nothing of it counts."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from server.engine import Logits
from server.errors import ModelFailedError
from server.generation import ANY, Segment
from server.questions import Branch, RouteTree
from server.triton.counters import Counters
from server.triton.endpoint import Endpoint, Images, to_request
from server.triton.plans import Plan

_NUM_TOKENS = 2
"""Of a row of noise, where any number goes: not 1, which exporters like to treat as a case of its own."""


def ask(endpoint: Endpoint, counters: Counters, plan: Plan, images: Images, timeout_seconds: float) -> Logits:
    """Asks and waits.

    Args:
        endpoint: whom.
        counters: where it is noted as not to be counted.
        plan: what.
        images: [images, size, size, 3] uint8.
        timeout_seconds: of each request; as many images go into one as the plan allows.

    Raises:
        EndpointError: it did not work.
    """
    step = max(1, plan.max_rows - 1)
    parts = []
    for start in range(0, len(images), step):
        part = images[start : start + step]
        # With a row that nobody has asked about no cache answers, so that it is known what ran, and that it ran.
        rows = np.concatenate([part, _unseen(part)])[: plan.max_rows]
        try:
            logits = endpoint.ask(to_request(plan.ensemble, rows, plan.outputs.values()), timeout_seconds)
        except ModelFailedError:
            # A stranger's row may have run in the same batch: once more, alone.
            rows = filled_up(rows, plan.max_rows)
            logits = endpoint.ask(to_request(plan.ensemble, rows, plan.outputs.values()), timeout_seconds)
        counters.answered(plan.tree, len(rows), len(rows))
        parts.append({output: values[: len(part)] for output, values in logits.items()})
    return {name: np.concatenate([part[output] for part in parts]) for name, output in plan.outputs.items()}


def _unseen(images: Images) -> Images:
    """Returns the first image with a last pixel of a colour at random, [1, size, size, 3]."""
    image = images[:1].copy()
    image[0, -1, -1] = np.frombuffer(secrets.token_bytes(3), dtype=np.uint8)
    return image


def ask_segment(endpoint: Endpoint, counters: Counters, segment: Segment, timeout_seconds: float) -> None:
    """Has a segment run a row of noise, without the others of any route: nobody has asked about it, so no cache answers.

    Args:
        endpoint: whom to ask.
        counters: where it is noted as not to be counted.
        segment: which.
        timeout_seconds: what it may take.

    Raises:
        EndpointError: it did not work.
    """
    row = noise(segment.input.shape, segment.input.data_type)
    endpoint.ask(to_request(segment.name, row, [segment.output.name], segment.input.name), timeout_seconds)
    branch = Branch(segment.name)
    counters.answered(RouteTree((branch,), (branch,)), 1, 1)


def noise(shape: Iterable[int], data_type: str) -> npt.NDArray[Any]:
    """Returns a row that nobody has asked about, [1, ...].

    Args:
        shape: without the batch; `ANY` where any number goes.
        data_type: `uint8`, `float32` or `float16`.
    """
    sizes = [1, *(_NUM_TOKENS if size == ANY else size for size in shape)]
    return np.random.default_rng().integers(0, 2, sizes).astype(data_type)


def filled_up(images: Images, num_rows: int) -> Images:
    """Returns so many images, the given ones over and over: a full batch is joined by nobody else's rows.

    Args:
        images: [images, size, size, 3], at least one.
        num_rows: how many to return.
    """
    return images[np.arange(num_rows) % len(images)]
