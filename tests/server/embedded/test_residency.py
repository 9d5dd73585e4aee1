from __future__ import annotations

import dataclasses
import random

import hypothesis
import pytest
from hypothesis import strategies as st

from server.embedded.residency import HALF_LIFE_SECONDS, RETRY_SECONDS, Load, Place, Residency

Tree = list[tuple[str, int]]
"""What a question runs: names of segments, each with the index of the one that its rows come from; -1 for none."""


@dataclasses.dataclass
class Asked:
    """A question of the simulation, and what it has yet to run: names of segments by their places in the tree."""

    number: int
    due_seconds: float
    tree: Tree
    rows: int
    left: dict[int, str]

    @property
    def ready(self) -> dict[int, str]:
        """What its rows have come to."""
        return {place: name for place, name in self.left.items() if self.tree[place][1] not in self.left}


class Simulation:
    """An engine without threads around a `Residency`: questions walk their routes, one worker, loads that take a while."""

    def __init__(self, limit: int, sizes: dict[str, int], trees: list[Tree]) -> None:
        self.residency = Residency(limit)
        self.sizes = sizes
        self.users = {name: sum(name in dict(tree) for tree in trees) for name in sizes}
        self.trees = trees
        self.resident = {name for name in sizes if self.residency.add(name, sizes[name], self.users[name], 1.0)}
        self.coming: list[Load] = []
        self.running: str | None = None
        self.open: list[Asked] = []
        self.now_seconds = 0.0
        self.num_asked = self.num_found = self.num_needed = 0

    def ask(self, tree: int, due_seconds: float, rows: int = 1) -> None:
        self.num_asked += 1
        names = [name for name, _ in self.trees[tree]]
        self.residency.need(self.num_asked, due_seconds, [(name, rows) for name in names])
        self.open.append(Asked(self.num_asked, due_seconds, self.trees[tree], rows, dict(enumerate(names))))

    def cancel(self, index: int) -> None:
        asked = self.open[index % len(self.open)]
        if self.running not in asked.ready.values():
            self.end(asked)

    def end(self, asked: Asked) -> None:
        self.open.remove(asked)
        self.residency.end(asked.number, dict(asked.tree))

    def first_need(self, name: str) -> tuple[float, int, int] | None:
        needs = (
            (asked.due_seconds, asked.number, place)
            for asked in self.open
            for place, other in asked.left.items()
            if other == name
        )
        return min(needs, default=None)

    def load(self) -> bool:
        """Starts a load if there is one; checks what goes for it."""
        before = {name: self.first_need(name) for name in self.sizes}
        here = self.resident | {load.name for load in self.coming}
        held = sum(self.sizes[name] for name in here)
        own = {name for name in here if self.users[name] == 1}
        load = self.residency.next_load()
        if load is None:
            return False
        need = before[load.name]
        assert need is not None, "nobody needs it"
        absent = set(self.sizes) - self.resident - {other.name for other in self.coming}
        assert need == min(first for name in absent if (first := before[name]) is not None), "another is needed first"
        for victim in load.evicted:
            assert victim in self.resident
            assert victim != self.running
            first = before[victim]
            assert first is None or first > need, "what is needed earlier went"
        if self.users[load.name] == 1 and any(self.users[victim] > 1 for victim in load.evicted):
            room = self.residency.limit_bytes - held + sum(self.sizes[name] for name in own)
            assert room < self.sizes[load.name], "a shared one went where others would have done"
        self.resident -= set(load.evicted)
        self.coming.append(load)
        held = sum(self.sizes[name] for name in self.resident) + sum(self.sizes[other.name] for other in self.coming)
        assert held == self.residency.used_bytes <= self.residency.limit_bytes
        return True

    def finish_load(self, index: int = 0, *, fails: bool = False) -> None:
        load = self.coming.pop(index % len(self.coming))
        if fails:
            self.residency.failed(load, self.now_seconds)
            for asked in [asked for asked in self.open if load.name in asked.left.values()]:
                self.end(asked)
        else:
            assert self.residency.arrived(load, 1.0)
            self.resident.add(load.name)

    def start_run(self, index: int = 0) -> bool:
        ready = {name for asked in self.open for name in asked.ready.values() if name in self.resident}
        if self.running is not None or not ready:
            return False
        self.running = sorted(ready)[index % len(ready)]
        self.residency.enter(self.running)
        return True

    def finish_run(self) -> None:
        name, self.running = self.running, None
        assert name is not None
        self.residency.leave(name)
        for asked in list(self.open):
            for place in [place for place, ready in asked.ready.items() if ready == name]:
                self.residency.ran(asked.number, place, name, asked.rows, self.now_seconds)
                del asked.left[place]
            if not asked.left:
                self.open.remove(asked)

    def drain(self) -> None:
        """Lets everything that is open come to its end."""
        for _ in range(100_000):
            if not self.open:
                return
            progress = self.start_run() | self.load()
            if self.running is not None:
                self.finish_run()
            elif self.coming:
                self.finish_load()
            else:
                assert progress, f"{self.open} are stuck"
        pytest.fail("it goes round in circles")


