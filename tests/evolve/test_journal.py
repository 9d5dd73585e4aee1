"""The record of a search survives crashes and notices alterations."""

import json

import pytest

from evolve.errors import DamagedError, SystemFolderError
from evolve.journal import Journal, read_journal, search_journals


def _written(file, count=3):
    journal = Journal(file)
    for number in range(count):
        journal.append("pack", {"number": number, "text": "Ωμέγα", "values": (1.5, None, True)})
    journal.close()
    return journal.records


def test_what_is_appended_is_read_back(tmp_path):
    records = _written(tmp_path / "journal" / "a.jsonl")
    assert read_journal(tmp_path / "journal" / "a.jsonl") == records
    assert [record["sequence"] for record in records] == [0, 1, 2]
    assert records[0]["values"] == [1.5, None, True]


def test_every_line_is_plain_json_with_the_documented_checksum(tmp_path):
    import zlib

    _written(tmp_path / "a.jsonl")
    for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        checksum = record.pop("crc32")
        canonical = json.dumps(record, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
        assert checksum == f"{zlib.crc32(canonical):08x}"


def test_a_torn_last_line_is_dropped_wherever_it_was_torn(tmp_path):
    file = tmp_path / "a.jsonl"
    records = _written(file)
    whole = file.read_bytes()
    start_of_last = whole[:-1].rindex(b"\n") + 1
    for length in range(start_of_last, len(whole)):
        file.write_bytes(whole[:length])
        journal = Journal(file)
        assert journal.records == records[:2]
        journal.append("pack", {"number": 2, "text": "Ωμέγα", "values": (1.5, None, True)})
        journal.close()
        assert file.read_bytes() == whole


@pytest.mark.parametrize("line", [0, 1, 2])
def test_an_altered_line_is_named(tmp_path, line):
    file = tmp_path / "a.jsonl"
    _written(file)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[line] = lines[line].replace(b'"number"', b'"nunber"')
    file.write_bytes(b"".join(lines))
    with pytest.raises(DamagedError, match=f"altered line {line + 1} in .*a.jsonl"):
        read_journal(file)


def test_a_missing_line_is_noticed(tmp_path):
    file = tmp_path / "a.jsonl"
    _written(file)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[2] + lines[2])
    with pytest.raises(DamagedError, match="altered line 2"):
        Journal(file)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemFolderError, match="could not write .*expected a writable folder"):
        Journal(tmp_path / "file" / "a.jsonl")


def test_journals_are_listed_once_by_task_and_round_and_not_those_set_aside(tmp_path):
    (tmp_path / "journal" / "removed").mkdir(parents=True)
    assert search_journals(tmp_path) == {}
    names = ("a-0001.jsonl", "a-0001.jsonl.gz", "b-0001.jsonl.gz", "a-b-0002.jsonl", "c-10000.jsonl")
    for name in (*names, ".d-0001.jsonl.x.part", "mine.jsonl", "removed/e-0001.1.jsonl"):
        (tmp_path / "journal" / name).write_bytes(b"")
    found = {place: file.name for place, file in search_journals(tmp_path).items()}
    assert found == {("a", 0): names[0], ("a-b", 1): names[3], ("b", 0): names[2], ("c", 9999): names[4]}
