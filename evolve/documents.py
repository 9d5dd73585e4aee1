"""The JSON files of a system: what they hold, written and read."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from evolve.errors import DamagedError, SystemFolderError
from evolve.path import Path


@dataclasses.dataclass(frozen=True)
class TaskRecord:
    """What a system knows of a task.

    Attributes:
        name: see munet.names.
        path_id: its current path.
        parent_id: the current path's nearest ancestor that is current itself, or the root.
        num_children: children ever drawn from the current path for this task.
        rounds: rounds closed so far.
        order: grows by one with every closed round of any task; the greatest is the newest.
        private: whether other tasks are kept from using its layers.
        labels: class names in the order of the logits.
        quality: validation accuracy of the current path, 0 to 1.
        test_accuracy: 0 to 1, measured once at closing; None without a test split.
        examples: name of the file in examples/ with a few validation images.
        data_fingerprint: hash of the task's images, labels and splits.
        settings: the resolved settings of the run that closed it last.
    """

    name: str
    path_id: str
    parent_id: str
    num_children: int
    rounds: int
    order: int
    private: bool
    labels: tuple[str, ...]
    quality: float
    test_accuracy: float | None
    examples: str
    data_fingerprint: str
    settings: Mapping[str, Any]

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TaskRecord:
        """Returns the record that `dataclasses.asdict` gave these JSON values.

        Raises:
            KeyError, TypeError: a field is missing or unknown.
        """
        return TaskRecord(**{**values, "labels": tuple(values["labels"])})


def path_to_dict(path: Path) -> dict[str, Any]:
    """Returns a path as JSON values."""
    return {
        "task": path.task,
        "layers": [[str(position), layer.id] for position, layer in path.layers],
        "hyperparameters": path.hyperparameters.to_dict(),
        "parent_id": path.parent_id,
        "quality": path.quality,
    }


def check_document(document: Mapping[str, Any], expected_format: Any, where: str) -> tuple[str, str, Mapping[str, Any]]:
    """Returns id, root and where that came from of what system.json says.

    Raises:
        SystemFolderError: another format.
        DamagedError: something is missing.
    """
    found = document.get("format")
    if found != expected_format:
        advice = "use the version of munet that wrote it"
        if isinstance(found, str) != isinstance(expected_format, str):
            advice = "a system in a store is opened by a URL, such as file:///folder, one in a folder by the folder"
        raise SystemFolderError(f"found a system of format {found!r} in {where}", f"format {expected_format}", advice)
    try:
        return document["id"], document["root"], document["root_source"]
    except KeyError as error:
        raise DamagedError(f"found no {error} in {where}/system.json", "what was written", "restore the file") from error


def to_json(document: Any) -> bytes:
    """Returns a document as the files of a system have it."""
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        DamagedError: there is none.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DamagedError(f"found no readable {file} ({error})", "what was written", "restore the file") from error
    return parse_json(data, str(file))


def parse_json(data: bytes, where: str) -> dict[str, Any]:
    """Returns the JSON object in some bytes; `where` they are from is said if there is none.

    Raises:
        DamagedError: there is none.
    """
    try:
        document = json.loads(data)
    except ValueError as error:
        raise DamagedError(f"found no readable {where} ({error})", "what was written", "restore the file") from error
    if not isinstance(document, dict):
        raise DamagedError(f"found {type(document).__name__} in {where}", "an object", "restore the file")
    return document
