from __future__ import annotations

import collections
import dataclasses
import math

import hypothesis
import pytest
from hypothesis import strategies as st

from server.embedded.scheduler import (
    MANY_TIMES,
    MOST_AHEAD_SECONDS,
    SHORT_BATCHES_SECONDS,
    Claim,
    Decision,
    Lane,
    Priority,
    Rows,
    Scheduler,
)

LANES = (Lane("seg-a", (4, 8), 4), Lane("seg-a", (9, 8), 4), Lane("seg-b", (4, 8), 3))
ROW_SECONDS = {LANES[0]: 0.125, LANES[1]: 0.25, LANES[2]: 0.03125}
"""Sums of these are exact, in whatever order they are added up."""


def rows(
    request: int,
    lane: Lane = LANES[0],
    count: int = 1,
    due: float = 10.0,
    deadline: float = math.inf,
    flow: str = "digits",
    needs: float = 0.0,
) -> Rows[str]:
    return Rows(Claim(request, flow, due, deadline), lane, 0, count, f"request {request}", ROW_SECONDS[lane], needs)


def run_next(scheduler: Scheduler[str], now: float = 0.0) -> Decision[str]:
    """Takes the next batch and has it finish at once."""
    decision = scheduler.next_batch(now)
    if decision.batch:
        scheduler.finished(decision.flows)
    return decision


class Model:
    """What the scheduler must do, written for clarity: one list of everything that waits, and what each flow has had."""

    def __init__(self) -> None:
        self.waiting: list[tuple[int, Rows[str]]] = []
        self.had: dict[str, float] = {}
        self.time = 0.0
        self.num_added = 0

    def add(self, added: Rows[str]) -> None:
        if not self.waiting:
            self.time = max([self.time, *self.had.values()])
        self.waiting.append((self.num_added, added))
        self.num_added += 1

    def drop(self, request: int) -> None:
        self.waiting = [entry for entry in self.waiting if entry[1].claim.request != request]

    def turn(self, entry: tuple[int, Rows[str]]) -> tuple[float, float, int]:
        claim = entry[1].claim
        return max(self.had.get(claim.flow, 0.0), self.time), claim.due_seconds, entry[0]

    def next_batch(self, now: float) -> tuple[list[tuple[Lane, int, int]], set[int]]:
        expired = {entry.claim.request for _, entry in self.waiting if entry.claim.deadline_seconds <= now}
        alive = [entry for entry in self.waiting if entry[1].claim.request not in expired]
        batch: list[tuple[Lane, int, int]] = []
        if alive:
            leader = min(alive, key=self.turn)
            lane = leader[1].lane
            self.time = self.turn(leader)[0]
            while len(batch) < lane.max_rows and (able := [entry for entry in alive if entry[1].lane == lane]):
                first = min(able, key=self.turn)
                number, entry = first
                batch.append((lane, entry.claim.request, entry.first))
                after = self.turn(first)[0] + entry.row_seconds
                self.had[entry.claim.flow] = min(after, self.time + MOST_AHEAD_SECONDS)
                rest = dataclasses.replace(entry, first=entry.first + 1, count=entry.count - 1)
                for known in (alive, self.waiting):
                    known[known.index(first) : known.index(first) + 1] = [(number, rest)] if rest.count else []
        return sorted(batch, key=lambda row: row[1:]), expired


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.integers(1, 9), st.sampled_from(LANES), st.floats(0, 100), st.one_of(st.floats(1, 60), st.none()),
            st.sampled_from("abc"),
        ),
        st.tuples(st.just("drop"), st.integers(0, 30)),
        st.tuples(st.just("next"), st.floats(0, 5)),
    ),
    max_size=80,
)  # fmt: skip


@hypothesis.given(STEPS)
@hypothesis.settings(max_examples=200)
def test_it_does_what_the_model_does(steps: list[tuple]) -> None:
    """No row lost or run twice, turns by flow and then by due time, batches of one lane, none of an expired or dropped request."""
    scheduler: Scheduler[str] = Scheduler()
    model = Model()
    now = 0.0
    for number, step in enumerate([*steps, *[("next", 0.0)] * 300]):
        if step[0] == "add":
            _, count, lane, due, patience, flow = step
            deadline = math.inf if patience is None else now + patience
            added = rows(number, lane, count, min(now + due, deadline), deadline, flow)
            scheduler.add(added)
            model.add(added)
        elif step[0] == "drop":
            scheduler.drop(step[1])
            model.drop(step[1])
        else:
            now += step[1]
            expected, expired = model.next_batch(now)
            decision = run_next(scheduler, now)
            found = [
                (taken.lane, taken.claim.request, taken.first + offset)
                for taken in decision.batch
                for offset in range(taken.count)
            ]
            assert sorted(found, key=lambda row: row[1:]) == expected
            # Those due later may be found expired later; nobody's batch waits for that.
            assert set(decision.expired) <= expired
            for request in decision.expired:
                model.drop(request)
            if number >= len(steps) and not decision.batch:
                break
    assert model.waiting == []
    assert scheduler.num_rows == 0


