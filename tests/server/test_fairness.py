from __future__ import annotations

import collections

import hypothesis
import pytest
from hypothesis import strategies as st

from server.fairness import MOST_FLOWS, SharedRoom, VirtualTimes, flow_of


def test_a_flow_is_what_asks_the_same_tasks() -> None:
    assert flow_of(["b", "a"]) == flow_of(("a", "b")) == "a+b"
    assert flow_of(["a"]) == "a"


def test_who_comes_back_has_saved_nothing_up() -> None:
    times = VirtualTimes(most_ahead=10.0)
    times.charge("early", 1.0)
    for _ in range(5):
        times.reach("steady")
        times.charge("steady", 2.0)
    assert times.of("steady") == 10.0
    assert times.of("early") == times.of("new") == 8.0


def test_nobody_is_further_ahead_than_that() -> None:
    times = VirtualTimes(most_ahead=3.0)
    for _ in range(10):
        times.charge("filler", 1.0)
    assert times.of("filler") == 3.0


def test_who_is_ahead_is_forgotten_when_nobody_waits() -> None:
    times = VirtualTimes(most_ahead=3.0)
    times.charge("a", 1.0)
    times.charge("b", 2.0)
    times.begin_anew()
    assert times.of("a") == times.of("b") == times.of("c") == 2.0
    assert len(times) == 0


def test_any_number_of_flows_takes_no_more_memory() -> None:
    times = VirtualTimes(most_ahead=1.0)
    for number in range(3 * MOST_FLOWS):
        times.charge(f"flow {number}", 0.5)
    assert len(times) <= MOST_FLOWS


def test_flows_that_are_not_ahead_are_forgotten() -> None:
    times = VirtualTimes(most_ahead=1.0)
    for number in range(10_000):
        times.reach(f"flow {number}")
        times.charge(f"flow {number}", 0.5)
        times.reach(f"flow {number}")
    assert len(times) < 200


@hypothesis.given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.booleans(), st.sampled_from("abc"), st.integers(1, 100)), max_size=200),
)
def test_a_room_is_never_too_full(size: int, steps: list[tuple[bool, str, int]]) -> None:
    room = SharedRoom(size)
    held: collections.Counter[str] = collections.Counter()
    for comes, flow, amount in steps:
        if comes and room.has_room(flow, amount):
            was_empty = not room.total
            room.take(flow, amount)
            held[flow] += amount
            assert room.total <= size or was_empty
        elif not comes and held[flow]:
            gone = min(amount, held[flow])
            room.give_back(flow, gone)
            held[flow] -= gone
        assert room.total == sum(held.values())
        assert all(room.held_by(flow) == held[flow] for flow in "abc")


@pytest.mark.parametrize("num_floods", [1, 2, 5])
def test_whoever_floods_leaves_room_for_others(num_floods: int) -> None:
    room = SharedRoom(1000)
    admitted = True
    while admitted:
        admitted = False
        for flow in range(num_floods):
            if room.has_room(f"flood {flow}", 1):
                room.take(f"flood {flow}", 1)
                admitted = True
    assert room.has_room("quiet", 10)
    held = [room.held_by(f"flood {flow}") for flow in range(num_floods)]
    assert max(held) - min(held) <= SharedRoom.GREED
    assert sum(held) >= 1000 * 8 / 9 - num_floods


def test_what_is_larger_than_the_room_comes_in_alone() -> None:
    room = SharedRoom(4)
    assert room.has_room("a", 9)
    room.take("a", 9)
    assert not room.has_room("b", 1)
    room.give_back("a", 9)
    room.take("a", 0)
    room.take("a", 0)
    room.give_back("a", 0)
    room.give_back("a", 0)
    assert room.has_room("b", 4)
