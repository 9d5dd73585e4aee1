"""What `munet-server classify` writes of each image: whole lines, as text for people, as JSON, or as CSV."""

from __future__ import annotations

import csv
import dataclasses
import enum
import io
import json
from typing import Any

from server.errors import CallError
from server.results import Classification, FileAnswer

CSV_COLUMNS = ("file", "generation", "task", "path_id", "rank", "label", "index", "probability", "error")


class Format(enum.StrEnum):
    """How answers are written."""

    TEXT = "text"
    JSONL = "jsonl"
    CSV = "csv"


def header(format_: Format) -> str:
    """Returns what comes before the first answer."""
    return _csv([CSV_COLUMNS]) if format_ is Format.CSV else ""


def lines_of(format_: Format, answer: FileAnswer) -> str:
    """Returns what is written of an image, line ends included.

    As text, a line for each task, and nothing of an image that failed. As JSON, one object with `file` and either `generation` and `tasks`
    or `error`. As CSV, a row for each task and label under `CSV_COLUMNS`, or one with `file` and `error`.
    """
    if format_ is Format.TEXT:
        return _text(answer)
    if format_ is Format.JSONL:
        return json.dumps(_object(answer)) + "\n"
    return _csv(_rows(answer))


def words_of(error: CallError | OSError) -> str:
    """Returns why there is no answer about an image, on one line."""
    words = error.details if isinstance(error, CallError) else error.strerror or str(error)
    return " ".join(words.split())


def _text(answer: FileAnswer) -> str:
    tasks = answer.result.tasks if answer.result else ()
    return "".join(f"{answer.file}  {told.task}  {_labels(told.classification)}\n" for told in tasks)


def _labels(classification: Classification) -> str:
    return ", ".join(f"{label.label} {label.probability:.3f}" for label in classification.labels)


def _object(answer: FileAnswer) -> dict[str, Any]:
    if answer.result is None:
        return {"file": str(answer.file), "error": words_of(answer.error) if answer.error else ""}
    tasks = {
        told.task: {"path_id": told.path_id, "labels": [dataclasses.asdict(label) for label in told.classification.labels]}
        for told in answer.result.tasks
    }
    return {"file": str(answer.file), "generation": answer.result.generation, "tasks": tasks}


def _rows(answer: FileAnswer) -> list[tuple[object, ...]]:
    if answer.result is None:
        return [(answer.file, *[""] * 7, words_of(answer.error) if answer.error else "")]
    generation = answer.result.generation
    return [
        (answer.file, generation, told.task, told.path_id, rank, label.label, label.index, label.probability, "")
        for told in answer.result.tasks
        for rank, label in enumerate(told.classification.labels, 1)
    ]


def _csv(rows: list[tuple[object, ...]]) -> str:
    lines = io.StringIO()
    csv.writer(lines, lineterminator="\n").writerows(rows)
    return lines.getvalue()
