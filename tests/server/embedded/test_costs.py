from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies as st

from server.embedded.costs import HALF_LIFE_SECONDS, HARDLY_CHEAPER, MOST_SURPRISE, Costs, Kind
from server.questions import Branch, RouteTree

KIND = Kind("seg-a", 224)
SECONDS = st.floats(1e-5, 10)
BATCHES = st.lists(st.tuples(st.integers(1, 64), SECONDS), min_size=1, max_size=40)


def learnt(batches: list[tuple[int, float]], kind: Kind = KIND) -> Costs:
    costs = Costs()
    for rows, seconds in batches:
        costs.observe(kind, rows, seconds, 0.0)
    return costs


def test_what_has_not_been_seen_costs_nothing_but_counts() -> None:
    costs = learnt([(1, 1.0)], Kind("seg-b", 224))
    assert costs.batch_seconds(KIND, 8, 0.0) == costs.row_seconds(KIND, 0.0) == 0.0
    assert costs.batch_seconds(Kind("seg-b", 32), 8, 0.0) == 0.0
    assert costs.share_seconds(KIND) > 0


@hypothesis.given(st.floats(0, 1), st.floats(1e-4, 1), st.lists(st.integers(1, 32), min_size=1, max_size=6))
def test_a_line_is_found(fixed: float, per_row: float, sizes: list[int]) -> None:
    """Where one size was seen, at that."""
    costs = learnt([(rows, fixed + per_row * rows) for rows in sizes * 30])
    for rows in sizes:
        assert costs.batch_seconds(KIND, rows, 0.0) == pytest.approx(fixed + per_row * rows, rel=1e-2)


@hypothesis.given(BATCHES, st.integers(1, 64), st.integers(1, 64))
def test_predictions_are_sane_whatever_was_seen(batches: list[tuple[int, float]], rows: int, more: int) -> None:
    costs = learnt(batches)
    few, many = costs.batch_seconds(KIND, rows, 0.0), costs.batch_seconds(KIND, rows + more, 0.0)
    assert 0 <= few <= many
    each = [seconds / rows for rows, seconds in batches]
    assert costs.row_seconds(KIND, 0.0) <= max(each) * 1.001
    assert costs.share_seconds(KIND) > 0


@hypothesis.given(BATCHES, st.floats(1e-3, 1e-1))
def test_a_wrong_estimate_recovers(batches: list[tuple[int, float]], truth: float) -> None:
    """With every batch that runs; and while none runs, with time alone."""
    costs = learnt(batches)
    before = costs.batch_seconds(KIND, 4, 0.0)
    assert costs.batch_seconds(KIND, 4, 20 * HALF_LIFE_SECONDS) <= before * 1e-5
    for _ in range(600):
        costs.observe(KIND, 4, 4 * truth, 0.0)
    assert costs.batch_seconds(KIND, 4, 0.0) == pytest.approx(4 * truth, rel=0.05)


def test_a_machine_that_stood_still_for_a_moment_changes_little() -> None:
    costs = learnt([(1, 0.01)] * 50)
    costs.observe(KIND, 1, 60.0, 0.0)
    assert costs.batch_seconds(KIND, 1, 0.0) < MOST_SURPRISE * 0.01


@hypothesis.given(st.floats(0, 1), st.floats(1e-4, 1), st.integers(2, 64))
def test_enough_rows_are_as_few_as_hardly_cost_more(fixed: float, per_row: float, most: int) -> None:
    assert learnt([(most, fixed + per_row * most)] * 30).enough_rows(KIND, most) == most
    costs = learnt([(rows, fixed + per_row * rows) for rows in (1, 2, most)] * 10)
    enough = costs.enough_rows(KIND, most)
    assert 1 <= enough <= most
    cheapest = fixed / most + per_row
    assert fixed / enough + per_row <= HARDLY_CHEAPER * 1.01 * cheapest
    if enough > 1:
        assert fixed / (enough - 1) + per_row >= HARDLY_CHEAPER * 0.99 * cheapest


def test_a_question_is_predicted_by_its_routes() -> None:
    trunk, left, right = Branch("trunk"), Branch("left"), Branch("right")
    trunk.children = {"left": left, "right": right}
    tree = RouteTree((trunk,), (trunk, left, right), "a+b")
    costs = Costs(num_workers=2)
    for segment, seconds in (("trunk", 1.0), ("left", 0.25), ("right", 0.5)):
        costs.observe(Kind(segment, 32), 1, seconds, 0.0)
    one = costs.forecast(tree, 1, 32, 0.0)
    assert one.work_seconds == pytest.approx(1.75)
    assert one.alone_seconds == pytest.approx(1.5)
    assert costs.needs_seconds(left, 1, 32, 0.0) == pytest.approx(0.25)
    # Two workers share several images.
    assert costs.forecast(tree, 4, 32, 0.0).alone_seconds == pytest.approx(3.5)
    assert costs.forecast(tree, 4, 224, 0.0).work_seconds == 0.0


def test_segments_that_are_gone_are_forgotten() -> None:
    costs = learnt([(1, 1.0)])
    costs.observe(Kind("seg-b", 224), 1, 1.0, 0.0)
    costs.keep({"seg-b"})
    assert len(costs) == 1
    assert costs.batch_seconds(KIND, 1, 0.0) == 0.0


def test_free_rows_are_those_that_make_a_batch_hardly_longer() -> None:
    assert Costs().free_rows(KIND, 16) == 1
    # Batches of one size do not tell.
    assert learnt([(4, 1.0)] * 30).free_rows(KIND, 16) == 1
    for fixed, per_row, most, expected in (
        (1.0, 0.0, 16, 16),
        (1.0, 0.01, 16, 11),
        (1.0, 0.01, 8, 8),
        (0.1, 1.0, 16, 1),
        (0.0, 1.0, 16, 1),
    ):
        costs = learnt([(rows, fixed + per_row * rows) for rows in (1, 8)] * 30)
        assert costs.free_rows(KIND, most) == expected, (fixed, per_row)
