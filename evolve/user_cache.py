"""Where munet keeps on this machine what it could make or fetch again."""

from __future__ import annotations

import os
import pathlib

CACHE_VARIABLE = "MUNET_CACHE"
"""Environment variable: the folder; by default `munet` in the user's cache folder."""


def cache_folder() -> pathlib.Path:
    """Returns the folder, which need not be there. It may be removed whenever nothing runs.

    Raises:
        RuntimeError: nothing says which it is, and this user has no home.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return pathlib.Path(chosen)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "munet"
