"""The simulation of searches on many devices keeps what must hold of any schedule."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.simulation import Search, Workers, simulate

SECONDS = st.floats(0, 100, allow_nan=False).map(lambda value: round(value, 3))
PACKS = st.lists(SECONDS, min_size=1, max_size=12).map(tuple)
SEARCHES = st.builds(
    Search,
    generations=st.lists(PACKS, min_size=1, max_size=4).map(tuple),
    start=SECONDS,
    open=SECONDS,
    read=SECONDS,
    plan=SECONDS,
    handle=SECONDS,
    examine=SECONDS,
    close=SECONDS,
)


def alone(search: Search) -> float:
    """What a search takes if nothing happens beside anything else."""
    packs = sum(map(len, search.generations))
    fixed = search.start + search.open + search.read + search.close + len(search.generations) * search.plan
    return fixed + packs * search.handle + search.work


@given(SEARCHES)
def test_one_worker_takes_the_sum(search):
    outcome = simulate([search], [Workers.alike(1)])
    assert outcome.wall == pytest.approx(alone(search))
    assert (outcome.lost, outcome.waited, outcome.num_deaths) == (0, 0, 0)


@given(st.lists(SEARCHES, min_size=1, max_size=5), st.integers(1, 6))
def test_more_workers_are_never_slower(searches, count):
    fewer, more = (simulate(searches, [Workers.alike(number)]) for number in (count, count + 1))
    assert more.wall <= fewer.wall + 1e-6


@given(st.lists(SEARCHES, min_size=1, max_size=5), st.integers(1, 4), st.integers(1, 4))
def test_work_is_neither_lost_nor_done_twice(searches, slots, count):
    outcome = simulate(searches, [Workers.alike(count)] * slots)
    assert outcome.busy == pytest.approx(sum(search.work for search in searches))
    assert outcome.busy <= outcome.wall * outcome.num_workers + 1e-6
    # Nobody is faster than the longest pack of each generation, and the lock is held by one at a time.
    floors = [sum(map(max, search.generations)) + search.examine for search in searches]
    assert outcome.wall >= max(floors) - 1e-6
    assert outcome.wall >= sum(search.open + search.close for search in searches) - 1e-6


@given(st.lists(SEARCHES, min_size=1, max_size=4), st.integers(0, 100), st.booleans(), st.integers(1, 4))
def test_deaths_cost_time_and_no_work(searches, seed, one_fate, count):
    mortal = Workers((1.0,) * count, mean_life_seconds=60, restart_seconds=5, one_fate=one_fate)
    outcome = simulate(searches, [mortal], random.Random(seed))
    assert outcome.busy == pytest.approx(sum(search.work for search in searches))
    assert outcome.busy + outcome.lost <= outcome.wall * count + 1e-6
    assert (outcome.num_deaths > 0) or outcome.lost == 0
    if count == 1:
        before = sum(map(alone, searches))
        assert before + outcome.lost - 1e-6 <= outcome.wall <= before + outcome.lost + 5 * outcome.num_deaths + 1e-6


@given(SEARCHES, st.floats(0.1, 10))
def test_a_faster_worker_takes_less_for_packs_alone(search, speed):
    wall = simulate([search], [Workers((speed,))]).wall
    packs = sum(map(sum, search.generations))
    assert wall == pytest.approx(alone(search) - packs + packs / speed)


def test_a_generation_waits_for_its_slowest_pack():
    search = Search(generations=((1.0, 1.0, 4.0), (1.0, 1.0, 1.0)))
    outcome = simulate([search], [Workers.alike(3)])
    assert (outcome.wall, outcome.busy) == (5.0, 9.0)
    assert outcome.efficiency == pytest.approx(9 / 15)
    # The third pack goes to the first worker, which was free first.
    assert simulate([search], [Workers((2.0, 1.0))]).wall == 2.5 + 1.0
    # A fourth device has nothing to do.
    assert simulate([search], [Workers.alike(4)]).wall == 5.0


def test_results_are_taken_up_one_after_another():
    search = Search(generations=((1.0,) * 4,), handle=2.0)
    assert simulate([search], [Workers.alike(4)]).wall == 1.0 + 4 * 2.0
    assert simulate([search], [Workers.alike(1)]).wall == 4 * 3.0


def test_searches_wait_for_each_other_to_open_and_close():
    search = Search(generations=((10.0,),), open=2.0, close=1.0)
    outcome = simulate([search, search, search], [Workers.alike(1)] * 2)
    # The second opens at 2; the first closes from 12 to 13, the third opens until 15, the second closes from 15 to 16.
    assert outcome.wall == 26.0
    assert outcome.waited == 2.0 + 1.0


def test_workers_of_one_fate_lose_what_all_of_them_were_at():
    search = Search(generations=((30.0,) * 8,))
    lost = {}
    for one_fate in (False, True):
        workers = Workers((1.0,) * 8, mean_life_seconds=200, restart_seconds=1, one_fate=one_fate)
        outcomes = [simulate([search], [workers], random.Random(seed)) for seed in range(20)]
        lost[one_fate] = sum(outcome.lost for outcome in outcomes)
    assert lost[True] > 4 * lost[False] > 0


def test_workers_that_die_faster_than_a_pack_are_refused():
    search = Search(generations=((1e6,),))
    with pytest.raises(ValueError, match="deaths without one finished pack"):
        simulate([search], [dataclasses.replace(Workers.alike(1), mean_life_seconds=1.0)])
