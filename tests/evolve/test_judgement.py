"""The rule of early judgement, by hand and for any curves."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve.judgement import intervals_until_hopeless, largest_gains, quality_to_beat

QUALITIES = st.floats(0, 1)
CURVES = st.lists(st.lists(QUALITIES, min_size=4, max_size=4), max_size=5)


def test_gains_are_from_the_best_by_then_to_the_best_at_last():
    assert largest_gains([[0.5, 0.25, 0.75]]) == (0.25, 0.25, 0.0)
    assert largest_gains([[0.5, 0.25, 0.75], [0.0, 0.5, 0.5]]) == (0.5, 0.25, 0.0)
    assert largest_gains([]) == ()


@pytest.mark.parametrize(
    ("qualities", "to_beat", "expected"),
    [
        ([0.25, 0.25, 0.25], 0.75, 1),  # 0.25 + 0.5 does not exceed it
        ([0.25, 0.25, 0.25], 0.7, 2),  # after two, 0.25 + 0.25
        ([0.375, 0.0, 0.0], 0.625, 2),  # the best so far counts, not the last
        ([0.5, 0.5, 0.5], 0.7, None),
        ([0.0, 0.0, 0.0], None, None),
        ([], 0.9, None),
    ],
)
def test_a_child_stops_when_no_gain_seen_yet_would_do(qualities, to_beat, expected):
    assert intervals_until_hopeless(qualities, to_beat, (0.5, 0.25, 0.0), 3) == expected


def test_a_whole_training_is_no_early_stop():
    assert intervals_until_hopeless([0.0, 0.0, 0.0], 0.1, (1.0, 1.0, 0.0), 3) is None
    assert intervals_until_hopeless([0.0], 0.1, (0.0,), 1) is None


def test_without_a_finished_child_nobody_stops_unless_nothing_could_be_better():
    assert intervals_until_hopeless([0.0, 0.0], 0.99, (), 3) is None
    assert intervals_until_hopeless([0.0, 0.0], 1.0, (), 3) == 1


@given(CURVES, st.lists(QUALITIES, min_size=4, max_size=4), QUALITIES)
def test_a_child_that_gains_no_more_than_others_did_is_never_stopped_wrongly(curves, curve, to_beat):
    gains = largest_gains([*curves, curve])
    if intervals_until_hopeless(curve, to_beat, gains, 4) is not None:
        # Adding rounds: a gain that was taken as a difference need not lead back to the very same number.
        assert max(curve) <= to_beat + 1e-12


@given(CURVES, st.lists(QUALITIES, min_size=4, max_size=4), QUALITIES)
def test_judging_as_one_goes_stops_where_judging_afterwards_says(curves, curve, to_beat):
    gains = largest_gains(curves)
    whole = intervals_until_hopeless(curve, to_beat, gains, 4)
    first = next((n for n in range(1, 5) if intervals_until_hopeless(curve[:n], to_beat, gains, 4) is not None), None)
    assert first == whole


@given(QUALITIES, st.floats(1e-9, 1), QUALITIES)
def test_who_does_not_exceed_the_quality_to_beat_does_not_exceed_the_parents_score(parent_score, factor, quality):
    if quality <= quality_to_beat(parent_score, factor):
        assert quality * factor <= parent_score * (1 + 1e-12)


def test_a_quality_to_beat_is_always_a_number_that_json_knows():
    assert quality_to_beat(0.5, 0.0) == 1.0
    assert quality_to_beat(0.5, 1e-300) == 1.0
    assert quality_to_beat(0.0, 0.5) == 0.0
    assert math.isfinite(quality_to_beat(1.0, 5e-324))
