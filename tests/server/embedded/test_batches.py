from __future__ import annotations

import numpy as np

from server.embedded.batches import Cargo, Trip, values_of
from server.embedded.scheduler import Claim, Lane, Rows
from server.engine import Question
from server.questions import LoadedGeneration, OpenQuestion, RouteTree
from server.repository import Repository
from tests.support.repository import RepositoryBuilder, random_images


def test_the_tree_folds_what_routes_share_from_the_image_on(tmp_path) -> None:
    RepositoryBuilder(tmp_path).publish()
    generation = Repository(tmp_path).read()
    tree = RouteTree.build(generation, ["digits", "greek", "hebrew", "short"])
    (stem,) = tree.roots
    assert stem.num_tasks == 4
    assert {branch.num_tasks for branch in stem.children.values()} == {3, 1}
    # Stem, trunk, clone, top after each of the two, four heads.
    assert tree.num_branches == 1 + 2 + 2 + 4
    leaves = [name for branch in walk(tree) for name in branch.leaves]
    assert sorted(leaves) == ["digits", "greek", "hebrew", "short"]


def walk(tree: RouteTree):
    stack = list(tree.roots)
    while stack:
        branch = stack.pop()
        yield branch
        stack += branch.children.values()


def test_rows_are_a_part_of_what_they_carry(tmp_path) -> None:
    RepositoryBuilder(tmp_path).publish()
    generation = Repository(tmp_path).read()
    opened = OpenQuestion(1, Question(generation, random_images(4, 8), ("digits",)), LoadedGeneration(generation), 0.0)
    cargo = Cargo(opened, opened.tree.roots[0], np.arange(12).reshape(4, 3), 0, Trip(0.0))
    lane = Lane("seg-a", (3,), 8)
    values = values_of(Rows(Claim(1, "digits", 0.0, 1.0), lane, 1, 2, cargo))
    assert isinstance(values, np.ndarray)
    assert np.shares_memory(values, cargo.values)
    assert values.tolist() == [[3, 4, 5], [6, 7, 8]]


def test_a_trip_adds_up_what_rows_wait_and_are_computed() -> None:
    trip = Trip(since_seconds=1.0).after(3.0, 3.5).after(4.0, 4.25)
    assert (trip.since_seconds, trip.waited_seconds, trip.computed_seconds) == (4.25, 2.5, 0.75)