@hypothesis.given(
    st.lists(st.tuples(st.integers(1, 6), st.sampled_from(LANES), st.floats(0, 100), st.sampled_from("abc")), min_size=1, max_size=30),
    st.sets(st.integers(0, 29)),
)  # fmt: skip
def test_cancelling_anyone_changes_nobody_elses_turn(added: list[tuple[int, Lane, float, str]], cancelled: set[int]) -> None:
    def order(dropped: set[int], skipped: set[int]) -> list[tuple[int, int]]:
        scheduler: Scheduler[str] = Scheduler()
        for request, (count, lane, due, flow) in enumerate(added):
            if request not in skipped:
                scheduler.add(rows(request, lane, count, due, flow=flow))
        for request in dropped:
            scheduler.drop(request)
        taken = []
        while batch := run_next(scheduler).batch:
            taken += [(entry.claim.request, entry.first + offset) for entry in batch for offset in range(entry.count)]
        return taken

    assert order(cancelled, set()) == order(set(), cancelled)


@hypothesis.given(st.lists(st.tuples(st.integers(1, 6), st.floats(0, 100)), min_size=1, max_size=20))
def test_of_one_task_the_oldest_deadline_is_first(added: list[tuple[int, float]]) -> None:
    scheduler: Scheduler[str] = Scheduler()
    for request, (count, due) in enumerate(added):
        scheduler.add(rows(request, count=count, due=due, deadline=due + 1000))
    taken: list[float] = []
    while batch := run_next(scheduler).batch:
        taken += [entry.claim.due_seconds for entry in batch]
    assert taken == sorted(taken)


@hypothesis.given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(LANES), st.integers(1, 20), st.floats(0, 100)), min_size=2, max_size=40)
)  # fmt: skip
def test_flows_that_wait_have_had_alike(added: list[tuple[str, Lane, int, float]]) -> None:
    """At any time, what two flows have had that both waited all along differs by no more than a batch of each."""
    scheduler: Scheduler[str] = Scheduler()
    left: collections.Counter[str] = collections.Counter()
    for request, (flow, lane, count, due) in enumerate(added):
        scheduler.add(rows(request, lane, count, due, flow=flow))
        left[flow] += count
    had: collections.Counter[str] = collections.Counter()
    most = max(lane.max_rows * seconds for lane, seconds in ROW_SECONDS.items())
    while batch := run_next(scheduler).batch:
        for entry in batch:
            had[entry.claim.flow] += entry.count * entry.row_seconds
            left[entry.claim.flow] -= entry.count
        waited = [had[flow] for flow in left if left[flow]]
        assert not waited or max(waited) - min(waited) <= 2 * most


@hypothesis.given(st.integers(1, 6), st.integers(0, 50), st.sampled_from(LANES), st.sampled_from(LANES), st.floats(0, 100))
def test_nobody_starves(num_floods: int, num_before: int, theirs: Lane, own: Lane, due: float) -> None:
    """However long others flood, with whatever deadlines, a row's turn comes after a batch or two of each of them."""
    scheduler: Scheduler[str] = Scheduler()
    requests = iter(range(1, 10**6))

    def flood() -> None:
        for index in range(num_floods):
            for _ in range(2 * theirs.max_rows):
                scheduler.add(rows(next(requests), theirs, due=0.0, flow=f"flood {index}"))

    flood()
    for _ in range(num_before):
        run_next(scheduler)
        flood()
    scheduler.add(rows(0, own, due=due, flow="quiet"))
    for _ in range(2 * num_floods + 1):
        if any(entry.claim.request == 0 for entry in run_next(scheduler).batch):
            return
        flood()
    pytest.fail("it waits")


def test_one_row_of_a_quiet_task_is_in_the_next_batch() -> None:
    scheduler: Scheduler[str] = Scheduler()
    for request in range(500):
        scheduler.add(rows(request, due=0.0, flow="loud"))
    assert len(run_next(scheduler).batch) == 4
    scheduler.add(rows(500, due=99.0, flow="quiet"))
    batch = run_next(scheduler).batch
    assert batch[0].claim.request == 500
    # And nothing of the batch stays empty.
    assert [entry.claim.request for entry in batch[1:]] == [4, 5, 6]
    scheduler.add(rows(501, LANES[2], due=99.0, flow="quiet"))
    assert run_next(scheduler).batch[0].claim.request == 501


