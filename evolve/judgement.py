"""Early judgement: when a child can no longer beat its parent, judged on the intervals it has had.

A child needs more than the parent's score to survive. Its accounted parameters are known when it is planned, so the score is a quality to
beat. After each interval, the best quality it may still reach is taken to be the best it has had plus the largest gain that any child
of the same search, trained to its end in an earlier generation, made from there on. If that does not exceed the quality to beat, the
child stops. Quality never exceeds 1, so a child whose parent answers everything rightly stops after its first interval.

What it rests on is in the plan of the generation and in the child's own curve: the journal alone decides, whoever trains, in
whatever order, and however often a search was killed. Stopped children show no gain to later ones; those that train on do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

MOST = 1.0
"""No quality is greater."""


def quality_to_beat(parent_score: float, factor: float) -> float:
    """Returns the quality above which a child's score exceeds its parent's, 0 to 1; nothing exceeds 1.

    Args:
        parent_score: of the parent, 0 to 1.
        factor: what the child's quality is multiplied by to give its score, 0 to 1.
    """
    return min(MOST, parent_score / factor) if factor > 0 else MOST


def largest_gains(curves: Iterable[Sequence[float]]) -> tuple[float, ...]:
    """Returns for each interval the largest gain that any child made after it: its best quality at last minus its best by then.

    Args:
        curves: qualities after each interval of children that were trained to their end; all of one length.

    Returns:
        One value an interval, 0 to 1; empty if there are no curves: then nothing is known.
    """
    gains = [[max(curve) - best for best in itertools.accumulate(curve, max)] for curve in curves]
    return tuple(max(gain) for gain in zip(*gains, strict=False))


def intervals_until_hopeless(
    qualities: Sequence[float], to_beat: float | None, gains: Sequence[float], num_intervals: int
) -> int | None:
    """Returns after how many intervals a child stops.

    Args:
        qualities: after each interval the child has had so far.
        to_beat: see `quality_to_beat`; None: it survives whatever it reaches, or early judgement is off.
        gains: see `largest_gains`; where it has nothing to say, a child may still reach 1.
        num_intervals: of a whole training; a child is not stopped after its last.

    Returns:
        1 to num_intervals - 1; None if it is to go on, or has come to its end.
    """
    if to_beat is None:
        return None
    for count, best in enumerate(itertools.accumulate(qualities[: num_intervals - 1], max), start=1):
        gain = gains[count - 1] if count <= len(gains) else MOST
        if min(MOST, best + gain) <= to_beat:
            return count
    return None
