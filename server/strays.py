"""What lies in the folders of published models and was never published. This server reads none of it; a Triton might."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Iterator

from server.errors import Finding
from server.generation import Generation

_SEGMENT = re.compile(r"config\.pbtxt|1/model\.onnx")
_ENSEMBLE = re.compile(r"config\.pbtxt|labels(_[a-z0-9_-]+)?\.txt")
_UNFINISHED = re.compile(r"\..+\.part")
"""What a publisher is writing, or had begun to write when it was killed."""


def find_strays(root: pathlib.Path, generation: Generation) -> Iterator[Finding]:
    """Finds entries of the models' folders that munet does not publish, and links that leave the repository.

    A Triton loads the greatest version that it finds, whoever put it there: `seg-.../2/model.onnx` would answer for `1/model.onnx`.

    Args:
        root: the repository.
        generation: whose models to look at: segments, ensembles and aliases.
    """
    ensembles = {*generation.ensembles.values(), *generation.tasks, *(task.ensemble for task in generation.tasks.values())}
    for names, known in ((generation.segments, _SEGMENT), (sorted(ensembles), _ENSEMBLE)):
        for name in names:
            yield from _look_at(root, root / name, known)


def _look_at(root: pathlib.Path, folder: pathlib.Path, known: re.Pattern[str]) -> Iterator[Finding]:
    inside = root.resolve()
    for place, folders, files in os.walk(folder):
        here = pathlib.Path(place)
        for name in sorted([*folders, *files]):
            entry = here / name
            where = entry.relative_to(root).as_posix()
            try:
                target = entry.resolve(strict=True)
            except (OSError, RuntimeError):
                yield Finding(where, "a link that leads nowhere", "a file", "remove it")
                continue
            if not target.is_relative_to(inside):
                yield Finding(where, f"a link to {str(target)!r}", "a file inside the repository", "remove it")
            elif not _is_known(entry, entry.relative_to(folder).as_posix(), known):
                yield Finding(where, "what nobody published", f"only what matches {known.pattern}", "remove it")


def _is_known(entry: pathlib.Path, path: str, known: re.Pattern[str]) -> bool:
    if entry.is_dir():
        # The one version, which is an empty folder in an ensemble.
        return path == "1"
    return bool(known.fullmatch(path) or _UNFINISHED.fullmatch(entry.name)) and entry.is_file()
