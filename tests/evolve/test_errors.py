"""Errors come back from worker processes as they were raised there."""

from __future__ import annotations

import pickle

import pytest

from evolve.errors import DamagedError, EvolveError, MemoryShortageError, TrainerError, WorkersDiedError


@pytest.mark.parametrize(
    "error",
    [
        DamagedError("found a", "b", "do c"),
        MemoryShortageError("child 3", 64, "no room"),
        TrainerError("two", "one"),
        WorkersDiedError(3, "at children [1]", "out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_same_after_pickling(error: EvolveError) -> None:
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)
