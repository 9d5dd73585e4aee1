"""What both command lines have in common."""

from __future__ import annotations

from typing import Annotated

import typer

import munet


def _show(is_wanted: bool) -> None:
    if is_wanted:
        print(f"munet {munet.__version__}")
        raise typer.Exit


def _options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", callback=_show, is_eager=True)] = False,
) -> None:
    pass


def add_version(app: typer.Typer, help_text: str) -> None:
    """Gives a command line the option `--version`.

    Args:
        app: the command line.
        help_text: what its `--help` begins with.
    """
    app.callback(help=help_text)(_options)
