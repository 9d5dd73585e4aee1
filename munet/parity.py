"""When logits that were computed twice agree: the rules that a publisher and every server apply alike. See docs/decisions/0006.

Float16 errors grow with the logits, because everything before the head is rounded to a share of its size. What softmax sees, and what an
error has to be small against, is the distance between a row's logits, not their size: a shift that all classes have in common changes
nothing. So a float16 route may differ by `FLOAT16_TOLERANCE`, and by `FLOAT16_SHARE` of half the widest row where that is more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

FLOAT32_TOLERANCE = 1e-4
"""Greatest absolute difference between two float32 computations of the same logits."""

FLOAT16_TOLERANCE = 2e-2
"""Greatest absolute difference of a float16 route whose logits lie within two of their middle."""

FLOAT16_SHARE = 1e-2
"""The same as a share of half the distance between a row's highest and lowest logit, where that is more."""

Logits = npt.NDArray[np.float32]


def tolerance_of(precision: str, expected: Logits) -> float:
    """Returns the greatest absolute difference that a route's logits may show.

    Args:
        precision: `float16` if anything along the route is, else `float32`.
        expected: [images, classes] float32, by torch.
    """
    if precision != "float16":
        return FLOAT32_TOLERANCE
    widest = float(np.ptp(expected, axis=1).max(initial=0.0))
    return max(FLOAT16_TOLERANCE, FLOAT16_SHARE * widest / 2)


def gaps(logits: Logits) -> Logits:
    """Returns by how much each row's best class leads, [images] float32; infinite with a single class."""
    if logits.shape[1] < 2:
        return np.full(len(logits), np.inf, dtype=np.float32)
    two_best = np.partition(logits, -2, axis=1)[:, -2:]
    lead: Logits = two_best[:, 1] - two_best[:, 0]
    return lead


def find_disagreement(found: npt.NDArray[Any], expected: Logits, tolerance: float) -> tuple[str, str] | None:
    """Compares logits: each within the tolerance, and the same best class wherever its lead is more than the tolerance.

    (Where it leads by no more, either class may come first within the tolerance: such a row says nothing.)

    Args:
        found: [images, classes].
        expected: [images, classes] float32.
        tolerance: greatest absolute difference.

    Returns:
        None if they agree, else what was found and what was expected, in words.
    """
    if found.shape != expected.shape:
        return f"logits {list(found.shape)}", f"logits {list(expected.shape)}"
    difference = float(np.abs(found - expected).max(initial=0.0))
    # Written so that a difference that is no number is a disagreement too.
    if not difference <= tolerance:
        return f"a difference of {difference:.3g}", f"at most {tolerance:.3g}"
    best, wanted = found.argmax(axis=1), expected.argmax(axis=1)
    swapped = np.flatnonzero((best != wanted) & (gaps(expected) > tolerance))
    if len(swapped):
        row = swapped[0]
        return f"class {best[row]} first on image {row}", f"class {wanted[row]}, which leads by {gaps(expected)[row]:.3g}"
    return None