SIZES = {"stem": 9, "trunk-a": 20, "trunk-b": 24, "top": 7, "h1": 2, "h2": 3, "h3": 2, "h4": 5, "h5": 2}
ROUTES = [
    ["stem", "trunk-a", "top", "h1"],
    ["stem", "trunk-a", "top", "h2"],
    ["stem", "trunk-b", "top", "h3"],
    ["stem", "trunk-b", "h4"],
    ["trunk-a", "stem", "h5"],
]
LARGEST = max(sum(SIZES[name] for name in route) for route in ROUTES)
HISTORIES: Tree = [
    (name, -1 if name.startswith("trunk") else root)
    for root in (0, 4)
    for name in (f"trunk-{'ab'[root // 4]}", "stem", "top", "h4")
]
"""Several tasks at once: three segments run on the rows of one, and again on those of another. Not all of them find room together."""

TREES = [[(name, place - 1) for place, name in enumerate(route)] for route in ROUTES] + [HISTORIES]
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.integers(0, 5), st.floats(0, 9), st.integers(1, 3)),
        st.tuples(st.just("cancel"), st.integers(0, 99)),
        st.just(("load",)),
        st.tuples(st.just("loaded"), st.integers(0, 9), st.sampled_from([False, False, False, True])),
        st.tuples(st.just("run"), st.integers(0, 9)),
        st.just(("ran",)),
    ),
    max_size=60,
)  # fmt: skip


@hypothesis.given(STEPS, st.integers(LARGEST, sum(SIZES.values())))
@hypothesis.settings(max_examples=100)
def test_whatever_happens_it_keeps_the_limit_and_everything_comes_to_its_end(steps: list[tuple], limit: int) -> None:
    """What is needed first comes first; what runs, is needed earlier, or is shared does not go for it; nothing waits for ever."""
    simulation = Simulation(limit, SIZES, TREES)
    for step in steps:
        simulation.now_seconds += 0.1
        if step[0] == "ask":
            simulation.ask(step[1], simulation.now_seconds + step[2], step[3])
        elif step[0] == "cancel" and simulation.open:
            simulation.cancel(step[1])
        elif step[0] == "load":
            simulation.load()
        elif step[0] == "loaded" and simulation.coming:
            simulation.finish_load(step[1], fails=step[2])
        elif step[0] == "run":
            simulation.start_run(step[1])
        elif step[0] == "ran" and simulation.running is not None:
            simulation.finish_run()
    if simulation.running is not None:
        simulation.finish_run()
    simulation.drain()
    assert all(not simulation.residency.waiting_for(name) for name in SIZES)


def test_what_has_run_and_is_needed_again_later_makes_room_for_what_comes_before() -> None:
    simulation = Simulation(LARGEST, SIZES, [HISTORIES])
    simulation.ask(0, 1.0)
    simulation.drain()


