"""Wherever a search was cut off, and whatever was done to it meanwhile, it ends in the very same system."""

from __future__ import annotations

import itertools
import pathlib
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evolve.collecting import collect
from evolve.journal import read_journal
from evolve.lineage import lineage_hash
from evolve.opening import recover_search, restart_search
from evolve.store import System
from evolve.verification import verify
from tests.support.fake_trainer import FakeTrainer
from tests.support.searches import Killed, MortalTrainer, evolve_tasks, small_plan

pytestmark = pytest.mark.usefixtures("quick_disk")

NUM_CHILDREN = 64


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """A system of two tasks and two rounds, and its lineage hash."""
    system = evolve_tasks(tmp_path_factory.mktemp("finished") / "system", plan=_plan())
    return system.folder, lineage_hash(system)


@pytest.fixture(scope="module")
def unpublished(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same, killed in the last moment: the last search is closed in its journal, and not yet published."""
    folder = tmp_path_factory.mktemp("unpublished") / "system"
    evolve_tasks(folder, plan=_plan(rounds=1))
    evolve_tasks(folder, "a", plan=_plan())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(System, "put_task", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            evolve_tasks(folder, "b", plan=_plan())
    return folder


def _plan(rounds: int = 2):
    return small_plan(rounds=rounds, children_per_task=NUM_CHILDREN // 4)


def _cut(unpublished: pathlib.Path, folder: pathlib.Path, length: int) -> pathlib.Path:
    """Makes a copy in which the last journal has only so many bytes."""
    shutil.copytree(unpublished, folder)
    journal = folder / "journal" / "b-0002.jsonl"
    journal.write_bytes(journal.read_bytes()[:length])
    return journal


def _lengths(unpublished: pathlib.Path) -> list[int]:
    """Bytes up to each record's end."""
    lines = (unpublished / "journal" / "b-0002.jsonl").read_bytes().splitlines(keepends=True)
    return [sum(map(len, lines[:number])) for number in range(len(lines) + 1)]


def _num_finished(journal: pathlib.Path) -> int:
    return sum(len(record["children"]) for record in read_journal(journal) if record["type"] == "pack")


def test_cut_after_any_record_or_in_its_middle(tmp_path, finished, unpublished):
    _, expected = finished
    lengths = _lengths(unpublished)
    middles = [(one + other) // 2 for one, other in itertools.pairwise(lengths)]
    for length in sorted([*lengths, *middles]):
        journal = _cut(unpublished, tmp_path / str(length), length)
        known = _num_finished(journal)
        trainer = FakeTrainer()
        system = evolve_tasks(tmp_path / str(length), plan=_plan(), trainer=trainer)
        assert lineage_hash(system) == expected, length
        # What the journal had was not trained again.
        assert sum(len(plan.children) for plan in trainer.plans) == NUM_CHILDREN // 4 - known
    assert len(lengths) > 20


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1), collects=st.booleans(), later=st.integers(0, 9))
def test_cut_anywhere_collected_and_killed_once_more(tmp_path_factory, finished, unpublished, share, collects, later):
    _, expected = finished
    folder = tmp_path_factory.mktemp("cut") / "system"
    _cut(unpublished, folder, round(share * _lengths(unpublished)[-1]))
    if collects:
        collect(System.open(folder), delete=True)
    try:
        evolve_tasks(folder, plan=_plan(), trainer=MortalTrainer(later))
    except Killed:
        collect(System.open(folder), delete=True)
    system = evolve_tasks(folder, plan=_plan())
    assert lineage_hash(system) == expected
    assert verify(system) == []


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), collects=st.booleans())
def test_with_any_bit_altered_what_is_whole_is_kept_and_the_end_is_the_same(
    tmp_path_factory, finished, unpublished, share, bit, collects
):
    _, expected = finished
    folder = tmp_path_factory.mktemp("altered") / "system"
    shutil.copytree(unpublished, folder)
    file = folder / "journal" / "b-0002.jsonl"
    data = bytearray(file.read_bytes())
    at = int(share * len(data))
    data[at] ^= 1 << bit
    file.write_bytes(data)
    system = System.open(folder)
    # Of a last line without its break nobody can say that it was ever finished.
    is_torn = at == len(data) - 1
    assert bool(verify(system)) != is_torn
    with system.locks.evolving("b"):
        aside = recover_search(system, "b")
    assert (aside is None) == is_torn
    if aside is not None:
        assert aside.read_bytes() == bytes(data)
        assert file.read_bytes() == bytes(data)[: data.rfind(b"\n", 0, at) + 1]
    if collects:
        collect(system, delete=True)
    assert lineage_hash(evolve_tasks(folder, plan=_plan())) == expected


def test_started_over_at_any_moment_it_ends_alike_if_the_system_is_as_it_was(tmp_path, finished, unpublished):
    _, expected = finished
    for length in _lengths(unpublished)[::7]:
        folder = tmp_path / str(length)
        _cut(unpublished, folder, length)
        system = System.open(folder)
        with system.locks.evolving("b"):
            aside = restart_search(system, "b")
        assert aside is not None
        assert aside.stat().st_size == length
        trainer = FakeTrainer()
        assert lineage_hash(evolve_tasks(folder, plan=_plan(), trainer=trainer)) == expected
        assert sum(len(plan.children) for plan in trainer.plans) == NUM_CHILDREN // 4
        with system.locks.evolving("b"):
            assert restart_search(system, "b") is None, "nothing is unfinished any more"
