"""Rules for the names of tasks, and help for whoever misspells one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

RESERVED_PREFIXES = ("seg-", "all-")
"""Beginnings that belong to the repository's own models."""

_TASK_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def check_task_name(name: str) -> str:
    """Returns the name if a task may have it.

    Args:
        name: 1 to 64 of a-z 0-9 - _, starting with a letter or digit, without a reserved beginning.

    Raises:
        ValueError: the name breaks a rule; the message says which and how to mend it.
    """
    if not _TASK_NAME.fullmatch(name):
        raise ValueError(
            f"task name {name!r} is not allowed: expected 1 to 64 of a-z 0-9 - _, starting with a letter or digit; "
            f"try {suggest_task_name(name)!r}"
        )
    for prefix in RESERVED_PREFIXES:
        if name.startswith(prefix):
            raise ValueError(
                f"task name {name!r} is not allowed: names starting with {prefix!r} belong to the model repository; "
                f"try {suggest_task_name(name)!r}"
            )
    return name


def suggest_task_name(name: str) -> str:
    """Returns an allowed name that resembles the given one."""
    mended = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).lstrip("-_")[:64].rstrip("-_")
    for prefix in RESERVED_PREFIXES:
        if mended.startswith(prefix):
            mended = f"task-{mended}"[:64]
    return mended or "task"


def similar_names(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Returns up to `most` of the known names that resemble the given one, most alike first."""
    return difflib.get_close_matches(name.lower(), sorted(known), n=most, cutoff=0.5)
