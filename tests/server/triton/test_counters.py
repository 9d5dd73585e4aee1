from __future__ import annotations

from server.questions import Branch, RouteTree
from server.triton.counters import Counters
from server.triton.endpoint import ModelCounts

TRUNK, HEAD = Branch("trunk"), Branch("head")
TREE = RouteTree((TRUNK,), (TRUNK, HEAD))
# The head runs after the trunk and after its clone.
TWICE = RouteTree((TRUNK,), (TRUNK, HEAD, Branch("head")))


def counted(**models: tuple[int, int, int]) -> dict[str, ModelCounts]:
    return {name: ModelCounts(*counts) for name, counts in models.items()}


def counters(**before: tuple[int, int, int]) -> Counters:
    found = Counters()
    found.begin(["trunk", "head"], counted(**before))
    return found


def test_what_ran_before_and_what_is_exempt_does_not_count() -> None:
    found = counters(trunk=(100, 50, 80))
    found.answered(TREE, 4, 4)
    found.answered(TREE, 3)
    assert found.see(counted(trunk=(107, 52, 82), head=(7, 2, 2)))
    assert found.totals() == {"trunk": (3, 1), "head": (3, 1)}


def test_an_exempt_row_in_a_batch_with_others_leaves_the_batch_counted() -> None:
    found = counters()
    found.answered(TREE, 1, 1)
    found.answered(TREE, 7)
    assert found.see(counted(trunk=(8, 1, 2), head=(8, 2, 2)))
    assert found.totals() == {"trunk": (7, 1), "head": (7, 1)}


def test_rows_that_fill_a_batch_up_do_not_count_but_the_batch_does() -> None:
    found = counters()
    found.answered(TREE, 8, 5)
    assert found.see(counted(trunk=(8, 1, 1), head=(8, 1, 1)))
    assert found.totals() == {"trunk": (3, 1), "head": (3, 1)}


def test_triton_that_has_not_counted_all_its_answers_is_to_be_asked_again() -> None:
    found = counters()
    found.answered(TWICE, 2)
    assert not found.see(counted(trunk=(2, 1, 1), head=(2, 1, 1)))
    assert found.see(counted(trunk=(2, 1, 1), head=(4, 1, 2)))
    assert found.totals() == {"trunk": (2, 1), "head": (4, 1)}


def test_an_exempt_row_that_is_counted_late_is_exempt_all_the_same() -> None:
    found = counters()
    found.answered(TREE, 2, 2)
    assert not found.see(counted())
    assert found.see(counted(trunk=(2, 1, 1), head=(2, 1, 1)))
    assert found.totals() == {"trunk": (0, 0), "head": (0, 0)}


def test_counting_goes_on_where_a_triton_that_started_again_left_off() -> None:
    found = counters()
    found.answered(TREE, 5)
    assert found.see(counted(trunk=(5, 2, 3), head=(5, 2, 3)))
    # What was exempt in its earlier life says nothing of this one.
    found.answered(TREE, 1, 1)
    assert found.see(counted(trunk=(2, 1, 1), head=(2, 1, 1)))
    assert found.totals() == {"trunk": (7, 3), "head": (7, 3)}


def test_what_came_from_a_cache_did_not_run() -> None:
    found = counters()
    for _ in range(3):
        found.answered(TREE, 4)
    assert found.see(counted(trunk=(4, 1, 3), head=(12, 3, 3)))
    assert found.totals() == {"trunk": (4, 1), "head": (12, 3)}


def test_only_what_is_kept_is_counted() -> None:
    found = counters()
    found.keep({"head"})
    found.answered(TREE, 1)
    assert found.see(counted(trunk=(1, 1, 1), head=(1, 1, 1)))
    assert found.totals() == {"head": (1, 1)}
