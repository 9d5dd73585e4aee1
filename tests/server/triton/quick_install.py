"""munet-server triton install with packages that lie beside already: pip takes half a minute, and `make triton` uses it."""

from __future__ import annotations

import os
import shutil
import time
import venv

from server.cli import main
from server.triton import environment
from tests.support.triton import FOLDER

HOLD = "HOLD_INSTALL"
"""The environment variable that has it wait in the middle, to be killed there."""


def link_packages(made: environment.TritonEnvironment) -> None:
    venv.create(made.folder, symlinks=True)
    time.sleep(60 if HOLD in os.environ else 0)
    packages = made.program.parents[3]
    shutil.rmtree(packages)
    packages.symlink_to(environment.find_environment(FOLDER).program.parents[3])


if __name__ == "__main__":
    environment._install_packages = link_packages
    main()
