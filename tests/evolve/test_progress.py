"""Progress: a bar on a terminal, plain lines elsewhere."""

import io
import pathlib

import pytest
import rich.console

from evolve import progress
from evolve.progress import loading, publishing


def test_long_loading_says_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = rich.console.Console(file=io.StringIO(), width=40)
    with loading(console, "pets") as tell:
        tell(1, 1000)
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
        tell(2, 1000)
    assert console.file.getvalue() == "pets: 2 of 1000 images read\n"


def test_loading_shows_a_bar_on_a_terminal() -> None:
    console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=100)
    with loading(console, "pets") as tell:
        tell(500, 1000)
    assert "50%" in console.file.getvalue()


def test_long_publishing_says_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    console = rich.console.Console(file=io.StringIO(), width=40)
    with publishing(console, pathlib.Path("repository")) as tell:
        tell("exporting the first segment")
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
        tell("exporting the second segment")
    assert console.file.getvalue() == "repository: exporting the second segment\n"
