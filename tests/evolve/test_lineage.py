"""One hash says whether two searches decided, trained and ended alike."""

from __future__ import annotations

import gzip
import json
import pathlib
import shutil

import pytest

from evolve.collecting import collect
from evolve.errors import DamagedError
from evolve.journal import Journal, compressed_file, read_journal
from evolve.lineage import lineage_hash, lineage_of
from evolve.opening import recover_search
from evolve.store import System
from evolve.verification import verify
from tests.support.fake_trainer import FakeTrainer
from tests.support.searches import Killed, MortalTrainer, evolve_tasks, small_plan

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> System:
    """Read only."""
    return evolve_tasks(tmp_path_factory.mktemp("whole") / "system")


def _copy(system: System, tmp_path: pathlib.Path) -> System:
    return System.open(pathlib.Path(shutil.copytree(system.folder, tmp_path / "copy")))


def _rewrite(file: pathlib.Path, change) -> None:
    """Writes a journal anew, checksums and all, with its records changed."""
    records = read_journal(file)
    file.unlink()
    journal = Journal(file)
    for record in records:
        change(record)
        fields = {name: value for name, value in record.items() if name not in ("crc32", "sequence", "type")}
        journal.append(record["type"], fields)
    journal.close()


def test_the_same_search_has_the_same_hash_and_another_seed_another(whole, tmp_path):
    again, other = evolve_tasks(tmp_path / "again"), evolve_tasks(tmp_path / "other", plan=small_plan(seed=1))
    assert again.id != whole.id
    assert lineage_hash(again) == lineage_hash(whole)
    assert lineage_hash(other) != lineage_hash(whole)
    assert len(lineage_hash(whole)) == 32


def test_packs_timings_and_settings_that_decide_nothing_are_no_part_of_it(whole, tmp_path):
    backwards = FakeTrainer(packs=lambda children: [list(reversed(children))[i : i + 2] for i in range(0, len(children), 2)])
    backwards.versions = {"device": "another"}
    assert lineage_hash(evolve_tasks(tmp_path / "packs", trainer=backwards)) == lineage_hash(whole)
    system = _copy(whole, tmp_path)

    def change(record):
        for part in (record, *record.get("children", ())):
            part.pop("reason", None)
            if "seconds" in part:
                part["seconds"] = {"train": 99}

    for journal in system.journals():
        _rewrite(journal.file, change)
    assert lineage_hash(system) == lineage_hash(whole)
    collect(system, delete=True)
    assert all(journal.file.suffix == ".gz" for journal in system.journals())
    assert lineage_hash(System.open(system.folder)) == lineage_hash(whole)


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("pack", "score", 0.123),
        ("pack", "interval_qualities", [0.5]),
        ("pack", "survived", None),
        ("pack", "layers", []),
        ("generation", "mutations", ["norm: clone"]),
        ("generation", "parent_id", "0" * 32),
        ("generation", "seed", 1),
        ("close", "test_accuracy", 0.75),
        ("open", "data_fingerprint", "g"),
    ],
)
def test_any_other_decision_or_result_is_another_lineage(whole, tmp_path, kind, name, value):
    system = _copy(whole, tmp_path)

    def change(record):
        if record["type"] == kind:
            part = record["children"][0] if kind in ("pack", "generation") else record
            assert name in part
            part[name] = value

    _rewrite(system.journals()[0].file, change)
    assert lineage_hash(system) != lineage_hash(whole)


def test_a_child_that_is_missing_is_another_lineage(whole):
    records = read_journal(whole.journals()[0].file)
    fewer = [record for record in records if record["type"] != "pack" or record["children"][0]["index"]]
    assert lineage_of(fewer) != lineage_of(records)


def test_every_byte_of_a_layer_counts(whole, tmp_path):
    system = _copy(whole, tmp_path)
    used = sorted(system.path(system.tasks()["a"].path_id).layer_ids)[0]
    file = next(system.folder.glob(f"layers/*/{used}.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    # Also by a process that has looked at the layer before.
    for opened in (system, System.open(system.folder)):
        with pytest.raises(DamagedError, match=f"found altered weights in .*{used}.* --restart"):
            lineage_hash(opened)


def test_what_was_set_aside_is_no_part_of_it(whole, tmp_path):
    system = _copy(whole, tmp_path)
    with system.locks.publishing():
        system.remove_task("b")
    without = lineage_hash(system)
    assert without != lineage_hash(whole)
    assert len(system.removed_journals()) == 2
    for file in system.removed_journals():
        file.unlink()
    assert lineage_hash(system) == without


def test_a_search_that_was_killed_before_its_first_line_is_no_part_of_it(whole, tmp_path):
    system = _copy(whole, tmp_path)
    system.journal_file("c", 0).write_bytes(b"")
    assert lineage_hash(system) == lineage_hash(whole)


def test_what_is_whole_of_a_compressed_journal_is_gone_on_with(whole, tmp_path):
    with pytest.raises(Killed):
        evolve_tasks(tmp_path / "system", trainer=MortalTrainer(6))
    system = System.open(tmp_path / "system")
    file = system.journal_file("a", 0)
    lines = file.read_bytes().splitlines(keepends=True)
    altered = b"".join(lines[:4]) + lines[4].replace(b"score", b"scorn") + b"".join(lines[5:])
    compressed_file(file).write_bytes(gzip.compress(altered))
    file.unlink()
    aside = recover_search(system, "a")
    assert aside is not None
    with pytest.raises(DamagedError, match="altered line 5"):
        read_journal(aside)
    assert len(read_journal(file)) == 4
    assert not compressed_file(file).exists()
    assert lineage_hash(evolve_tasks(system.folder)) == lineage_hash(whole)


def test_of_a_compressed_journal_that_cannot_be_read_no_copies_are_made(tmp_path):
    with pytest.raises(Killed):
        evolve_tasks(tmp_path / "system", trainer=MortalTrainer(6))
    system = System.open(tmp_path / "system")
    file = system.journal_file("a", 0)
    compressed_file(file).write_bytes(gzip.compress(file.read_bytes())[:100])
    file.unlink()
    for _ in range(2):
        with pytest.raises(DamagedError, match=r"could not read .*a-0001\.jsonl\.gz .* --restart starts the round"):
            recover_search(system, "a")
    assert system.removed_journals() == []
    assert compressed_file(file).exists()


def test_a_search_that_an_earlier_version_began_goes_on(tmp_path):
    """tests/golden/unfinished-search-1: task a closed, task b killed after five of eight children, both in format 1 without `reason`."""
    folder = pathlib.Path(shutil.copytree(GOLDEN / "unfinished-search-1", tmp_path / "system"))
    before = read_journal(folder / "journal" / "b-0001.jsonl")
    assert json.dumps(before).count('"survived"') == 5
    assert not any("reason" in child for record in before for child in record.get("children", ()))
    # As settings that came later would be: the journal does not have them, and they are at their defaults.
    _rewrite(
        folder / "journal" / "b-0001.jsonl", lambda record: record.get("settings", {}).get("search", {}).pop("scale_factor", 0)
    )
    trainer = FakeTrainer()
    system = evolve_tasks(folder, plan=small_plan(5, rounds=1, auto_tune=False), trainer=trainer)
    assert sum(len(plan.children) for plan in trainer.plans) == 3
    assert verify(system) == []
    assert lineage_hash(system) == "a18014526610af2032e66f6a6f98d94e"