def flooded(num_waiting: int, num_workers: int = 1) -> Scheduler[str]:
    """Returns a scheduler whose workers all run a task that has more waiting."""
    scheduler: Scheduler[str] = Scheduler(num_workers)
    for request in range(4 * num_workers + num_waiting):
        scheduler.add(rows(request, flow="loud"))
    for _ in range(num_workers):
        assert scheduler.next_batch(0).batch
    return scheduler


@pytest.mark.parametrize("num_workers", [1, 2])
def test_one_more_batch_runs_beside_those_of_a_flood(num_workers: int) -> None:
    scheduler = flooded(MANY_TIMES, num_workers)
    assert scheduler.turn(0) is None
    assert not scheduler.next_batch(0).batch
    scheduler.add(rows(100, flow="quiet"))
    assert scheduler.turn(0) is not None
    decision = scheduler.next_batch(0)
    # By itself: others' rows would make it longer.
    assert [entry.claim.request for entry in decision.batch] == [100]
    # One more, not several; and nothing more of what runs already.
    scheduler.add(rows(101, flow="another"))
    assert scheduler.turn(0) is None
    scheduler.finished(decision.flows)
    assert scheduler.turn(0) is not None
    assert [entry.claim.request for entry in scheduler.next_batch(0).batch] == [101]
    # What ran too many ends before the flood goes on.
    scheduler.finished(frozenset({"loud"}))
    assert scheduler.turn(0) is None
    scheduler.finished(frozenset({"another"}))
    assert [entry.claim.flow for entry in scheduler.next_batch(0).batch] == ["loud"] * MANY_TIMES


def test_no_more_batches_run_beside_those_of_tasks_that_have_no_more_waiting() -> None:
    scheduler = flooded(MANY_TIMES - 1)
    scheduler.add(rows(100, flow="quiet"))
    assert scheduler.turn(0) is None
    assert not scheduler.next_batch(0).batch


def test_batches_are_short_where_long_ones_are_of_no_use_to_anybody() -> None:
    scheduler: Scheduler[str] = Scheduler()
    for request in range(40):
        scheduler.add(dataclasses.replace(rows(request, flow="loud"), enough_rows=2))
    # Nobody else has ever been there.
    assert len(run_next(scheduler).batch) == 4
    scheduler.add(dataclasses.replace(rows(100, flow="quiet"), enough_rows=1))
    assert [len(run_next(scheduler, now).batch) for now in (20.0, 20.0, 20.0 + SHORT_BATCHES_SECONDS)] == [1, 2, 4]


def test_what_a_flow_has_had_is_remembered_while_it_runs() -> None:
    """Also where its first batch took all that waited then."""
    scheduler: Scheduler[str] = Scheduler()
    scheduler.add(rows(0, count=4, flow="loud"))
    assert scheduler.next_batch(0).batch
    for request in range(1, 1 + MANY_TIMES):
        scheduler.add(rows(request, due=1.0, flow="loud"))
    scheduler.add(rows(100, due=9.0, flow="quiet"))
    assert [entry.claim.request for entry in scheduler.next_batch(0).batch] == [100]


def test_rows_of_different_shapes_never_share_a_batch() -> None:
    scheduler: Scheduler[str] = Scheduler()
    scheduler.add(rows(1, LANES[0]))
    scheduler.add(rows(2, LANES[1]))
    scheduler.add(rows(3, LANES[0]))
    assert [entry.claim.request for entry in run_next(scheduler).batch] == [1, 3]
    assert [entry.claim.request for entry in run_next(scheduler).batch] == [2]


def test_rows_that_do_not_fit_keep_their_place() -> None:
    scheduler: Scheduler[str] = Scheduler()
    scheduler.add(rows(1, count=6, due=1))
    scheduler.add(rows(2, count=1, due=2))
    first, second = run_next(scheduler).batch, run_next(scheduler).batch
    assert [(entry.claim.request, entry.first, entry.count) for entry in first] == [(1, 0, 4)]
    assert [(entry.claim.request, entry.first, entry.count) for entry in second] == [(1, 4, 2), (2, 0, 1)]


