from __future__ import annotations

import inspect
import pathlib
import re

from server import errors


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    drawn: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"([ │├└─]*)(\w+Error)\s{2,}\S", line)
        if match is None:
            continue
        depth, name = len(match.group(1)), match.group(2)
        while parents and parents[-1][0] >= depth:
            parents.pop()
        drawn[name] = parents[-1][1] if parents else "Exception"
        parents.append((depth, name))
    classes = {
        name: cls.__bases__[0].__name__ for name, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, Exception)
    }
    assert drawn == classes


def test_nothing_here_knows_of_grpc() -> None:
    assert "import grpc" not in inspect.getsource(errors)


def test_messages_say_what_was_found_what_is_expected_and_what_to_do() -> None:
    assert str(errors.UnknownTaskError("digit", ["digits"], 4)) == (
        "task: found 'digit', expected one of the 4 tasks that are served; did you mean 'digits'?"
    )
    assert len(str(errors.UnknownTaskError("x" * 10_000_000, [], 4))) < 200
    assert "found a folder without the file CURRENT" in str(errors.NoGenerationError(pathlib.Path()))
    found = errors.Finding("a/b", "x", "y", "do z")
    assert str(found) == "a/b: found x, expected y; do z"
    assert str(errors.GenerationRefusedError(3, [found] * 7)).endswith("; and 2 more, see `munet-server check`")