class Heads:
    """One trunk and many heads, a quarter of which finds room, asked one after the other."""

    NUM = 200

    def __init__(self) -> None:
        self.residency = Residency(1000 + self.NUM // 4)
        self.resident = {"trunk"} if self.residency.add("trunk", 1000, self.NUM, 1.0) else set()
        self.resident |= {f"head-{index}" for index in range(self.NUM) if self.residency.add(f"head-{index}", 1, 1, 1.0)}
        self.now_seconds = 0.0
        self.number = self.found = 0

    def ask(self, head: int) -> None:
        self.number += 1
        self.now_seconds += 0.01
        route = ("trunk", f"head-{head}")
        self.found += route[1] in self.resident
        self.residency.need(self.number, self.now_seconds, [(name, 1) for name in route])
        for place, name in enumerate(route):
            if name not in self.resident:
                load = self.residency.next_load()
                assert load is not None
                assert load.name == name
                self.resident -= set(load.evicted)
                assert self.residency.arrived(load, 1.0)
                self.resident.add(name)
            self.residency.ran(self.number, place, name, 1, self.now_seconds)
        assert "trunk" in self.resident


def test_the_trunk_never_goes_for_heads_and_as_many_are_found_as_there_is_room_for() -> None:
    heads = Heads()
    choice = random.Random(1)
    for _ in range(1000):
        heads.ask(choice.randrange(heads.NUM))
    assert 0.2 < heads.found / 1000 < 0.3


def test_tasks_asked_in_turn_are_found_too() -> None:
    """The least recently used would always be the one that is asked next."""
    heads = Heads()
    for turn in range(1000):
        heads.ask(turn % heads.NUM)
    assert heads.found / 1000 > 0.2


def test_what_is_asked_often_stays_and_goes_when_that_is_long_ago() -> None:
    heads = Heads()
    choice = random.Random(2)
    hot = range(150, 160)
    for turn in range(1000):
        heads.ask(choice.choice(hot) if turn % 2 else choice.randrange(150))
    heads.found = 0
    for _ in range(200):
        heads.ask(choice.choice(hot))
    assert heads.found == 200
    heads.now_seconds += 20 * HALF_LIFE_SECONDS
    for _ in range(2):
        for other in range(50, 90):
            heads.ask(other)
    assert sum(f"head-{head}" in heads.resident for head in range(50, 90)) > 35


def test_what_is_dear_to_load_for_its_size_stays() -> None:
    residency = Residency(20)
    for name, seconds, size in (("dear", 1.0, 10), ("cheap", 0.01, 10), ("new", 1.0, 10)):
        residency.add(name, size, 1, seconds)
    for number, name in enumerate(("dear", "cheap")):
        residency.ran(number, 0, name, 1, 0.0)
    residency.need(9, 1.0, [("new", 1)])
    load = residency.next_load()
    assert load is not None
    assert load.evicted == ("cheap",)


def test_nothing_small_goes_beside_something_large_enough() -> None:
    residency = Residency(100)
    for name, size in (("small", 5), ("large", 90), ("new", 60)):
        residency.add(name, size, 1, 1.0)
    for number, (name, rows) in enumerate((("small", 1), ("large", 10_000))):
        residency.ran(number, 0, name, rows, 0.0)
    residency.need(9, 1.0, [("new", 1)])
    load = residency.next_load()
    assert load is not None
    assert load.evicted == ("large",)


def test_a_failed_load_is_not_tried_at_once_and_gives_its_room_back() -> None:
    residency = Residency(10)
    residency.add("other", 10, 1, 1.0)
    residency.add("broken", 10, 1, 1.0)
    residency.need(1, 1.0, [("broken", 1)])
    load = residency.next_load()
    assert load is not None
    assert residency.used_bytes == 10
    residency.failed(load, 5.0)
    assert (residency.used_bytes, residency.num_failures, residency.place("broken")) == (0, 1, Place.ABSENT)
    assert residency.waiting_for("broken") == [1]
    assert residency.is_failing("broken", 5.0 + RETRY_SECONDS / 2)
    assert not residency.is_failing("broken", 5.0 + RETRY_SECONDS)


def test_what_was_forgotten_while_it_came_is_not_held() -> None:
    residency = Residency(15)
    residency.add("other", 10, 1, 1.0)
    residency.add("one", 10, 1, 1.0)
    residency.need(1, 1.0, [("one", 1)])
    first = residency.next_load()
    assert first is not None
    residency.end(1, ["one"])
    residency.remove("one")
    assert residency.used_bytes == 0
    residency.add("one", 10, 1, 1.0)
    assert not residency.arrived(first, 1.0)
    assert residency.used_bytes == 10


def test_what_it_remembers_is_what_is_needed() -> None:
    residency = Residency(10)
    for name in ("one", "two"):
        residency.add(name, 10, 1, 1.0)
    for number in range(1, 5000):
        residency.need(number, float(number), [("one", 1), ("two", 1)])
        residency.end(number, ["one", "two"])
        residency.next_load()
    assert not residency.is_wanting