def test_expired_rows_leave_all_lanes_before_they_cost_anything() -> None:
    scheduler: Scheduler[str] = Scheduler()
    for lane in LANES:
        scheduler.add(rows(1, lane, due=5, deadline=5))
    scheduler.add(rows(2, due=6))
    decision = scheduler.next_batch(5.0)
    assert decision.expired == (1,)
    assert [entry.claim.request for entry in decision.batch] == [2]
    assert scheduler.num_rows == 0


def test_what_would_be_late_is_not_begun_where_others_wait() -> None:
    scheduler: Scheduler[str] = Scheduler()
    scheduler.add(rows(1, due=5, deadline=5, needs=2))
    scheduler.add(rows(2, due=6))
    decision = run_next(scheduler, 3.5)
    assert decision.expired == (1,)
    assert [entry.claim.request for entry in decision.batch] == [2]
    # Alone it is tried: the prediction may be wrong.
    scheduler.add(rows(3, due=5, deadline=5, needs=2))
    assert [entry.claim.request for entry in run_next(scheduler, 3.5).batch] == [3]


def test_a_request_that_expires_while_a_batch_is_filled_costs_nothing() -> None:
    scheduler: Scheduler[str] = Scheduler()
    # The second of its rows has further to go.
    for needs in (1.0, 3.0):
        scheduler.add(rows(1, due=5, deadline=5, needs=needs))
    scheduler.add(rows(2, LANES[2], due=6))
    assert scheduler.next_batch(3.0) == Decision((), (1,))
    assert [entry.claim.request for entry in scheduler.next_batch(3.0).batch] == [2]


def test_memory_grows_with_what_waits_only() -> None:
    scheduler: Scheduler[str] = Scheduler()
    scheduler.add(rows(0, due=0))
    for request in range(1, 20_000):
        scheduler.add(rows(request, LANES[request % 3], due=float(request), flow=f"flow {request}"))
        scheduler.drop(request)
    for request in range(20_000, 22_000):
        scheduler.add(rows(request, LANES[request % 3], flow=f"flow {request}"))
        while run_next(scheduler).batch:
            pass
    assert scheduler.num_rows == 0
    assert scheduler.num_tickets < 500


