from __future__ import annotations

import math

import hypothesis
import pytest
from hypothesis import strategies as st

from server.embedded.scheduler import Lane, Rows, Scheduler

LANES = (Lane("seg-a", (4, 8), 4), Lane("seg-a", (9, 8), 4), Lane("seg-b", (4, 8), 3))


def rows(request: int, lane: Lane = LANES[0], count: int = 1, due: float = 10.0, deadline: float = math.inf) -> Rows[str]:
    return Rows(request, lane, 0, count, due, deadline, f"request {request}")


class Model:
    """What the scheduler must do, written for clarity: one list of everything that waits."""

    def __init__(self) -> None:
        self.waiting: list[tuple[float, int, Rows[str]]] = []
        self.num_added = 0

    def add(self, added: Rows[str]) -> None:
        self.waiting.append((added.due_seconds, self.num_added, added))
        self.num_added += 1

    def drop(self, request: int) -> None:
        self.waiting = [entry for entry in self.waiting if entry[2].request != request]

    def single_rows(self) -> list[tuple[Lane, int, int]]:
        """Lane, request and index of every row that waits, due first first."""
        return [
            (entry.lane, entry.request, entry.first + offset)
            for _, _, entry in sorted(self.waiting, key=lambda entry: entry[:2])
            for offset in range(entry.count)
        ]

    def next_batch(self, now: float) -> tuple[list[tuple[Lane, int, int]], set[int]]:
        expired = {entry.request for _, _, entry in self.waiting if entry.deadline_seconds <= now}
        alive = [row for row in self.single_rows() if row[1] not in expired]
        batch = [row for row in alive if row[0] == alive[0][0]][: alive[0][0].max_rows] if alive else []
        return batch, expired

    def take(self, batch: tuple[Rows[str], ...]) -> None:
        for taken in batch:
            for index, (due, order, entry) in enumerate(self.waiting):
                if entry.request == taken.request and entry.lane == taken.lane and entry.first == taken.first:
                    rest = Rows(
                        entry.request, entry.lane, entry.first + taken.count, entry.count - taken.count,
                        entry.due_seconds, entry.deadline_seconds, entry.payload,
                    )  # fmt: skip
                    self.waiting[index : index + 1] = [(due, order, rest)] if rest.count else []
                    break
            else:
                pytest.fail(f"{taken} was not waiting")


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 9), st.sampled_from(LANES), st.floats(0, 100), st.one_of(st.floats(1, 60), st.none())),
        st.tuples(st.just("drop"), st.integers(0, 30)),
        st.tuples(st.just("next"), st.floats(0, 5)),
    ),
    max_size=80,
)  # fmt: skip


@hypothesis.given(STEPS)
@hypothesis.settings(deadline=None, max_examples=300)
def test_it_does_what_the_model_does(steps: list[tuple]) -> None:
    """No row lost or run twice, due first first, full batches of one lane, none of an expired or dropped request."""
    scheduler: Scheduler[str] = Scheduler()
    model = Model()
    now = 0.0
    for number, step in enumerate(steps):
        if step[0] == "add":
            _, count, lane, due, patience = step
            deadline = math.inf if patience is None else now + patience
            added = Rows(number, lane, 0, count, min(now + due, deadline), deadline, str(number))
            scheduler.add(added)
            model.add(added)
        elif step[0] == "drop":
            scheduler.drop(step[1])
            model.drop(step[1])
        else:
            now += step[1]
            expected, expired = model.next_batch(now)
            decision = scheduler.next_batch(now)
            found = [
                (taken.lane, taken.request, taken.first + offset) for taken in decision.batch for offset in range(taken.count)
            ]
            assert found == expected
            # Those due later may be found expired later; nobody's batch waits for that.
            assert set(decision.expired) <= expired
            for request in decision.expired:
                model.drop(request)
            model.take(decision.batch)
    drained = []
    while (decision := scheduler.next_batch(now)).batch:
        drained += [taken.count for taken in decision.batch]
        model.take(decision.batch)
        for request in decision.expired:
            model.drop(request)
    for request in decision.expired:
        model.drop(request)
    assert model.waiting == []
    assert scheduler.num_rows == 0


@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from(LANES), st.floats(0, 100)), min_size=1, max_size=30),
    st.sets(st.integers(0, 29)),
)
@hypothesis.settings(deadline=None)
def test_cancelling_anyone_changes_nobody_elses_turn(added: list[tuple[int, Lane, float]], cancelled: set[int]) -> None:
    def order(dropped: set[int], skipped: set[int]) -> list[tuple[int, int]]:
        scheduler: Scheduler[str] = Scheduler()
        for request, (count, lane, due) in enumerate(added):
            if request not in skipped:
                scheduler.add(rows(request, lane, count, due))
        for request in dropped:
            scheduler.drop(request)
        taken = []
        while batch := scheduler.next_batch(0.0).batch:
            taken += [(entry.request, entry.first + offset) for entry in batch for offset in range(entry.count)]
        return taken

    assert order(cancelled, set()) == order(set(), cancelled)


def test_rows_of_different_shapes_never_share_a_batch() -> None:
    scheduler: Scheduler[str] = Scheduler()
    scheduler.add(rows(1, LANES[0]))
    scheduler.add(rows(2, LANES[1]))
    scheduler.add(rows(3, LANES[0]))
    assert [entry.request for entry in scheduler.next_batch(0).batch] == [1, 3]
    assert [entry.request for entry in scheduler.next_batch(0).batch] == [2]


def test_rows_that_do_not_fit_keep_their_place() -> None:
    scheduler: Scheduler[str] = Scheduler()
    scheduler.add(rows(1, count=6, due=1))
    scheduler.add(rows(2, count=1, due=2))
    first, second = scheduler.next_batch(0).batch, scheduler.next_batch(0).batch
    assert [(entry.request, entry.first, entry.count) for entry in first] == [(1, 0, 4)]
    assert [(entry.request, entry.first, entry.count) for entry in second] == [(1, 4, 2), (2, 0, 1)]


def test_expired_rows_leave_all_lanes_before_they_cost_anything() -> None:
    scheduler: Scheduler[str] = Scheduler()
    for lane in LANES:
        scheduler.add(rows(1, lane, due=5, deadline=5))
    scheduler.add(rows(2, due=6))
    decision = scheduler.next_batch(5.0)
    assert decision.expired == (1,)
    assert [entry.request for entry in decision.batch] == [2]
    assert scheduler.num_rows == 0


def test_memory_grows_with_what_waits_only() -> None:
    scheduler: Scheduler[str] = Scheduler()
    scheduler.add(rows(0, due=0))
    for request in range(1, 20_000):
        scheduler.add(rows(request, LANES[request % 3], due=float(request)))
        scheduler.drop(request)
    assert scheduler.num_rows == 1
    assert scheduler.num_tickets < 300


@pytest.mark.parametrize("wrong", [rows(1, count=0), rows(1, due=math.nan), rows(1, deadline=math.nan)])
def test_impossible_rows_are_refused(wrong: Rows[str]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Scheduler[str]().add(wrong)
