from __future__ import annotations

import csv
import io
import json
import pathlib

import pytest

from server.answer_lines import CSV_COLUMNS, Format, header, lines_of, words_of
from server.errors import CallError, CallRefusedError
from server.results import Classification, ClassifyTasksResult, FileAnswer, LabelProbability, TaskClassification

PETS = TaskClassification(
    "pets", "path-1", Classification((LabelProbability(1, "cat, tame", 0.75), LabelProbability(0, "dog", 0.25)), None)
)
SHADES = TaskClassification("shades", "path-2", Classification((LabelProbability(0, 'so "dark"', 1.0),), None))
GOOD = FileAnswer(pathlib.Path("a b.png"), ClassifyTasksResult(3, (PETS, SHADES)), None)
REFUSED = CallRefusedError("127.0.0.1:1", "Classify", "INVALID_ARGUMENT", "images[0]: found nothing,\n  expected an image")
BAD = FileAnswer(pathlib.Path("bad.png"), None, REFUSED)


def test_text_is_a_line_for_each_task() -> None:
    assert header(Format.TEXT) == ""
    assert lines_of(Format.TEXT, GOOD) == 'a b.png  pets  cat, tame 0.750, dog 0.250\na b.png  shades  so "dark" 1.000\n'
    assert lines_of(Format.TEXT, BAD) == ""


def test_json_is_an_object_on_one_line() -> None:
    assert header(Format.JSONL) == ""
    line = lines_of(Format.JSONL, GOOD)
    assert line.count("\n") == 1
    assert json.loads(line) == {
        "file": "a b.png",
        "generation": 3,
        "tasks": {
            "pets": {
                "path_id": "path-1",
                "labels": [
                    {"index": 1, "label": "cat, tame", "probability": 0.75},
                    {"index": 0, "label": "dog", "probability": 0.25},
                ],
            },
            "shades": {"path_id": "path-2", "labels": [{"index": 0, "label": 'so "dark"', "probability": 1.0}]},
        },
    }
    assert json.loads(lines_of(Format.JSONL, BAD)) == {"file": "bad.png", "error": "images[0]: found nothing, expected an image"}


def test_csv_is_a_row_for_each_label() -> None:
    written = header(Format.CSV) + lines_of(Format.CSV, GOOD) + lines_of(Format.CSV, BAD)
    rows = list(csv.DictReader(io.StringIO(written)))
    assert tuple(rows[0]) == CSV_COLUMNS
    assert [tuple(row.values()) for row in rows] == [
        ("a b.png", "3", "pets", "path-1", "1", "cat, tame", "1", "0.75", ""),
        ("a b.png", "3", "pets", "path-1", "2", "dog", "0", "0.25", ""),
        ("a b.png", "3", "shades", "path-2", "1", 'so "dark"', "0", "1.0", ""),
        ("bad.png", "", "", "", "", "", "", "", "images[0]: found nothing, expected an image"),
    ]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (REFUSED, "images[0]: found nothing, expected an image"),
        (FileNotFoundError(2, "No such file or directory", "x.png"), "No such file or directory"),
        (OSError("strange"), "strange"),
    ],
)
def test_errors_are_told_in_one_line(error: CallError | OSError, words: str) -> None:
    assert words_of(error) == words
