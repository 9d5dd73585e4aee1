"""What a whole repository is."""

from __future__ import annotations

import hashlib
import pathlib

from google.protobuf import json_format

from munet.v1 import generation_pb2


def read_generation(repository: pathlib.Path, number: int | None = None) -> generation_pb2.Generation:
    """A generation, by default the current one."""
    chosen = number or int((repository / "CURRENT").read_text())
    return json_format.Parse((repository / f"generation-{chosen}.json").read_text(), generation_pb2.Generation())


def check_whole(repository: pathlib.Path) -> generation_pb2.Generation:
    """Returns the current generation; every file that any generation there names is there and is what it says."""
    for name in repository.glob("generation-*.json"):
        generation = json_format.Parse(name.read_text(), generation_pb2.Generation())
        assert [file.path for file in generation.files] == sorted({file.path for file in generation.files})
        for file in generation.files:
            data = (repository / file.path).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (file.num_bytes, file.sha256), file.path
        named = {file.path.partition("/")[0] for file in generation.files}
        assert named >= {segment.name for segment in generation.segments} | {task.ensemble for task in generation.tasks}
    return read_generation(repository)
