from __future__ import annotations

import numpy as np
import pytest

from munet.parity import find_disagreement, gaps, tolerance_of


def logits(*rows: tuple[float, ...]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def test_float32_has_one_tolerance() -> None:
    assert tolerance_of("float32", logits((0, 1))) == tolerance_of("float32", logits((-300, 300))) == 1e-4


def test_float16_grows_with_the_distance_between_logits_and_not_with_their_size() -> None:
    assert tolerance_of("float16", logits((0.0, 1.0), (-2.0, 2.0))) == 2e-2
    assert tolerance_of("float16", logits((-30.0, 30.0))) == pytest.approx(0.3)
    # All logits near 30, one apart: a tolerance made from their size would let another best class through.
    assert tolerance_of("float16", logits((30.0, 31.0))) == 2e-2
    assert tolerance_of("float16", np.zeros((0, 3), dtype=np.float32)) == 2e-2
    assert tolerance_of("float16", logits((5.0,))) == 2e-2


def test_large_logits_pass_with_the_errors_of_float16_and_fail_with_those_of_a_fault() -> None:
    # The greatest error that 1,797 real images showed was 0.32 % of half the widest row, see decision 6.
    expected = np.random.default_rng(0).uniform(-30, 30, (50, 10)).astype(np.float32)
    tolerance = tolerance_of("float16", expected)
    noise = np.random.default_rng(1).uniform(-1, 1, expected.shape).astype(np.float32)
    assert find_disagreement(expected + 0.0036 * 30 * noise, expected, tolerance) is None
    assert find_disagreement(expected + 0.02 * 30 * noise, expected, tolerance) is not None


def test_what_is_no_number_never_agrees() -> None:
    expected = logits((0.0, 1.0))
    for broken in (np.nan, np.inf, -np.inf):
        assert find_disagreement(logits((0.0, broken)), expected, 1e9) is not None
        assert find_disagreement(expected, logits((0.0, broken)), 1.0) is not None


def test_another_shape_never_agrees() -> None:
    assert find_disagreement(logits((0, 1, 2)), logits((0, 1)), 9.0) == ("logits [1, 3]", "logits [1, 2]")


def test_the_best_class_must_stay_unless_its_lead_is_within_the_tolerance() -> None:
    expected = logits((0.0, 1.0), (0.5, 0.53))
    swapped_tie = logits((0.0, 1.0), (0.53, 0.50))
    assert find_disagreement(swapped_tie, expected, 0.031) is None
    assert find_disagreement(logits((0.0, 1.0), (0.516, 0.514)), expected, 0.02) == (
        "class 0 first on image 1",
        "class 1, which leads by 0.03",
    )


def test_the_lead_of_the_best_class() -> None:
    np.testing.assert_allclose(gaps(logits((3, 1, 2), (1, 1, 0))), [1, 0])
    assert gaps(logits((3,), (4,))).tolist() == [np.inf, np.inf]
