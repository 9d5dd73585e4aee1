"""How both commands start, so that one whose packages were not installed says so."""

from __future__ import annotations

import importlib
import sys

_OWN = ("munet", "evolve", "server")


def start(module: str, extra: str) -> None:
    """Runs the `main` of a module; ends with exit status 2 and what to install if a package that it needs is missing,
    and with 130 if Ctrl-C comes while they load.

    Args:
        module: name of a command line's module.
        extra: what `pip install` calls the packages that it needs.
    """
    try:
        importlib.import_module(module).main()
    except KeyboardInterrupt:
        # Before the command takes signals in hand itself: its packages take seconds to load.
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in _OWN:
            raise
        sys.stderr.write(f"error: found no module {missing!r}; expected the packages of '{extra}'; pip install '.[{extra}]'\n")
        sys.exit(2)
