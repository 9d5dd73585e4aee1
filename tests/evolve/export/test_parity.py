from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
import pytest

from evolve.errors import ExportError
from evolve.export.parity import Routes
from munet.preprocessing import Pixels

IMAGES = np.zeros((1000, 2, 2, 3), dtype=np.uint8)


class FixedRoutes(Routes):
    """Answers with the next rows of some logits, whatever the images."""

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__(lambda name: pathlib.Path(name))
        self._rest = logits

    def run(self, route: Sequence[str], images: Pixels) -> np.ndarray:
        answer, self._rest = self._rest[: len(images)], self._rest[len(images) :]
        return answer


def clear_logits() -> np.ndarray:
    """Rows whose first class leads by 1, 1.001, 1.002 and so on."""
    logits = np.zeros((len(IMAGES), 3), dtype=np.float32)
    logits[:, 0] = 1 + np.arange(len(IMAGES)) / 1000
    return logits


def check(found: np.ndarray, expected: np.ndarray) -> str:
    return FixedRoutes(found).check_best_classes("pets", ["seg-a"], IMAGES, expected, 32)


def test_one_of_a_thousand_may_differ_and_two_may_not() -> None:
    expected = clear_logits()
    assert check(expected, expected) == "1000 of 1000 best classes are torch's, 0 of 0 near ties are not, 0 are ties"
    found = expected.copy()
    found[7, 1] = 9.0
    assert check(found, expected).startswith("999 of 1000")
    found[500, 2] = 9.0
    with pytest.raises(ExportError, match=r"998 of 1000 best classes.*leads by up to 1\.5; expected at least 99\.9%"):
        check(found, expected)


def test_ties_of_float32_are_left_out_and_small_leads_are_not() -> None:
    expected = clear_logits()
    expected[:100] = 0.0
    expected[:100, 1] = 1e-4
    found = expected.copy()
    found[:100, 2] = 0.5
    assert check(found, expected) == "900 of 900 best classes are torch's, 0 of 0 near ties are not, 100 are ties"
    # Torch knows these, if by little, and float16 turns them round: 0.3 % other answers are 0.3 % other answers.
    expected[:3, 1] = found[:3, 1] = 1e-3
    with pytest.raises(ExportError, match="900 of 903"):
        check(found, expected)


def test_near_ties_are_counted_apart_and_bounded() -> None:
    # Logits of plus and minus ten, which float16 keeps to about a hundredth: a lead of 0.005 is within it.
    expected = np.zeros((len(IMAGES), 3), dtype=np.float32)
    expected[:] = (-10, 10, 5)
    expected[:50, 2] = 9.995
    found = expected.copy()
    found[:10, 2] = 10.003
    assert check(found, expected) == "950 of 950 best classes are torch's, 10 of 50 near ties are not, 0 are ties"
    found[10, 2] = 10.003
    with pytest.raises(ExportError, match="11 of 50 near ties are not"):
        check(found, expected)


def test_what_is_no_number_is_refused_even_where_nothing_is_decided() -> None:
    tied = np.zeros((len(IMAGES), 3), dtype=np.float32)
    assert check(tied, tied) == "0 of 0 best classes are torch's, 0 of 0 near ties are not, 1000 are ties"
    found = tied.copy()
    found[3] = np.nan
    with pytest.raises(ExportError, match="numbers only"):
        check(found, tied)


def test_large_logits_are_measured_by_their_distance() -> None:
    expected = clear_logits()[:32] * 30
    noise = np.random.default_rng(0).uniform(-1, 1, expected.shape).astype(np.float32)
    FixedRoutes(expected + 0.1 * noise).check("pets", ["seg-a"], IMAGES[:32], expected, (32,), "float16")
    with pytest.raises(ExportError, match="found a difference of .* between torch and the exported float16 route of task 'pets'"):
        FixedRoutes(expected + 0.3 * noise).check("pets", ["seg-a"], IMAGES[:32], expected, (32,), "float16")
    with pytest.raises(ExportError, match="float32 route"):
        FixedRoutes(expected + 0.1 * noise).check("pets", ["seg-a"], IMAGES[:32], expected, (32,))
