"""Which images a command line means: files, folders, patterns, and lists of them."""

from __future__ import annotations

import glob
import os
import pathlib
import sys
from collections.abc import Iterator, Sequence

from server.errors import SettingsError

ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
"""What the names of images in a folder end with, in capitals or not. Files that are named one by one may end with anything."""

STANDARD_INPUT = "-"


def check_images(arguments: Sequence[str]) -> None:
    """Checks that each argument means something, as far as that can be known before anything is read.

    Raises:
        SettingsError: a folder without an image, a pattern that nothing fits, or two lists on standard input.
    """
    if arguments.count(STANDARD_INPUT) > 1:
        raise SettingsError("IMAGE", "- twice", "one list on standard input")
    for argument in arguments:
        if argument != STANDARD_INPUT and next(_expanded(argument), None) is None:
            of_a_folder = f"images below it, whose names end with {', '.join(ENDINGS)}"
            raise SettingsError("IMAGE", argument, of_a_folder if _is_folder(argument) else "files that fit it")


def find_images(arguments: Sequence[str]) -> Iterator[pathlib.Path]:
    """Gives the images that arguments mean, argument by argument.

    Below a folder they come in the order of their names, each folder in its place among the files; what begins with a dot is passed
    over, and links to folders are not followed. What fits a pattern, in which `**` stands for any folders, comes in the order of names
    too. `-` stands for standard input, one path a line. A file that is named is given whether or not it is there.

    Args:
        arguments: files, folders, patterns, `-`.
    """
    for argument in arguments:
        if argument == STANDARD_INPUT:
            yield from (pathlib.Path(line.rstrip("\n")) for line in sys.stdin if line.strip())
        else:
            yield from _expanded(argument)


def _expanded(argument: str) -> Iterator[pathlib.Path]:
    path = pathlib.Path(argument)
    if _is_folder(argument):
        yield from _below(path)
    elif glob.has_magic(argument) and not os.path.lexists(path):
        # pathlib takes no absolute patterns.
        fitting = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207
        yield from (pathlib.Path(name) for name in fitting if not _is_folder(name))
    else:
        yield path


def _is_folder(name: str) -> bool:
    # pathlib raises what is wrong with a name that cannot be one; reading it says so in its turn.
    return os.path.isdir(name)  # noqa: PTH112


def _below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(
                (entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries if not entry.name.startswith(".")
            )
    except OSError:
        # Whoever reads it like a file learns why it cannot be read.
        yield folder
        return
    for name, is_folder in names:
        if is_folder:
            yield from _below(folder / name)
        elif name.lower().endswith(ENDINGS):
            yield folder / name