@pytest.mark.parametrize(
    "wrong",
    [
        rows(1, count=0),
        rows(1, due=math.nan),
        rows(1, deadline=math.nan),
        dataclasses.replace(rows(1), row_seconds=0.0),
        dataclasses.replace(rows(1), row_seconds=math.nan),
    ],
)
def test_impossible_rows_are_refused(wrong: Rows[str]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Scheduler[str]().add(wrong)


def test_a_flood_gives_way_while_others_are_there() -> None:
    scheduler: Scheduler[str] = Scheduler(num_workers=2)
    for request in range(60):
        scheduler.add(rows(request, flow="loud"))
    assert scheduler.next_batch(0).batch
    # Nobody else was there for a while.
    later = SHORT_BATCHES_SECONDS + 1
    assert scheduler.turn(later) is Priority.USUAL
    scheduler.add(rows(100, flow="quiet"))
    assert scheduler.turn(later) is Priority.USUAL
    assert not scheduler.next_batch(later, Priority.LOW).batch
    decision = scheduler.next_batch(later, Priority.USUAL)
    assert decision.batch[0].claim.request == 100
    scheduler.finished(decision.flows)
    # The quiet one may come back, for a while.
    assert scheduler.turn(later + 1) is Priority.LOW
    assert not scheduler.next_batch(later + 1, Priority.USUAL).batch
    assert {entry.claim.flow for entry in scheduler.next_batch(later + 1, Priority.LOW).batch} == {"loud"}
    scheduler.finished(frozenset({"loud"}))
    assert scheduler.turn(later + 1 + SHORT_BATCHES_SECONDS) is Priority.USUAL


def test_a_task_with_little_waiting_does_not_give_way() -> None:
    scheduler: Scheduler[str] = Scheduler(num_workers=2)
    for request in range(2 * MANY_TIMES - 1):
        scheduler.add(rows(request, flow="first"))
    scheduler.add(rows(100, flow="second"))
    assert scheduler.turn(0) is Priority.USUAL


def test_whoever_is_late_is_found_out_by_whoever_looks() -> None:
    scheduler: Scheduler[str] = Scheduler(num_workers=1)
    scheduler.add(rows(99, flow="quiet"))
    assert run_next(scheduler).batch
    scheduler.add(rows(100, flow="quiet", deadline=1.0))
    for request in range(20):
        scheduler.add(rows(request, flow="loud", due=20))
    # It was the quiet one's turn, and now it is that of the flood, which others take.
    assert scheduler.turn(2.0) is Priority.USUAL
    assert scheduler.next_batch(2.0, Priority.USUAL) == Decision((), (100,))
    assert scheduler.num_rows == 20


def test_a_floods_rows_ride_only_where_that_is_free() -> None:
    for free_rows, expected in ((1, [100]), (3, [100, 4, 5]), (9, [100, 4, 5, 6])):
        scheduler: Scheduler[str] = Scheduler(num_workers=1)
        for request in range(20):
            scheduler.add(rows(request, flow="loud"))
        scheduler.finished(scheduler.next_batch(0).flows)
        scheduler.add(dataclasses.replace(rows(100, flow="quiet"), free_rows=free_rows))
        assert [entry.claim.request for entry in scheduler.next_batch(0).batch] == expected
    # Those of other quiet flows ride whose turn is before that of a flood's, and a flood's ride with a flood's.
    scheduler = Scheduler(num_workers=1)
    for request, flow in enumerate(["quiet", "other", *["loud"] * 20]):
        scheduler.add(dataclasses.replace(rows(request, flow=flow), free_rows=1))
    assert [entry.claim.request for entry in run_next(scheduler).batch] == [0, 1]
    assert [entry.claim.request for entry in run_next(scheduler).batch] == [2, 3, 4, 5]


def test_what_runs_beside_a_flood_does_not_give_way() -> None:
    """However many rows it has: all that gives way runs the flood already."""
    for count in (1, 2 * MANY_TIMES):
        scheduler = flooded(200, num_workers=2)
        scheduler.add(rows(100, count=count, flow="fewer"))
        assert scheduler.turn(0) is Priority.USUAL
        assert [entry.claim.request for entry in scheduler.next_batch(0, Priority.USUAL).batch] == [100]


def test_what_has_begun_goes_on_beside_a_flood() -> None:
    scheduler = flooded(3 * MANY_TIMES)
    scheduler.add(dataclasses.replace(rows(100, flow="quiet"), row_seconds=0.9))
    decision = scheduler.next_batch(0)
    assert [entry.claim.request for entry in decision.batch] == [100]
    scheduler.finished(decision.flows)
    # More of it was computed by now than of the flood: a second question of it waits for its turn.
    scheduler.add(rows(101, flow="quiet"))
    assert scheduler.turn(0) is None
    scheduler.add(dataclasses.replace(rows(100, LANES[2], due=1.0, flow="quiet"), has_begun=True))
    assert scheduler.turn(0) is Priority.USUAL
    assert [entry.claim.request for entry in scheduler.next_batch(0).batch] == [100]


@hypothesis.given(
    st.integers(1, 3),
    st.lists(
        st.one_of(
            st.tuples(st.just("add"), st.sampled_from("abc"), st.integers(1, 20), st.sampled_from(LANES), st.booleans()),
            st.tuples(st.just("take"), st.sampled_from(Priority), st.just(0), st.just(None), st.booleans()),
            st.tuples(st.just("finish"), st.integers(0, 3), st.just(0), st.just(None), st.booleans()),
        ),
        max_size=60,
    ),
)
@hypothesis.settings(max_examples=200)
def test_each_turn_is_that_of_one_kind_of_workers_and_no_row_is_lost(num_workers: int, steps: list[tuple]) -> None:
    scheduler: Scheduler[str] = Scheduler(num_workers)
    running: list[tuple[Priority, frozenset[str]]] = []
    added = taken = 0
    now = 0.0

    def take(priority: Priority) -> int:
        turn = scheduler.turn(now)
        decision = scheduler.next_batch(now, priority)
        assert bool(decision.batch) == (turn is priority)
        assert decision.expired == ()
        if decision.batch:
            running.append((priority, decision.flows))
            # So many workers of each kind are enough.
            kinds = collections.Counter(kind for kind, _ in running)
            assert kinds[Priority.LOW] <= num_workers
            assert kinds.total() <= num_workers + 1
            assert len({entry.lane for entry in decision.batch}) == 1
        return sum(entry.count for entry in decision.batch)

    for number, (what, which, count, lane, flag) in enumerate(steps):
        now += 3.0 * flag
        if what == "add":
            scheduler.add(dataclasses.replace(rows(number, lane, count, flow=which), has_begun=flag, free_rows=1 + flag))
            added += count
        elif what == "take":
            taken += take(which)
        elif running:
            scheduler.finished(running.pop(which % len(running))[1])
    while scheduler.num_rows:
        turn = scheduler.turn(now)
        if turn is None:
            scheduler.finished(running.pop()[1])
        else:
            taken += take(turn)
    assert taken == added
